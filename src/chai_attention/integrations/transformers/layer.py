"""One layer's cache: K of representatives, V of all heads, and the attention over them.

A layer with an online membership goes through three states:

*waiting*: some sequence has fewer real tokens than the probe window. K of all heads is kept and
the queries of the window are remembered. Every sequence uses full attention for the tokens of
its window and its own membership after that, so that a result never depends on the batch.

*provisional*: every window is full, but so recently that an assisted decoding may still take
tokens back. It works as *waiting* does.

*clustered*: the membership is fixed. K of all other heads has been freed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from chai_attention.errors import CacheError
from chai_attention.integrations.transformers.buffers import TokenBuffer, pick_heads
from chai_attention.integrations.transformers.padding import Padding
from chai_attention.integrations.transformers.plan import LayerPlan
from chai_attention.membership import Membership
from chai_attention.ops import attention

# A forward of several tokens that ends this close behind the window may hold draft tokens, which
# assisted decoding takes back: K of all heads is then kept until the next forward.
DRAFT_TOKENS = 32

LAYER_TAG = "_chai_layer"


class ClusteredLayer(CacheLayerMixin):
    """Cache layer of a full-attention layer; see the module's text for its states."""

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def __init__(self, plan: LayerPlan):
        self.plan = plan
        self.is_initialized = False
        self._incoming: tuple[Tensor, Tensor] | None = None
        self.reset()

    # ---- what transformers asks of a cache layer

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Remember dtype and device; memory is allocated with the first tokens."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take new K and V, ``[B, G, Q, D]``; `attend`, which sees the queries, stores them.

        Returns the same tensors, K marked so that the attention function finds this layer.

        Raises:
            CacheError: the K and V of the last call never reached `attend`.
        """
        if self._incoming is not None:
            raise CacheError(
                "this cache holds K of representatives only: use it with the model it was made "
                "for, while chai_attention.enable(model, profile) is in force"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._incoming = (key_states, value_states)
        tagged = key_states.view(key_states.shape)
        setattr(tagged, LAYER_TAG, self)
        return tagged, value_states

    def get_seq_length(self) -> int:
        """Tokens held, padding included."""
        return self._values.length

    def get_max_length(self) -> int:
        """-1: the cache grows without bound."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask of the next forward."""
        return self.get_seq_length() + query_length, 0

    def reset(self) -> None:
        """Forget everything, memberships included."""
        self.membership: Membership | None = None
        self._keys = TokenBuffer(token_axis=2)  # [B, kept or G, S, D]
        # V of clusters is read best token-major; torch's fused attention reads it head-major
        self._values = TokenBuffer(token_axis=1, transposed=self.plan.is_identity)  # [B, S, G, Dv]
        self._window_query: Tensor | None = None  # [B, H, W, D], waiting and provisional
        self._window_end = 0  # a crop must leave at least this many tokens
        self._incoming = None

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-n`` tokens; a positive n keeps n, as older transformers meant it.

        Raises:
            CacheError: the crop would cut into the probe window of a clustered layer, whose
                other heads' K is gone.
        """
        length = self.get_seq_length()
        keep = tokens_to_remove if tokens_to_remove > 0 else length + tokens_to_remove
        if keep >= length:
            return
        if keep <= 0:
            self.reset()
            return
        if self.membership is not None and keep < self._window_end:
            raise CacheError(
                f"cannot crop to {keep} tokens: the heads were clustered on the first "
                f"{self._window_end}, and K of the other heads has been freed. Reset the cache "
                "and run the prompt again, or use a static membership"
            )
        self._keys.length = self._values.length = keep

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rearrange the sequences of the batch (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence ``repeats`` times."""
        if self.get_seq_length():
            rows = torch.arange(self.batch_size, device=self.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices`` (integers or a mask)."""
        if not self.get_seq_length():
            return
        rows = indices.to(self.device)
        self._keys.select(rows)
        self._values.select(rows)
        if self._window_query is not None:
            self._window_query = self._window_query[rows]
        if self.membership is not None:
            self.membership = self.membership.select(rows)

    @property
    def batch_size(self) -> int:
        """Sequences held."""
        return 0 if self._keys.data is None else self._keys.data.shape[0]

    @property
    def keys(self) -> Tensor | None:
        """``[B, kept, S, D]``: K in the order of ``membership.key_heads``."""
        return self._keys.view

    @property
    def values(self) -> Tensor | None:
        """``[B, G, S, Dv]``: V in the order of ``membership.value_heads``."""
        view = self._values.view
        return None if view is None else view.transpose(1, 2)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor this layer holds, by what it is: its whole memory."""
        held = {"key": self._keys.data, "value": self._values.data, "probe": self._window_query}
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    # ---- attention

    def attend(
        self, query: Tensor, padding: Padding, scale: float, softcap: float | None = None
    ) -> Tensor:
        """Store the K and V of the last `update` and attend with them.

        Args:
            query: ``[B, H, Q, D]`` of the new tokens, all heads.
            padding: which tokens, old and new, are real.
            scale: factor on the scores.
            softcap: as in `ops.reference.attention`.

        Returns:
            ``[B, Q, H, Dv]``.
        """
        if self._incoming is None:
            raise CacheError("attend() needs the K and V of an update() just before")
        key, value = self._incoming
        self._incoming = None
        options = {"scale": scale, "softcap": softcap}
        if self.membership is None and not self.plan.needs_probe:
            self.membership = self.plan.fixed_membership(key.shape[0], key.device)
        if self.membership is None and self._window_end:
            self._confirm(padding, options)
        if self.membership is not None:
            return self._attend_clustered(query, key, value, padding, options)
        return self._attend_probing(query, key, value, padding, options)

    def _attend_clustered(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Padding, options: dict[str, Any]
    ) -> Tensor:
        """Append K of representatives and V of all heads; attend by clusters."""
        assert self.membership is not None
        member = self.membership
        keys, values = key, value.transpose(1, 2)
        if not member.is_identity:
            query = pick_heads(query, member.slot_heads)
            keys = pick_heads(key, member.key_heads)
            if member.group_size == 1:
                values = pick_heads(values, member.value_heads, axis=2)
        keys = self._keys.append(keys)
        values = self._values.append(values).transpose(1, 2)
        return attention(query, keys, values, member, valid=padding.valid, **options)[0]

    def _attend_probing(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Padding, options: dict[str, Any]
    ) -> Tensor:
        """Attend while windows fill up; cluster and free K when all are full."""
        past, queries, window = self.get_seq_length(), query.shape[2], self.plan.window
        positions = padding.window_positions(window)  # [B, W]
        fewest = min(padding.counts)
        draft = queries > 1 and fewest < window + DRAFT_TOKENS
        if fewest >= window and not draft and past == 0:
            # the common case, a whole prompt at once: K of all heads is never stored
            q, k, v = (pick_tokens(x, positions) for x in (query, key, value))
            self._cluster(q, k, padding, options)
            out = self._attend_clustered(query, key, value, padding, options)
            exact = self._full_attention(q, k, v, None, options)  # [B, W, H, Dv]
            return out.scatter_(1, positions[:, :, None, None].expand_as(exact), exact)

        self._remember_queries(query, positions, past)
        keys = self._keys.append(key)
        values = self._values.append(value.transpose(1, 2)).transpose(1, 2)
        out = self._full_attention(query, keys, values, padding.valid, options)
        self._attend_after_window(out, query, keys, values, padding, options)
        if fewest >= window:
            self._window_end = padding.window_end(window)
            if not draft:
                self._confirm(padding, options)
        return out

    def _attend_after_window(
        self,
        out: Tensor,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        padding: Padding,
        options: dict[str, Any],
    ) -> None:
        """Overwrite, in ``out``, the tokens that lie behind the window of their sequence."""
        window = self.plan.window
        rows = [row for row, count in enumerate(padding.counts) if count > window]
        if not rows:
            return
        part = padding.select(rows)
        index = torch.tensor(rows, device=query.device)
        keys, values = keys[index], values[index]
        member = self._membership_of(keys, part, index, options)
        if member.group_size == 1:
            values = pick_heads(values, member.value_heads)
        clustered = attention(
            pick_heads(query[index], member.slot_heads),
            pick_heads(keys, member.key_heads),
            values,
            member,
            valid=part.valid,
            **options,
        )[0]
        behind = part.token_index(query.shape[2]) >= window  # [rows, Q]
        out[index] = torch.where(behind[:, :, None, None], clustered, out[index])

    def _membership_of(
        self, keys: Tensor, padding: Padding, rows: Tensor, options: dict[str, Any]
    ) -> Membership:
        """Memberships of the sequences ``rows``, whose windows are full, from stored K."""
        assert self._window_query is not None
        positions = padding.window_positions(self.plan.window)
        return self.plan.online_membership(
            self._window_query[rows], pick_tokens(keys, positions), **options
        )

    def _confirm(self, padding: Padding, options: dict[str, Any]) -> None:
        """Fix the membership and free K of other heads, if the windows are still full."""
        length = self.get_seq_length()
        if length < self._window_end or self._window_query is None:
            self._window_end = 0  # a crop cut into a window: it has to fill up again
            return
        assert self._keys.view is not None
        assert self._values.view is not None
        positions = padding.window_positions(self.plan.window)
        self._cluster(self._window_query, pick_tokens(self._keys.view, positions), padding, options)
        assert self.membership is not None
        self._keys.replace(pick_heads(self._keys.view, self.membership.key_heads))
        if self.membership.group_size == 1:
            order = self.membership.value_heads
            self._values.replace(pick_heads(self._values.view, order, axis=2))

    def _cluster(
        self, query: Tensor, key: Tensor, padding: Padding, options: dict[str, Any]
    ) -> None:
        """Set the membership from the tensors of the window; the probe is over."""
        self.membership = self.plan.online_membership(query, key, **options)
        self._window_end = padding.window_end(self.plan.window)
        self._window_query = None

    def _remember_queries(self, query: Tensor, positions: Tensor, past: int) -> None:
        """Keep the queries of the window's tokens: ``[B, H, W, D]``."""
        last = query.shape[2] - 1
        new = pick_tokens(query, (positions - past).clamp(0, last))
        if self._window_query is None:
            self._window_query = new
        else:
            old = (positions < past)[:, None, :, None]
            self._window_query = torch.where(old, self._window_query, new)

    def _full_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        valid: Tensor | None,
        options: dict[str, Any],
    ) -> Tensor:
        """Plain attention of all heads: ``[B, Q, H, Dv]``."""
        member = Membership.identity(
            self.plan.heads, self.plan.kv_heads, query.shape[0], query.device
        )
        return attention(query, key, value, member, valid=valid, **options)[0]


def pick_tokens(states: Tensor, positions: Tensor) -> Tensor:
    """``[B, H, S, D]`` and ``[B, W]`` to ``[B, H, W, D]``."""
    heads, dim = states.shape[1], states.shape[3]
    return states.gather(2, positions[:, None, :, None].expand(-1, heads, -1, dim))
