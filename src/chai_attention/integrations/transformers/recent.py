"""What a clustered layer keeps of the heads it removed: the last tokens and the first ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from chai_attention.errors import CacheError
from chai_attention.integrations.transformers.buffers import pick_heads, pick_tokens
from chai_attention.integrations.transformers.modes import lasting
from chai_attention.integrations.transformers.padding import Padding
from chai_attention.membership import Membership
from chai_attention.ops.local import LocalKeys
from chai_attention.ops.rolling_buffer import RollingBuffer

Pair = tuple[Tensor, Tensor]  # K and V, ``[B, heads, tokens, D]`` and ``[.., Dv]``
# a layer's local memories: of K, of V
LOCAL = ("recent", "sink", "recent value", "sink value")


class RecentStates:
    """K, or V, of removed heads: the last tokens of each sequence and its first real ones.

    Args:
        recent: w.
        sinks: s.

    Attributes:
        last: ``[B, removed, w or fewer, D]``, without spare room, more where the past is recorded;
            None before the first tokens.
        first: ``[B, removed, s or fewer, D]``.
    """

    def __init__(self, recent: int, sinks: int):
        self.recent = recent
        self.sinks = sinks
        self.last: Tensor | None = None
        self.first: Tensor | None = None
        self.begin = 0  # where the oldest of the last tokens stands: in a ring while decoding
        self._is_ring = False  # memory of their own, which any forward may write to
        self._first_is_whole = False  # s real tokens of every sequence are held

    def push(self, new: Tensor, padding: Padding, record: bool) -> Tensor:
        """Append one token ``[B, removed, 1, D]`` to a ring, which decoding reads in place.

        Returns:
            ``[B, removed, w or fewer, D]``, the oldest at the place ``begin``.
        """
        if record or self.last is None or self.last.shape[2] != self.recent:
            self.extend(new, self.recent - 1, padding, record)
            assert self.last is not None
            return self.last[:, :, -self.recent :].contiguous()
        self._extend_first(new, padding)
        if not self._is_ring:
            with lasting():
                self.last = self.last.clone()
            self._is_ring = True
        self.last[:, :, self.begin : self.begin + 1] = new
        self.begin = (self.begin + 1) % self.recent
        return self.last

    def _in_order(self) -> None:
        """Put the oldest token first again, in memory that is not written to any more."""
        if self.last is not None and self.begin:
            self.last = self.last.roll(-self.begin, 2)
        self.begin, self._is_ring = 0, False

    def extend(self, new: Tensor, reach: int, padding: Padding, record: bool) -> Tensor:
        """Append tokens.

        Args:
            new: ``[B, removed, Q, D]``.
            reach: old tokens that are asked for.
            padding: of all tokens, new ones included.
            record: hold all tokens, for a crop.

        Returns:
            ``[B, removed, n + Q, D]``: at least ``reach`` old tokens, if they are held, and all
            new ones.
        """
        self._in_order()
        self._extend_first(new, padding)
        if self.last is None:
            self.last = new if record else new[:, :, -self.recent :].clone()
            return new
        held = self.last.shape[2]
        old = held if record else min(held, max(reach, self.recent - new.shape[2]))
        joined = torch.cat([self.last[:, :, held - old :], new], 2)
        most = joined.shape[2] if record else self.recent
        self.last = joined if joined.shape[2] <= most else joined[:, :, -most:].clone()
        return joined

    def cut(self, states: Tensor, padding: Padding, record: bool) -> None:
        """Start from ``states [B, removed, S, D]``; ``padding`` may know later tokens."""
        self.begin, self._is_ring = 0, False
        self.last = states if record else states[:, :, -self.recent :].clone()
        positions = padding.first_positions(min(self.sinks, padding.length))
        positions = positions.clamp_max(states.shape[2] - 1)  # later tokens are still to come
        self.first = pick_tokens(states, positions)
        self._first_is_whole = False

    def crop(self, tokens: int, trim: bool) -> None:
        """Forget the last ``tokens``, and with ``trim`` what the window does not need."""
        self._in_order()
        if self.last is None:
            return
        left = max(0, self.last.shape[2] - tokens)
        begin = max(0, left - self.recent) if trim else 0
        self.last = self.last[:, :, begin:left].clone()
        self._first_is_whole = False

    def change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Hold ``change(states)``: some sequences of the batch, or another dtype."""
        self._in_order()
        self.last = None if self.last is None else change(self.last)
        self.first = None if self.first is None else change(self.first)

    def _extend_first(self, new: Tensor, padding: Padding) -> None:
        """Take those of the first real tokens that are among the new ones."""
        if self._first_is_whole:
            return
        past = padding.length - new.shape[2]
        positions = padding.first_positions(min(self.sinks, padding.length))
        found = pick_tokens(new, (positions - past).clamp(0, new.shape[2] - 1))
        if self.first is not None:
            old = self.first[:, :, : found.shape[2]]
            old = F.pad(old, (0, 0, 0, found.shape[2] - old.shape[2]))
            found = torch.where((positions < past)[:, None, :, None], old, found)
        self.first = found
        self._first_is_whole = min(padding.counts) >= self.sinks


