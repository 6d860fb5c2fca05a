"""One layer's cache: K of representatives, V of all heads, and the attention over them.

A layer with an online membership goes through three states:

*waiting*: some sequence has fewer real tokens than the probe window. K of all heads is kept and
the queries of the window are remembered. Every sequence uses full attention for the tokens up to
its window's end and its own membership after that, so that a result never depends on the batch.

*provisional*: every window is full, but so recently that an assisted decoding may still take
tokens back. It works as *waiting* does.

*clustered*: the membership is fixed. K of all other heads has been freed, but for the last and
the first tokens where the plan has an exact recent window.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from chai_attention.errors import CacheError
from chai_attention.integrations.transformers.buffers import (
    TokenBuffer,
    pick_heads,
    pick_tokens,
)
from chai_attention.integrations.transformers.padding import Padding
from chai_attention.integrations.transformers.plan import (
    LayerPlan,
    slot_queries,
    stored_states,
)
from chai_attention.integrations.transformers.recent import RecentKeys, near_keys
from chai_attention.membership import Membership
from chai_attention.ops import attention, fused, windowed
from chai_attention.ops.ring import decode_recent

# A forward of several tokens that ends this close behind the window may hold draft tokens, which
# assisted decoding takes back: K of all heads is then kept until the next forward. For the same
# reason any forward of several tokens makes a recent window longer by so much until the next.
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
        self._offset: Tensor | None = None  # [B, H], of the membership
        self._recent = RecentKeys(self.plan.recent, self.plan.sinks)
        self._keys = TokenBuffer(token_axis=2)  # [B, kept or G, S, D]
        self._values = TokenBuffer(token_axis=1)  # [B, S, G, Dv]
        self._window_query: Tensor | None = None  # [B, H, W, D], waiting and provisional
        self._window_end = 0  # a crop must leave at least this many tokens
        self._incoming = None

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-n`` tokens; a positive n keeps n, as older transformers meant it.

        Raises:
            CacheError: the crop would cut into the probe window of a clustered layer, whose
                other heads' K is gone, or take more than an exact recent window remembers.
        """
        length = self.get_seq_length()
        keep = tokens_to_remove if tokens_to_remove > 0 else length + tokens_to_remove
        if keep >= length:
            return
        if keep <= 0:
            self.reset()
            return
        self.check_window(keep)
        self._recent.crop(length, keep)
        self._keys.length = self._values.length = keep

    def check_window(self, keep: int) -> None:
        """Refuse to go back to ``keep`` tokens, if they end in the window of a clustered layer."""
        if self.membership is not None and keep < self._window_end:
            raise CacheError(
                f"cannot crop to {keep} tokens: the heads were clustered on the first "
                f"{self._window_end}, and K of the other heads has been freed. Reset the cache "
                "and run the prompt again, or use a static membership"
            )

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
        self._recent.select(rows)
        if self._window_query is not None:
            self._window_query = self._window_query[rows]
        if self.membership is not None:
            self._use(self.membership.select(rows))

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
        held = {
            "key": self._keys.data,
            "value": self._values.data,
            "probe": self._window_query,
            "recent": self._recent.last,
            "sink": self._recent.first,
        }
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
        if self._values.data is None:
            # V of clusters is read best token-major; torch's fused attention reads it head-major
            by_head = self.plan.is_identity or fused.can_run(query, key, value, softcap)
            self._values.transposed = by_head
        if self.membership is None and not self.plan.needs_probe:
            self._use(self.plan.fixed_membership(key.shape[0], key.device))
        if self.membership is None and self._window_end:
            self._confirm(padding, query.shape[2], options)
        if self.membership is not None:
            return self._attend_clustered(query, key, value, padding, options)
        return self._attend_probing(query, key, value, padding, options)

    def _attend_clustered(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Padding, options: dict[str, Any]
    ) -> Tensor:
        """Append K of representatives and V of all heads; attend by clusters."""
        assert self.membership is not None
        member = self.membership
        new_keys, new_values = stored_states(member, key, value)
        keys = self._keys.append(new_keys)
        values = self._values.append(new_values.transpose(1, 2)).transpose(1, 2)
        queries = query.shape[2]
        if self.plan.has_recent_window and queries == 1 and query.is_cuda:
            ring = self._recent.step(key, member, padding)
            return decode_recent(
                query, keys, values, member, ring, offset=self._offset, valid=padding.valid,
                **options,
            )  # fmt: skip
        if self.plan.has_recent_window:
            near = self._recent.extend(key, keys, value, values, member, padding, _spare(queries))
            tables = padding.window_tables(queries, self.plan.recent, self.plan.sinks)
            return windowed.attention(
                query, keys, values, member, near, tables, offset=self._offset, **options
            )
        query = slot_queries(member, query)
        return attention(query, keys, values, member, valid=padding.valid, **options)[0]

    def _attend_probing(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Padding, options: dict[str, Any]
    ) -> Tensor:
        """Attend while windows fill up; cluster and free K when all are full."""
        plan = self.plan
        past, queries, end = self.get_seq_length(), query.shape[2], plan.probe_end
        fewest = min(padding.counts)
        draft = queries > 1 and fewest < end + DRAFT_TOKENS
        if fewest >= end and not draft and past == 0:
            # the common case, a whole prompt at once: K of all heads is never stored
            # without padding, views: launching a few operations less counts in a short prompt
            positions = None if padding.valid is None else padding.first_positions(end)  # [B, E]
            q, k, v = (
                x[:, :, :end] if positions is None else pick_tokens(x, positions)
                for x in (query, key, value)
            )
            window = slice(plan.probe_start, end)
            self._cluster(q[:, :, window], k[:, :, window], v[:, :, window], padding, options)
            out = self._attend_clustered(query, key, value, padding, options)
            exact = self._full_attention(q, k, v, None, options)  # [B, E, H, Dv]
            if positions is None:
                out[:, :end] = exact
                return out
            return out.scatter_(1, positions[:, :, None, None].expand_as(exact), exact)

        self._remember_queries(query, self._window_positions(padding), past)
        keys = self._keys.append(key)
        values = self._values.append(value.transpose(1, 2)).transpose(1, 2)
        out = self._full_attention(query, keys, values, padding.valid, options)
        self._attend_after_window(out, query, keys, values, padding, options)
        if fewest >= end:
            self._window_end = padding.window_end(end)
            if not draft:
                self._confirm(padding, queries, options)
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
        plan, queries = self.plan, query.shape[2]
        rows = [row for row, count in enumerate(padding.counts) if count > plan.probe_end]
        if not rows:
            return
        part = padding.select(rows)
        index = torch.tensor(rows, device=query.device)
        query, keys, values = query[index], keys[index], values[index]
        member = self._membership_of(index, keys, values, part, options)
        stored, ordered = stored_states(member, keys, values)
        if plan.has_recent_window:
            near = near_keys(keys, values, part, queries, plan.recent, plan.sinks)
            tables = part.window_tables(queries, plan.recent, plan.sinks)
            options = {**options, "near": near, "tables": tables, "offset": self._offset_of(member)}
            clustered = windowed.attention(query, stored, ordered, member, **options)
        else:
            query = slot_queries(member, query)
            clustered = attention(query, stored, ordered, member, valid=part.valid, **options)[0]
        behind = part.token_index(queries) >= plan.probe_end  # [rows, Q]
        out[index] = torch.where(behind[:, :, None, None], clustered, out[index])

    # ---- the membership

    def _use(self, membership: Membership) -> None:
        """Set the membership and what follows from it."""
        self.membership = membership
        self._offset = self._offset_of(membership)

    def _offset_of(self, membership: Membership) -> Tensor | None:
        """``[B, H]`` offsets of the far keys' log-sum-exp, None for zeros."""
        table = self.plan.offset_table(membership.representatives.device)
        if table is None or not self.plan.has_recent_window:
            return None
        return windowed.head_offsets(table, membership)

    def _window_positions(self, padding: Padding) -> Tensor:
        """``[B, W]``: where the probe windows' tokens stand."""
        return padding.window_positions(self.plan.probe_start, self.plan.window)

    def _membership_of(
        self, rows: Tensor, keys: Tensor, values: Tensor, padding: Padding, options: dict[str, Any]
    ) -> Membership:
        """Memberships of the sequences ``rows``, whose windows are full, from their K and V."""
        assert self._window_query is not None
        positions = self._window_positions(padding)
        return self.plan.online_membership(
            self._window_query[rows],
            pick_tokens(keys, positions),
            pick_tokens(values, positions),
            **options,
        )

    def _confirm(self, padding: Padding, queries: int, options: dict[str, Any]) -> None:
        """Fix the membership and free K of other heads, if the windows are still full.

        ``queries`` are the tokens of the forward that is under way.
        """
        length = self.get_seq_length()
        if length < self._window_end or self._window_query is None:
            self._window_end = 0  # a crop cut into a window: it has to fill up again
            return
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        positions = self._window_positions(padding)
        key, value = (pick_tokens(states, positions) for states in (keys, values))
        self._cluster(self._window_query, key, value, padding, options)
        assert self.membership is not None
        if self.plan.has_recent_window:
            self._recent.cut(keys, self.membership, padding, _spare(queries))
        self._keys.replace(pick_heads(keys, self.membership.key_heads))
        if self.membership.group_size == 1:
            order = self.membership.value_heads
            self._values.replace(pick_heads(values.transpose(1, 2), order, axis=2))

    def _cluster(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Padding, options: dict[str, Any]
    ) -> None:
        """Set the membership from the tensors of the window; the probe is over."""
        self._use(self.plan.online_membership(query, key, value, **options))
        self._window_end = padding.window_end(self.plan.probe_end)
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


def _spare(queries: int) -> int:
    """Tokens before the window's that a crop after a forward of ``queries`` tokens may need."""
    return DRAFT_TOKENS if queries > 1 else 0
