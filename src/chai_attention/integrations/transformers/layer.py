"""One layer's cache: K of representatives, V of heads that see far keys, and attention over them.

A layer with an online membership is *waiting* while some sequence has fewer real tokens than the
probe window: K of all heads is kept, and the queries of the window are remembered. Every sequence
uses full attention for the tokens up to its window's end and its own membership after that, so
that a result never depends on the batch. With the forward that fills the last window the layer is
*clustered*: the membership is fixed, and K of all other heads, and V of streaming ones, is freed,
but for the last and the first tokens where the plan has an exact recent window.

Assisted decoding takes tokens back. transformers announces that (`activate_past_recording`), as
sliding-window layers need to know, too: from then on a clustered layer keeps what leads back into
its probe window, and K of the recent window until a `crop` has told which tokens stay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from chai_attention.errors import CacheError
from chai_attention.integrations.transformers.buffers import pick_heads, pick_tokens
from chai_attention.integrations.transformers.memory import LayerMemory, Probe
from chai_attention.integrations.transformers.padding import Padding
from chai_attention.integrations.transformers.recent import Pair
from chai_attention.membership import Membership
from chai_attention.ops import (
    AttentionCall,
    DenseKV,
    attention,
    decode_recent,
    windowed_attention,
)
from chai_attention.ops.local import LocalKeys

WITH_RINGS = ("cpu", "cuda")  # devices that decode over rings; others put local keys together


class ClusteredLayer(LayerMemory):
    """Cache layer of a full-attention layer; see the module's text for its states."""

    def attend(
        self, query: Tensor, padding: Padding, scale: float, softcap: float | None = None
    ) -> Tensor:
        """Store the K and V of the last `update` and attend with them.

        Args:
            query: ``[B, H, Q, D]`` of the new tokens, all heads.
            padding: which tokens, old and new, are real.
            scale: factor on the scores.
            softcap: as in `ops.reference.clustered_attention`.

        Returns:
            ``[B, Q, H, Dv]``.

        Raises:
            CacheError: other sequences than those held, or no update before.
        """
        if self._incoming is None:
            raise CacheError("attend() needs the K and V of an update() just before")
        states = (query, *self._incoming)
        self._incoming = None
        queries = query.shape[2]
        dtype, held = query.dtype, self._memory
        if self.get_seq_length() and self.batch_size != query.shape[0]:
            raise CacheError(
                f"this cache holds {self.batch_size} sequences, and this forward brings "
                f"{query.shape[0]}: use another cache, or call cache.batch_select_indices() or "
                "cache.batch_repeat_interleave() first"
            )
        self._check_padding(padding, queries)
        # autocast may be in force for some forwards and not for others: the wider dtype is kept
        wide = dtype if held is None else torch.promote_types(dtype, held.dtype)
        if held is not None and held.dtype != wide:
            self._change(lambda states: states.to(wide))
        query, key, value = (x.to(wide) for x in states)
        out = self._attend(query, key, value, padding, scale=scale, softcap=softcap)
        self._remember_padding(padding, queries)
        return out.to(dtype)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Padding, **options: Any
    ) -> Tensor:
        if not self.record_past:
            self._probe = None
        if self._values.data is None:
            # kernels read V of clusters token by token, the CPU and torch's attention by head
            self._values.transposed = not self.plan.shares or key.device.type == "cpu"
        if self.membership is None and not self.plan.needs_probe:
            self._use(self.plan.fixed_membership(key.shape[0], key.device))
        if self.membership is not None:
            return self._attend_clustered(query, key, value, padding, options)
        return self._attend_probing(query, key, value, padding, options)

    def _attend_clustered(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Padding, options: dict[str, Any]
    ) -> Tensor:
        """Append what the cache holds of K and V; attend by clusters."""
        assert self.membership is not None
        member = self.membership
        new_keys, new_values = stored_states(member, key, value)
        keys = self._keys.append(new_keys)
        values = self._values.append(new_values.transpose(1, 2)).transpose(1, 2)
        queries = query.shape[2]
        if self.plan.has_recent_window and queries == 1 and query.device.type in WITH_RINGS:
            ring = self._recent.step((key, value), member, padding, self.record_past)
            call = AttentionCall(member, offset=self._offset, **options)
            return decode_recent(query, DenseKV(keys, values, valid=padding.valid), ring, call)
        local, held = None, (keys, values)
        if self.plan.has_recent_window:
            local = self._recent.extend((key, value), held, member, padding, self.record_past)
        return self._attend_held(query, held, local, member, padding, options)

    def _attend_held(
        self, query: Tensor, held: Pair, local: LocalKeys | None, member: Membership,
        padding: Padding, options: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        """Attention over K and V as the cache holds them; local keys are all heads' own."""
        if local is None:
            query = slot_queries(member, query)
            return attention(query, *held, member, valid=padding.valid, **options)[0]
        tables = padding.window_tables(query.shape[2], self.plan.recent, self.plan.sinks)
        offset = self._offset if member is self.membership else self._offset_of(member)
        call = AttentionCall(member, offset=offset, **options)
        return windowed_attention(query, DenseKV(*held), local, tables, call)

    def _attend_probing(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Padding, options: dict[str, Any]
    ) -> Tensor:
        """Attend while windows fill up; cluster and free K when all are full."""
        plan = self.plan
        past, end = self.get_seq_length(), plan.probe_end
        is_full = min(padding.counts) >= end
        if is_full and past == 0:
            # the common case, a whole prompt at once: K of all heads is never stored
            # without padding, views: launching a few operations less counts in a short prompt
            positions = None if padding.valid is None else padding.first_positions(end)  # [B, E]
            q, k, v = (
                x[:, :, :end] if positions is None else pick_tokens(x, positions)
                for x in (query, key, value)
            )
            window = slice(plan.probe_start, end)
            window_query = q[:, :, window]
            self._cluster(window_query, k[:, :, window], v[:, :, window], padding, options)
            self._remember_past(window_query, key, value)
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
        if is_full:
            self._decide(padding, options)
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
        held, local = stored_states(member, keys, values), None
        if plan.has_recent_window:
            local = self._recent.local_keys((keys, values), part, queries)
        clustered = self._attend_held(query, held, local, member, part, options)
        behind = part.token_index(queries) >= plan.probe_end  # [rows, Q]
        out[index] = torch.where(behind[:, :, None, None], clustered, out[index])

    # ---- the membership

    def _window_positions(self, padding: Padding) -> Tensor:
        """``[B, W]``: where the probe windows' tokens stand."""
        return padding.first_positions(self.plan.probe_end)[:, self.plan.probe_start :]

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

    def _decide(self, padding: Padding, options: dict[str, Any]) -> None:
        """Fix the membership, now that every window is full, and free K of other heads."""
        keys, values, query = self.keys, self.values, self._window_query
        assert keys is not None
        assert values is not None
        assert query is not None
        positions = self._window_positions(padding)
        key, value = (pick_tokens(states, positions) for states in (keys, values))
        self._cluster(query, key, value, padding, options)
        self._remember_past(query, keys, values)
        assert self.membership is not None
        if self.plan.has_recent_window:
            self._recent.cut((keys, values), self.membership, padding, self.record_past)
        self._keys.replace(pick_heads(keys, self.membership.key_heads))
        if self.membership.reorders_values:
            order = self.membership.value_heads
            self._values.replace(pick_heads(values.transpose(1, 2), order, axis=2))

    def _remember_past(self, window_query: Tensor, keys: Tensor, values: Tensor) -> None:
        """Keep what leads back into the window that has just been clustered, if it is wanted."""
        if self.record_past and self.membership is not None:
            # copies, which do not hold the prompt's memory
            end, removed = self._window_end, self.membership.removed_value_heads
            value = pick_heads(values[:, :, :end], removed)
            self._probe = Probe(window_query.clone(), keys[:, :, :end].clone(), value)

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


def slot_queries(membership: Membership, query: Tensor) -> Tensor:
    """Q of representatives in slot order, ``[B, k, Q, D]``.

    Args:
        membership: of the layer.
        query: ``[B, H, Q, D]`` of all heads.
    """
    if query.shape[1] == membership.clusters:
        return query
    return pick_heads(query, membership.slot_heads)


def stored_states(membership: Membership, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """K and V as the cache holds them, ``[B, kept, Q, D]`` and ``[B, kept_values, Q, Dv]``.

    Args:
        membership: of the layer.
        key: ``[B, G, Q, D]`` of all heads.
        value: ``[B, G, Q, Dv]``.
    """
    # where V is reordered or left out, fewer K heads are kept than there are
    if key.shape[1] == membership.kept_keys:
        return key, value
    key = pick_heads(key, membership.key_heads)
    if membership.reorders_values:
        # token by token, as it lies in memory in front of attention and behind it
        tokens = pick_heads(value.transpose(1, 2), membership.value_heads, axis=2)
        value = tokens.transpose(1, 2)
    return key, value
