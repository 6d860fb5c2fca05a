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

    It holds the last ``recent`` tokens (more after a forward of several tokens, see ``spare``)
    and the first ``sinks`` real ones, without spare room.

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
        spare: int,
    ) -> NearKeys:
        """Take new tokens and return what their queries see with their own scores.

        Args:
            key: ``[B, G, Q, D]`` of the new tokens, all heads.
            kept: ``[B, kept, S, D]`` of the cache, new tokens included.
            value: ``[B, G, Q, Dv]`` of the new tokens, natural order.
            values: ``[B, G, S, Dv]`` of the cache, new tokens included.
            membership: whose order ``kept`` and ``values`` are in.
            padding: of all S tokens.
            spare: tokens before the last w that a crop may need.
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
            self.last = pick_heads(key[:, :, -(self.recent + spare) :], removed)
            return _with_first(key, value, sinks, padding)
        held = self._extend_last(pick_heads(key, removed), reach, spare)

        assert self.first is not None
        band = slice(past - reach, length)
        near = _with_first(kept, values, sinks, padding, band)
        own = torch.cat([self.first, held[:, :, -(reach + queries) :]], 2)
        return NearKeys(
            pick_heads(torch.cat([near.key, own], 1), membership.key_place),
            in_head_order(near.value, membership),
        )

    def step(self, key: Tensor, membership: Membership, padding: Padding) -> NearRing:
        """Take one new token, as `extend` does, for an attention that reads K where it stands.

        Args:
            key: ``[B, G, 1, D]`` of the new token, all heads.
            membership: the cache's.
            padding: of all tokens.
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
            self._extend_last(new, self.recent - 1, 0)
        assert self.first is not None
        begin = length - self.last.shape[2]
        return NearRing(self.last, self.first, positions, self.recent, begin)

    def cut(self, keys: Tensor, membership: Membership, padding: Padding, spare: int) -> None:
        """Start from ``keys [B, G, S, D]`` of all heads; ``padding`` may know later tokens."""
        if membership.kept_keys == membership.kv_heads:
            return
        removed = membership.removed_key_heads
        self.last = pick_heads(keys[:, :, -(self.recent + spare) :], removed)
        positions = padding.first_positions(min(self.sinks, padding.length))
        positions = positions.clamp_max(keys.shape[2] - 1)  # later tokens are still to come
        self.first = pick_heads(pick_tokens(keys, positions), removed)
        self._first_is_whole = False

    def crop(self, length: int, keep: int) -> None:
        """Go back from ``length`` tokens to ``keep``.

        Raises:
            CacheError: the last w tokens before the cut are not held any more.
        """
        if self.last is None:
            return
        left = self.last.shape[2] - (length - keep)
        if left < min(keep, self.recent - 1):
            raise CacheError(
                f"cannot crop to {keep} tokens: of {length} the last {self.last.shape[2]} hold the "
                f"K of all heads, and the exact recent window needs the {self.recent - 1} before "
                "the cut. Crop right after a forward of several tokens and by few, or reset the "
                "cache and run the prompt again"
            )
        self.last = self.last[:, :, : max(0, left)].clone()
        self._first_is_whole = False

    def select(self, rows: Tensor) -> None:
        """Keep the sequences ``rows`` of the batch."""
        if self.last is not None:
            self.last = self.last[rows]
        if self.first is not None:
            self.first = self.first[rows]

    def _extend_last(self, new: Tensor, reach: int, spare: int) -> Tensor:
        """Append ``new``; return it behind the old tokens, at least ``reach`` of them."""
        assert self.last is not None
        most = self.recent + spare
        old = min(self.last.shape[2], max(reach, most - new.shape[2]))
        held = torch.cat([self.last[:, :, self.last.shape[2] - old :], new], 2)
        self.last = held if held.shape[2] <= most else held[:, :, -most:].clone()
        return held

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
