"""K that a clustered layer keeps of the heads it removed: the last tokens and the first ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from chai_attention.errors import CacheError
from chai_attention.integrations.transformers.buffers import pick_heads, pick_tokens
from chai_attention.integrations.transformers.padding import Padding
from chai_attention.membership import Membership
from chai_attention.ops.near import NearKeys
from chai_attention.ops.ring import NearRing


class RecentKeys:
    """The exact recent window of one layer's cache.

    It holds the last ``recent`` tokens (all since the last crop where the past is recorded) and
    the first ``sinks`` real ones, without spare room.

    Args:
        recent: w.
        sinks: s.
    """

    def __init__(self, recent: int, sinks: int):
        self.recent = recent
        self.sinks = sinks
        self.last: Tensor | None = None  # [B, G - kept, w or fewer, D]
        self.first: Tensor | None = None  # [B, G - kept, s or fewer, D]
        self._first_is_whole = False  # s real tokens of every sequence are held

    def extend(
        self,
        key: Tensor,
        kept: Tensor,
        value: Tensor,
        values: Tensor,
        membership: Membership,
        padding: Padding,
        record: bool,
    ) -> NearKeys:
        """Take new tokens and return what their queries see with their own scores.

        Args:
            key: ``[B, G, Q, D]`` of the new tokens, all heads.
            kept: ``[B, kept, S, D]`` of the cache, new tokens included.
            value: ``[B, G, Q, Dv]`` of the new tokens, natural order.
            values: ``[B, G, S, Dv]`` of the cache, new tokens included.
            membership: whose order ``kept`` and ``values`` are in.
            padding: of all S tokens.
            record: whether to keep all tokens for a crop.
        """
        queries, length = key.shape[2], kept.shape[2]
        if membership.kept_keys == membership.kv_heads:  # nothing is removed, so nothing is missing
            return near_keys(kept, values, padding, queries, self.recent, self.sinks)
        past = length - queries
        reach = min(past, self.recent - 1)  # old tokens that the first new one sees
        removed = membership.removed_key_heads
        sinks = min(self.sinks, length)
        self._extend_first(key, removed, sinks, past, padding)
        if not past:
            self.last = pick_heads(key if record else key[:, :, -self.recent :], removed)
            return _with_first(key, value, sinks, padding)
        held = self._extend_last(pick_heads(key, removed), reach, record)

        assert self.first is not None
        band = slice(past - reach, length)
        near = _with_first(kept, values, sinks, padding, band)
        own = torch.cat([self.first, held[:, :, -(reach + queries) :]], 2)
        return NearKeys(
            pick_heads(torch.cat([near.key, own], 1), membership.key_place),
            in_head_order(near.value, membership),
        )

    def step(self, key: Tensor, membership: Membership, padding: Padding, record: bool) -> NearRing:
        """Take one new token, as `extend` does, for an attention that reads K where it stands.

        Args:
            key: ``[B, G, 1, D]`` of the new token, all heads.
            membership: the cache's.
            padding: of all tokens.
            record: whether to keep all tokens for a crop.
        """
        length = padding.length
        sinks = min(self.sinks, length)
        removed = membership.removed_key_heads
        positions = padding.first_positions(sinks).int()
        if membership.kept_keys == membership.kv_heads:
            nothing = key[:, :0]
            return NearRing(nothing, nothing.expand(-1, -1, sinks, -1), positions, self.recent)
        self._extend_first(key, removed, sinks, length - 1, padding)
        new = pick_heads(key, removed)
        if self.last is None:
            self.last = new
        else:
            self._extend_last(new, self.recent - 1, record)
        assert self.first is not None
        ring = self.last[:, :, -self.recent :].contiguous()
        return NearRing(ring, self.first, positions, self.recent, length - ring.shape[2])

    def cut(self, keys: Tensor, membership: Membership, padding: Padding, record: bool) -> None:
        """Start from ``keys [B, G, S, D]`` of all heads; ``padding`` may know later tokens."""
        if membership.kept_keys == membership.kv_heads:
            return
        removed = membership.removed_key_heads
        self.last = pick_heads(keys if record else keys[:, :, -self.recent :], removed)
        positions = padding.first_positions(min(self.sinks, padding.length))
        positions = positions.clamp_max(keys.shape[2] - 1)  # later tokens are still to come
        self.first = pick_heads(pick_tokens(keys, positions), removed)
        self._first_is_whole = False

    def check_crop(self, length: int, keep: int) -> None:
        """Refuse to go back from ``length`` tokens to ``keep``, if K that is needed is gone.

        Raises:
            CacheError: the last w tokens before the cut are not held any more.
        """
        if self.last is None:
            return
        if self.last.shape[2] - (length - keep) < min(keep, self.recent - 1):
            raise CacheError(
                f"cannot crop to {keep} tokens: of {length} the last {self.last.shape[2]} hold the "
                f"K of all heads, and the exact recent window needs the {self.recent - 1} before "
                "the cut. Call cache.activate_past_recording() before the forward that is to be "
                "taken back, or reset the cache and run the prompt again"
            )

    def crop(self, length: int, keep: int) -> None:
        """Go back from ``length`` tokens to ``keep``, which `check_crop` has allowed."""
        if self.last is None:
            return
        left = max(0, self.last.shape[2] - (length - keep))
        self.last = self.last[:, :, max(0, left - self.recent) : left].clone()
        self._first_is_whole = False

    def cast(self, dtype: torch.dtype) -> None:
        """Hold the same K in another dtype."""
        if self.last is not None:
            self.last = self.last.to(dtype)
        if self.first is not None:
            self.first = self.first.to(dtype)

    def select(self, rows: Tensor) -> None:
        """Keep the sequences ``rows`` of the batch."""
        if self.last is not None:
            self.last = self.last[rows]
        if self.first is not None:
            self.first = self.first[rows]

    def _extend_last(self, new: Tensor, reach: int, record: bool) -> Tensor:
        """Append ``new``; return it behind the old tokens, at least ``reach`` of them."""
        assert self.last is not None
        held = self.last.shape[2]
        old = held if record else min(held, max(reach, self.recent - new.shape[2]))
        joined = torch.cat([self.last[:, :, held - old :], new], 2)
        most = joined.shape[2] if record else self.recent
        self.last = joined if joined.shape[2] <= most else joined[:, :, -most:].clone()
        return joined

    def _extend_first(
        self, key: Tensor, removed: Tensor, sinks: int, past: int, padding: Padding
    ) -> None:
        """Take those of the first ``sinks`` real tokens that are among the new ones."""
        if self._first_is_whole:
            return
        positions = padding.first_positions(sinks)
        last = key.shape[2] - 1
        new = pick_heads(pick_tokens(key, (positions - past).clamp(0, last)), removed)
        if self.first is not None:
            old = self.first[:, :, : new.shape[2]]
            old = F.pad(old, (0, 0, 0, new.shape[2] - old.shape[2]))
            new = torch.where((positions < past)[:, None, :, None], old, new)
        self.first = new
        self._first_is_whole = min(padding.counts) >= self.sinks


def near_keys(
    keys: Tensor, values: Tensor, padding: Padding, queries: int, recent: int, sinks: int
) -> NearKeys:
    """What the last ``queries`` tokens see exactly, from K and V of all heads in their order.

    Args:
        keys: ``[B, G, S, D]``.
        values: ``[B, G, S, Dv]``.
        padding: of the S tokens.
        queries: Q.
        recent: w.
        sinks: s.
    """
    length = keys.shape[2]
    band = slice(max(0, length - queries - recent + 1), length)
    return _with_first(keys, values, min(sinks, length), padding, band)


def _with_first(
    keys: Tensor,
    values: Tensor,
    sinks: int,
    padding: Padding,
    band: slice = slice(None),
) -> NearKeys:
    """The first ``sinks`` real tokens and then those of ``band``."""
    joined = []
    for states in (keys, values):
        first = states[:, :, :sinks]
        if padding.valid is not None:
            first = pick_tokens(states, padding.first_positions(sinks))
        joined.append(torch.cat([first, states[:, :, band]], 2))
    return NearKeys(*joined)


def in_head_order(values: Tensor, membership: Membership) -> Tensor:
    """V of the cache, ``[B, G, n, Dv]``, in the natural order of heads."""
    if membership.group_size > 1:
        return values
    return pick_heads(values, membership.value_slot)