class RecentWindow:
    """The exact recent window of one layer's cache.

    It holds the last ``recent`` tokens (all since the last crop where the past is recorded) and
    the first ``sinks`` real ones: K of all heads that the K cache does not hold, and V of those
    that the V cache does not.

    Args:
        recent: w.
        sinks: s.
    """

    def __init__(self, recent: int, sinks: int):
        self.recent = recent
        self.sinks = sinks
        self.key = RecentStates(recent, sinks)
        self.value = RecentStates(recent, sinks)

    @property
    def kinds(self) -> tuple[RecentStates, RecentStates]:
        """What is held of K and of V."""
        return self.key, self.value

    def extend(
        self, new: Pair, held: Pair, membership: Membership, padding: Padding, record: bool
    ) -> LocalKeys:
        """Take new tokens and return what their queries see with their own scores.

        Args:
            new: of the Q new tokens, all heads in natural order.
            held: of the cache, all S tokens, new ones included.
            membership: whose order ``held`` is in.
            padding: of all S tokens.
            record: whether to keep all tokens for a crop.
        """
        queries = new[0].shape[2]
        past = padding.length - queries
        reach = min(past, self.recent - 1)  # old tokens that the first new one sees
        local = []
        places = (membership.key_place, membership.value_place)
        for recent, states, cache, removed, place in zip(
            self.kinds, new, held, _removed(membership), places, strict=True
        ):
            last = None
            if removed.shape[1]:
                picked = pick_heads(states, removed)
                last = recent.extend(picked, reach, padding, record)
            if not past:
                local.append(_with_first(states, self.sinks, padding))
                continue
            stored = _with_first(cache, self.sinks, padding, slice(past - reach, None))
            if last is not None:
                assert recent.first is not None
                own = torch.cat([recent.first, last[:, :, -(reach + queries) :]], 2)
                stored = torch.cat([stored, own], 1)
            local.append(pick_heads(stored, place))
        return LocalKeys(*local)

    def step(
        self, new: Pair, membership: Membership, padding: Padding, record: bool
    ) -> RollingBuffer:
        """Append one token for decoding, which reads K and V in place.

        Args:
            new: of the new token, all heads.
            membership: the cache's.
            padding: of all tokens.
            record: whether to keep all tokens for a crop.
        """
        sinks = min(self.sinks, padding.length)
        positions, begin = padding.sink_positions(sinks), 0
        memories: list[tuple[Tensor, Tensor]] = []
        for recent, states, removed in zip(self.kinds, new, _removed(membership), strict=True):
            if not removed.shape[1]:
                nothing = states[:, :0]
                memories.append((nothing, nothing.expand(-1, -1, sinks, -1)))
                continue
            picked = pick_heads(states, removed)
            last = recent.push(picked, padding, record)
            assert recent.first is not None
            memories.append((last, recent.first))
            begin = padding.length - last.shape[2] - recent.begin  # the same for K and V
        (last, first), (value_last, value_first) = memories
        ring = RollingBuffer(last, first, positions, self.recent, begin)
        if not value_last.shape[1]:
            return ring
        return replace(ring, value_ring=value_last, value_sinks=value_first)

    def local_keys(self, whole: Pair, padding: Padding, queries: int) -> LocalKeys:
        """What the last Q tokens see with their own scores, from K and V of all heads."""
        length = whole[0].shape[2]
        band = slice(max(0, length - queries - self.recent + 1), length)
        return LocalKeys(*(_with_first(states, self.sinks, padding, band) for states in whole))

    def cut(self, whole: Pair, membership: Membership, padding: Padding, record: bool) -> None:
        """Start from K and V of all heads; ``padding`` may know later tokens."""
        for recent, states, removed in zip(self.kinds, whole, _removed(membership), strict=True):
            if removed.shape[1]:
                recent.cut(pick_heads(states, removed), padding, record)

    def check_crop(self, length: int, keep: int) -> None:
        """Refuse to go back from ``length`` tokens to ``keep``, if K that is needed is gone.

        Raises:
            CacheError: the last w tokens before the cut are not held any more.
        """
        if self.key.last is None:  # a head whose V is removed has no K either
            return
        held = self.key.last.shape[2]
        if held - (length - keep) < min(keep, self.recent - 1):
            raise CacheError(
                f"cannot crop to {keep} tokens: of {length} the last {held} hold the "
                f"K of all heads, and the exact recent window needs the {self.recent - 1} before "
                "the cut. Call cache.activate_past_recording() before the forward that is to be "
                "taken back, or reset the cache and run the prompt again"
            )

    def crop(self, length: int, keep: int, trim: bool) -> None:
        """Go back from ``length`` tokens to ``keep``, which `check_crop` has allowed.

        Args:
            length: tokens before.
            keep: tokens afterwards.
            trim: whether to hold no more than w tokens then.
        """
        for recent in self.kinds:
            recent.crop(length - keep, trim)

    def change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Hold ``change(states)`` of K and of V."""
        for recent in self.kinds:
            recent.change(change)

    def tensors(self) -> dict[str, Tensor | None]:
        """What is held, by the names of `LOCAL`."""
        held = (states for recent in self.kinds for states in (recent.last, recent.first))
        return dict(zip(LOCAL, held, strict=True))


def _removed(membership: Membership) -> Pair:
    """Heads whose K, and whose V, the cache does not hold."""
    return membership.removed_key_heads, membership.removed_value_heads


def _with_first(states: Tensor, sinks: int, padding: Padding, band: slice = slice(None)) -> Tensor:
    """The first ``sinks`` real tokens of ``[B, n, S, D]`` and then those of ``band``."""
    sinks = min(sinks, states.shape[2])
    first = states[:, :, :sinks]
    if padding.valid is not None:
        first = pick_tokens(states, padding.first_positions(sinks))
    return torch.cat([first, states[:, :, band]], 2)
