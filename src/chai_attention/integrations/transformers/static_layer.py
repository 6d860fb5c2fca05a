"""One layer of a static cache: memory of fixed size, decode steps of fixed shapes.

While an online membership waits for its probe window to fill up, the layer works as a
`ClusteredLayer`, with K of all heads in memory that grows. With the membership, all of it moves
into the static memory, where it stays.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from chai_attention.clustering.assign import K_BYTES
from chai_attention.errors import CacheError
from chai_attention.integrations.transformers.buffers import TokenBuffer
from chai_attention.integrations.transformers.layer import ClusteredLayer, slot_queries
from chai_attention.integrations.transformers.memory import STOPPED, Probe
from chai_attention.integrations.transformers.modes import lasting
from chai_attention.integrations.transformers.padding import Padding
from chai_attention.integrations.transformers.recent import LOCAL, RecentWindow
from chai_attention.integrations.transformers.static_tokens import StaticTokens
from chai_attention.membership import Membership
from chai_attention.ops import (
    AttentionCall,
    DenseKV,
    attention,
    decode_recent,
)
from chai_attention.ops.cache_write import write_dense
from chai_attention.ops.rolling_buffer import RollingBuffer
from chai_attention.runtime.plan import LayerPlan


class StaticClusteredLayer(ClusteredLayer):
    """Cache layer with room for a fixed number of tokens.

    Args:
        plan: of the layer.
        tokens: of the cache, advanced by the first layer of a forward. A layer on another device
            than the first uses the tables there.
    """

    is_compileable = True  # generate() asks the model for a fast decode step then
    value_axis = 1
    is_croppable = False  # not always, see `check_crop`

    def __init__(self, plan: LayerPlan, tokens: StaticTokens):
        self.tokens = tokens
        self._seen = 0  # tokens that this layer has taken
        self._local: RollingBuffer | None = None
        self._one_row: Membership | None = None  # of a fixed membership, for writing
        super().__init__(plan)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the memory for sequences like these, ``[B, G or kept, any, D]``."""
        with lasting():
            self._allocate(key_states, value_states)
        super().lazy_initialization(key_states, value_states)

    def _allocate(self, key_states: Tensor, value_states: Tensor) -> None:
        plan, capacity = self.plan, self.tokens.capacity
        batch, _, _, dim = key_states.shape
        kept, kept_values, value_dim = kept_keys(plan), plan.kept_values, value_states.shape[3]
        self.tokens = self.tokens.at(key_states.device)
        self.tokens.allocate(batch, key_states.device)
        self._key = key_states.new_empty(batch, kept, capacity, dim)
        # V of clusters is read best token by token, of single heads head by head
        shape = (capacity, kept_values) if plan.shares else (kept_values, capacity)
        value = value_states.new_empty(batch, *shape, value_dim)
        self._value = value.transpose(1, 2) if plan.shares else value  # [B, kept, S, Dv]
        if plan.has_recent_window:
            size, sinks = min(plan.recent, capacity), self.tokens.sinks

            def memories(states: Tensor, removed: int) -> tuple[Tensor, Tensor]:
                shape = (batch, removed, size + sinks, states.shape[3])
                ring, first = states.new_zeros(shape).split([size, sinks], 2)
                return ring.contiguous(), first.contiguous()

            self._local = RollingBuffer(
                *memories(key_states, plan.kv_heads - kept),
                self.tokens.sink_positions, plan.recent,
            )  # fmt: skip
            if kept_values < plan.kv_heads:
                ring, first = memories(value_states, plan.kv_heads - kept_values)
                self._local = replace(self._local, value_ring=ring, value_sinks=first)

    def begin(self, queries: int) -> Padding:
        """Join a forward of ``queries`` new tokens; the padding of all tokens.

        Raises:
            CacheError: no room, another batch, K and V of a wider dtype than the memory's, or an
                earlier forward that stopped midway.
        """
        if self._incoming is None:
            raise CacheError("attend() needs the K and V of an update() just before")
        key, tokens = self._incoming[0], self.tokens
        try:
            tokens.allocate(key.shape[0], key.device)
            if torch.promote_types(key.dtype, self._key.dtype) != self._key.dtype:
                raise CacheError(
                    f"this static cache holds {self._key.dtype}, and this forward runs in "
                    f"{key.dtype}: use it inside torch.autocast only, or make another one"
                )
            if self._seen == tokens.count:
                tokens.advance(queries)
            if self._seen + queries != tokens.count:
                raise CacheError(STOPPED)
        except CacheError:
            self._incoming = None  # refused, so the next forward may come
            raise
        self._seen = tokens.count
        return tokens.padding

    # ---- what is held

    @property
    def is_waiting(self) -> bool:
        """Whether the membership is still to be decided."""
        return self.plan.needs_probe and self.membership is None

    @property
    def keys(self) -> Tensor | None:
        """``[B, kept, S, D]``: K in the order of ``membership.key_heads``."""
        if self.is_waiting or not self.is_initialized:
            return super().keys
        return self._key[:, :, : self._seen]

    @property
    def values(self) -> Tensor | None:
        """``[B, kept_values, S, Dv]``: V in the order of ``membership.value_heads``."""
        if self.is_waiting or not self.is_initialized:
            return super().values
        return self._value[:, :, : self._seen]

    @property
    def _memory(self) -> Tensor | None:
        """What K and V are held in, which stays as it is."""
        return self._value if self.is_initialized else None

    @property
    def batch_size(self) -> int:
        """Sequences there is room for, 0 before the first."""
        return self.tokens.batch

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor this layer holds, by what it is: its whole memory."""
        waiting = {f"waiting {name}": held for name, held in super().tensors().items()}
        if not self.is_initialized:
            return waiting
        local = dict(zip(LOCAL, chain(*self._rings), strict=False))
        return {"key": self._key, "value": self._value, **local, **waiting}

    @property
    def _rings(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Ring and sinks of K, and of V where V heads stream; none where no K is removed."""
        local = self._local
        return () if local is None or not local.ring.shape[1] else local.memories

    def get_seq_length(self) -> int:
        """Tokens held, padding included."""
        return super().get_seq_length() if self.is_waiting else self._seen

    def get_max_length(self) -> int:
        """Tokens there is room for."""
        return self.tokens.capacity

    def reset(self) -> None:
        """Forget all tokens; a membership that does not depend on them stays."""
        membership, offset = getattr(self, "membership", None), getattr(self, "_offset", None)
        super().reset()
        self._seen = 0
        if not self.plan.needs_probe:
            self.membership, self._offset = membership, offset

    def crop(self, tokens_to_remove: int) -> None:
        """Not for a single layer: `StaticClusteredCache.crop` crops all."""
        raise CacheError("crop the whole static cache: cache.crop(n)")

    def check_crop(self, keep: int) -> None:
        """Refuse a crop to ``keep`` tokens that would need K that is gone.

        Raises:
            CacheError: says what is missing.
        """
        super().check_crop(keep)
        if self.membership is None or not self._rings or keep < self._window_end:
            return  # K of all heads is there
        held = self._rings[0][0].shape[2]
        if max(0, keep - self.plan.recent + 1) < self._seen - held:
            raise CacheError(
                f"cannot crop to {keep} tokens: of {self._seen}, a static cache with an exact "
                f"recent window holds the K of all heads for the last {held} only. "
                "Use ClusteredCache for assisted decoding, or reset and run the prompt again"
            )

    def activate_past_recording(self) -> None:
        """Keep what a `crop` needs that takes back tokens of the next forwards.

        Raises:
            CacheError: the ring of an exact recent window cannot, its size is fixed.
        """
        plan = self.plan
        removes = kept_keys(plan) < plan.kv_heads
        if plan.has_recent_window and removes and plan.recent < self.tokens.capacity:
            raise CacheError(
                "a static cache with an exact recent window cannot take tokens back: use "
                "ClusteredCache for assisted decoding, or leave out past_key_values"
            )
        super().activate_past_recording()

    def rewind(self, keep: int) -> None:
        """Hold ``keep`` tokens only; the next ones overwrite what was behind them."""
        if self._probe is not None and keep < self._window_end:
            self._wait_again(keep)
        elif self.is_waiting:
            self._keys.length = self._values.length = keep
        self._crop_padding(keep)
        self._seen = keep

    def _repair(self) -> None:
        """Nothing: the number of tokens tells of forwards that stopped midway."""

    def batch_select_indices(self, indices: Tensor) -> None:
        """Put the sequences ``indices [B]`` in the place of all.

        Raises:
            CacheError: more or fewer than there is room for.
        """
        if not self._seen:
            return
        rows = indices.to(self.device)
        if rows.shape[0] != self.tokens.batch or rows.dtype == torch.bool:
            raise CacheError(
                f"a static cache holds {self.tokens.batch} sequences, no more and no fewer: use "
                "ClusteredCache to keep some of a batch"
            )
        if self.is_waiting:
            super().batch_select_indices(rows)
            return
        for memory in (self._key, self._value):
            used = memory[:, :, : self._seen]
            used.copy_(used[rows])
        for memory in chain(*self._rings):
            memory.copy_(memory[rows])
        self._select_padding(rows)
        if self._probe is not None:
            self._probe = Probe(*(states[rows] for states in self._probe))
        if self.plan.needs_probe and self.membership is not None:
            self._use(self.membership.select(rows))

    @property
    def _keeps_sinks(self) -> bool:
        """Whether the first tokens of removed heads are held."""
        return bool(self._rings)

    def _reads_mask(self, queries: int) -> bool:
        """Not of a single token, whose mask stays on the device."""
        return queries > 1 or self.is_waiting

    # ---- attention

    def _attend_clustered(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Padding, options: dict[str, Any]
    ) -> Tensor:
        """Write K of representatives and V of all heads; attend by clusters."""
        assert self.membership is not None
        member, queries = self.membership, query.shape[2]
        if queries == 1:
            return self._step(query, key, value, options)
        past = self.tokens.count - queries
        recent = self._recent_before(past) if self._local is not None else None
        self._write(key, value)
        keys, values = self._key[:, :, : past + queries], self._value[:, :, : past + queries]
        local, held = None, (keys, values)
        if recent is not None:
            local = recent.extend((key, value), held, member, padding, record=False)
        return self._attend_held(query, held, local, member, padding, options)

    def _step(self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
        """One new token: shapes never change, and nothing is read on the host."""
        assert self.membership is not None
        self._write(key, value)
        kv = DenseKV(self._key, self._value, self.tokens.lengths, self.tokens.valid)
        if self._local is not None:
            call = AttentionCall(self.membership, offset=self._offset, **options)
            return decode_recent(query, kv, self._local, call)
        query = slot_queries(self.membership, query)
        options = {"lengths": kv.lengths, "valid": kv.valid, **options}
        return attention(query, kv.key, kv.value, self.membership, **options)[0]

    def _write(self, key: Tensor, value: Tensor) -> None:
        """Write new tokens."""
        member = self._one_row or self.membership
        assert member is not None
        write_dense(
            key, value, self._key, self._value, member, self.tokens.start, self._local,
        )  # fmt: skip

    def _recent_before(self, past: int) -> RecentWindow:
        """The recent window of ``past`` tokens, copied: the ring is about to be overwritten."""
        recent = RecentWindow(self.plan.recent, self.plan.sinks)
        for states, (ring, sinks) in zip(recent.kinds, self._rings if past else (), strict=False):
            size = ring.shape[2]
            held = torch.arange(max(0, past - size), past, device=ring.device)
            states.last, states.first = ring[:, :, held % size], sinks
        return recent

    # ---- the membership

    def _use(self, membership: Membership) -> None:
        """Set the membership, with as many kept K heads as there is room for."""
        kept = self._key.shape[1]
        if membership.kept_keys != kept:
            membership = replace(membership, kept_keys=kept)
        super()._use(membership)
        if not self.plan.needs_probe:
            self._one_row = self.plan.fixed_membership(1, membership.representatives.device)

    def _decide(self, padding: Padding, options: dict[str, Any]) -> None:
        """Fix the membership, and move to the static memory."""
        super()._decide(padding, options)
        keys, values = self._keys.view, self._values.view
        assert keys is not None
        assert values is not None
        length = keys.shape[2]
        self._key[:, :, :length].copy_(keys)
        self._value[:, :, :length].copy_(values.transpose(1, 2))
        for states, (ring, sinks) in zip(self._recent.kinds, self._rings, strict=False):
            assert states.last is not None
            assert states.first is not None
            size = ring.shape[2]
            last, first = states.last[:, :, -size:], states.first
            held = torch.arange(length - last.shape[2], length, device=last.device)
            ring[:, :, held % size] = last
            sinks[:, :, : first.shape[2]].copy_(first)
        self._keys, self._values = TokenBuffer(token_axis=2), TokenBuffer(token_axis=1)
        self._recent = RecentWindow(self.plan.recent, self.plan.sinks)


def kept_keys(plan: LayerPlan) -> int:
    """K heads that a layer holds whatever the tokens are.

    An online membership of grouped-query attention by scores may need fewer: at most as many as
    it has clusters.
    """
    if not plan.needs_probe:
        return plan.fixed_membership(1, torch.device("cpu")).kept_keys
    if plan.target == K_BYTES:
        return plan.clusters * plan.kv_heads // plan.heads
    return min(plan.clusters, plan.kept_values)
