"""How the heads of a layer are dealt to ranks, so that pages have one size on all of them.

Probabilities never cross ranks. A rank that could hold less than another keeps more instead: a head
that shared another's scores, or saw near keys only, then attends to all keys by itself. So with
more ranks a profile saves less, and no head becomes less exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """One rank's heads of a layer with a fixed membership; heads count from the rank's first.

    Attributes:
        representatives: whose scores each head uses for far keys; itself if it streams.
        streaming: heads that see near keys only, ascending.
        kept: K heads that pages hold, the same on all ranks.
        kept_values: V heads that pages hold, the same on all ranks.
    """

    representatives: tuple[int, ...]
    streaming: tuple[int, ...]
    kept: int
    kept_values: int

    @property
    def is_identity(self) -> bool:
        """Whether every head attends to all keys by itself."""
        return not self.streaming and self.representatives == tuple(
            range(len(self.representatives))
        )


class _Heads:
    """Heads of one rank while they are dealt."""

    def __init__(self, representatives: Sequence[int], streaming: set[int], group: int):
        self.group = group
        self.representatives = list(representatives)
        self.streaming = streaming

    def far(self) -> list[int]:
        """Heads that see far keys."""
        return [head for head in range(len(self.representatives)) if head not in self.streaming]

    def needed_values(self) -> set[int]:
        """K/V heads whose V is needed for far keys."""
        return {head // self.group for head in self.far()}

    def needed_keys(self) -> set[int]:
        """K/V heads whose K is needed for far keys."""
        return {self.representatives[head] // self.group for head in self.far()}

    def keep(self, kv_head: int) -> None:
        """Let all query heads of a K/V head attend by themselves."""
        heads = range(kv_head * self.group, (kv_head + 1) * self.group)
        self.representatives[heads.start : heads.stop] = heads
        self.streaming -= set(heads)


def fixed_shares(
    representatives: Sequence[int],
    streaming: Sequence[int],
    ranks: int,
    kv_heads: int,
    whole_groups: bool,
) -> list[Share]:
    """Deal a layer with a fixed membership to ranks.

    Heads whose representative is on another rank get a member of their cluster on their own, the
    lowest.

    Args:
        representatives: ``[H]``; a streaming head's entry is itself.
        streaming: heads that see near keys only.
        ranks: by which H and G can be divided.
        kv_heads: G.
        whole_groups: whether all query heads of a K/V head become representatives together.
    """
    heads, groups = len(representatives) // ranks, kv_heads // ranks
    dealt = [
        _rank(representatives, streaming, range(rank * heads, (rank + 1) * heads), heads // groups)
        for rank in range(ranks)
    ]
    if whole_groups:
        for one in dealt:
            for kv_head in one.needed_keys():
                one.keep(kv_head)
    values = max(len(one.needed_values()) for one in dealt)
    for one in dealt:
        _keep_until(one, values, range(groups))
    keys = max(len(one.needed_keys()) for one in dealt)
    for one in dealt:
        _keep_until(one, keys, sorted(one.needed_values()), of_keys=True)
    shares = [
        Share(tuple(one.representatives), tuple(sorted(one.streaming)), keys, values)
        for one in dealt
    ]
    if any(share.is_identity for share in shares):  # nothing is removed on the others either
        whole = Share(tuple(range(heads)), (), groups, groups)
        return [whole] * ranks
    return shares


def _rank(
    representatives: Sequence[int], streaming: Sequence[int], mine: range, group: int
) -> _Heads:
    """Heads ``mine``, which follow nobody on another rank."""
    chosen: dict[int, int] = {}  # cluster to its representative here
    for head in mine:
        cluster = representatives[head]
        chosen.setdefault(cluster, cluster if cluster in mine else head)
    local = [chosen[representatives[head]] - mine.start for head in mine]
    return _Heads(local, {h - mine.start for h in streaming if h in mine}, group)


def _keep_until(one: _Heads, count: int, kv_heads: Sequence[int], of_keys: bool = False) -> None:
    """Keep more K/V heads whole, the lowest first, until so many V or K heads are needed."""
    for kv_head in kv_heads:
        needed = one.needed_keys() if of_keys else one.needed_values()
        if len(needed) >= count:
            return
        if kv_head not in needed:
            one.keep(kv_head)


@dataclass(frozen=True)
class OnlineShare:
    """One rank's heads of a layer whose membership every request decides.

    Attributes:
        clusters: among the rank's heads that the profile lets see far keys.
        streaming: heads that the profile lets see near keys only, from the rank's first.
        exact: those of ``streaming`` that attend to all keys nevertheless.
        kept: K heads that pages hold, the same on all ranks.
        is_identity: every head attends to all keys by itself, on all ranks.
    """

    clusters: int
    streaming: tuple[int, ...]
    exact: tuple[int, ...]
    kept: int
    is_identity: bool = False


def online_shares(
    clusters: int,
    heads: int,
    streaming: Sequence[int],
    ranks: int,
    kv_heads: int,
    whole_groups: bool,
) -> list[OnlineShare]:
    """Deal a layer to ranks of which each clusters its own heads.

    A rank finds clusters for its share of the heads that see far keys, rounded up.

    Args:
        clusters: k of the layer.
        heads: H.
        streaming: heads that see near keys only; with grouped queries whole K/V heads.
        ranks: by which H and G can be divided.
        kv_heads: G.
        whole_groups: clusters are whole K/V heads ("k-bytes").
    """
    own, group = heads // ranks, heads // kv_heads
    unit = group if whole_groups else 1
    local = [
        tuple(head - rank * own for head in sorted(streaming) if head // own == rank)
        for rank in range(ranks)
    ]
    far = [own - len(near) for near in local]
    exact = [near[: max(far) - len_far] for near, len_far in zip(local, far, strict=True)]
    found = [-(-clusters * each // (sum(far) * unit)) * unit if each else 0 for each in far]

    def keys(rank: int) -> int:
        of_clusters = min(found[rank] // unit, far[rank] // group)
        return of_clusters + len(exact[rank]) // group

    kept = max(map(keys, range(ranks)))
    if whole_groups or group == 1:  # K heads and clusters are the same: use what there is room for
        found = [(kept - len(spare) // group) * unit for spare in exact]
    whole = any(found[r] == far[r] and exact[r] == local[r] for r in range(ranks))
    return [
        OnlineShare(own if whole else found[r], local[r], exact[r], kept, whole)
        for r in range(ranks)
    ]
