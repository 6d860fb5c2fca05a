"""The tables attention needs, from one vector: which head's scores each head uses.

Words: *H* query heads, *G* K/V heads (``G == H`` in multi-head attention), *k* clusters. A
*slot* is a cluster's place in the K cache; slots are ordered by their representative.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Membership:
    """Who represents whom in one layer, for every sequence of a batch.

    Build one with `from_representatives` or `identity`. Every row of a batch has the same number
    of clusters and of kept K heads, so that caches are rectangular; who is in which cluster
    differs by row.

    Attributes:
        representatives: ``[B, H]`` int64, the head whose attention probabilities each head uses;
            ``representatives[b, representatives[b, h]] == representatives[b, h]``.
        clusters: k, the number of distinct representatives of each row.
        kv_heads: G, the number of K/V heads; divides H.
        kept_keys: number of K heads a cache holds per row: k for multi-head attention, else the
            largest number of K/V heads that the representatives of any row read.
    """

    representatives: Tensor
    clusters: int
    kv_heads: int
    kept_keys: int

    @classmethod
    def from_representatives(
        cls,
        representatives: Tensor,
        clusters: int | None = None,
        kv_heads: int | None = None,
        kept_keys: int | None = None,
    ) -> Membership:
        """Make the tables of ``representatives`` (``[H]`` or ``[B, H]``, any integer dtype).

        Args:
            representatives: head used by each head.
            clusters: k if the caller knows it. When None, it is counted and the vector is
                checked, which reads the tensor on the host.
            kv_heads: G; None for multi-head attention.
            kept_keys: K/V heads kept if the caller knows it (grouped-query attention only);
                None counts them, which reads the tensor on the host.

        Raises:
            ValueError: a head out of range, a representative that is not its own
                representative, or rows with different numbers of clusters.
        """
        rep = representatives.long()
        if rep.ndim == 1:
            rep = rep[None]
        heads = rep.shape[1]
        kv_heads = heads if kv_heads is None else kv_heads
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"{heads} heads cannot be split over {kv_heads} K/V heads")
        if clusters is None:
            clusters = _checked_clusters(rep)
        if kv_heads == heads:
            kept_keys = clusters
        elif kept_keys is None:
            used = torch.zeros(rep.shape[0], kv_heads, dtype=torch.bool, device=rep.device)
            used.scatter_(1, rep // (heads // kv_heads), True)
            kept_keys = int(used.sum(1).max())
        return cls(rep, clusters, kv_heads, kept_keys)

    @classmethod
    def from_tables(
        cls,
        representatives: Tensor,
        clusters: int,
        kv_heads: int,
        kept_keys: int,
        **tables: Tensor,
    ) -> Membership:
        """Take a membership whose tables a kernel has made, by their names here."""
        membership = cls(representatives, clusters, kv_heads, kept_keys)
        membership.__dict__.update(tables)  # where cached properties keep what they computed
        return membership

    @classmethod
    def identity(
        cls,
        heads: int,
        kv_heads: int | None = None,
        batch: int = 1,
        device: torch.device | str | None = None,
    ) -> Membership:
        """Every head on its own: plain multi-head or grouped-query attention."""
        kv_heads = heads if kv_heads is None else kv_heads
        rep = torch.arange(heads, device=device).expand(batch, heads)
        return cls(rep, heads, kv_heads, kv_heads)

    @property
    def batch(self) -> int:
        """Number of rows B."""
        return self.representatives.shape[0]

    @property
    def heads(self) -> int:
        """Number of query heads H."""
        return self.representatives.shape[1]

    @property
    def group_size(self) -> int:
        """Query heads per K/V head, ``H // G``."""
        return self.heads // self.kv_heads

    @property
    def is_identity(self) -> bool:
        """Whether every head keeps its own scores."""
        return self.clusters == self.heads

    @cached_property
    def _is_representative(self) -> Tensor:
        """``[B, H]`` bool."""
        heads = torch.arange(self.heads, device=self.representatives.device)
        return self.representatives == heads

    @cached_property
    def slot_heads(self) -> Tensor:
        """``[B, k]`` int64: the representative head of each slot, ascending."""
        return _true_positions(self._is_representative, self.clusters)

    @cached_property
    def slot(self) -> Tensor:
        """``[B, H]`` int64: the slot (cluster) of each head."""
        rank = self._is_representative.long().cumsum(1) - 1
        return rank.gather(1, self.representatives)

    @cached_property
    def key_heads(self) -> Tensor:
        """``[B, kept_keys]`` int64: the K/V head stored at each place of the K cache.

        Rows that need fewer than ``kept_keys`` K/V heads are filled up with the lowest heads
        they do not need, so that every place holds real data.
        """
        if self.kv_heads == self.heads:
            return self.slot_heads
        return _true_positions(self._needed_kv_heads, self.kept_keys)

    @cached_property
    def removed_key_heads(self) -> Tensor:
        """``[B, G - kept_keys]`` int64: the K/V heads whose K no cache place holds, ascending."""
        kept = torch.zeros(
            self.batch, self.kv_heads, dtype=torch.bool, device=self.representatives.device
        ).scatter_(1, self.key_heads, True)
        return _true_positions(~kept, self.kv_heads - self.kept_keys)

    @cached_property
    def key_place(self) -> Tensor:
        """``[B, G]`` int64: where each K/V head is in `key_heads` and then `removed_key_heads`."""
        return torch.cat([self.key_heads, self.removed_key_heads], 1).argsort(1)

    @cached_property
    def _needed_kv_heads(self) -> Tensor:
        """``[B, G]`` bool: K/V heads read by a representative, filled up to `kept_keys`."""
        needed = torch.zeros(
            self.batch, self.kv_heads, dtype=torch.bool, device=self.representatives.device
        )
        needed.scatter_(1, self.representatives // self.group_size, True)
        missing = self.kept_keys - needed.sum(1, keepdim=True)
        spare_rank = (~needed).long().cumsum(1)
        return needed | (spare_rank <= missing)

    @cached_property
    def key_slot(self) -> Tensor:
        """``[B, k]`` int64: the place in the K cache that each slot's scores read."""
        if self.kv_heads == self.heads:
            places = torch.arange(self.clusters, device=self.representatives.device)
            return places.expand(self.batch, self.clusters)
        rank = self._needed_kv_heads.long().cumsum(1) - 1
        return rank.gather(1, self.slot_heads // self.group_size)

    @cached_property
    def order(self) -> Tensor:
        """``[B, H]`` int64: heads sorted by (slot, head), so that a cluster is contiguous."""
        heads = torch.arange(self.heads, device=self.representatives.device)
        return (self.slot * self.heads + heads).argsort(1)

    @cached_property
    def offsets(self) -> Tensor:
        """``[B, k + 1]`` int64: cluster c is ``order[offsets[c]:offsets[c + 1]]``."""
        counts = torch.zeros(
            self.batch, self.clusters + 1, dtype=torch.long, device=self.representatives.device
        )
        counts.scatter_add_(1, self.slot + 1, torch.ones_like(self.slot))
        return counts.cumsum(1)

    @cached_property
    def value_heads(self) -> Tensor:
        """``[B, G]`` int64: the V head stored at each place of the V cache.

        Multi-head attention stores V in cluster order (`order`), which makes the V of a
        cluster's members one contiguous block; grouped-query attention keeps the natural order,
        because heads of several clusters read one V head.
        """
        if self.kv_heads == self.heads:
            return self.order
        places = torch.arange(self.kv_heads, device=self.representatives.device)
        return places.expand(self.batch, self.kv_heads).contiguous()

    @cached_property
    def value_slot(self) -> Tensor:
        """``[B, H]`` int64: the place in the V cache that each head reads."""
        if self.kv_heads == self.heads:
            return self.order.argsort(1)
        heads = torch.arange(self.heads, device=self.representatives.device)
        return (heads // self.group_size).expand(self.batch, self.heads)

    @cached_property
    def host_rows(self) -> tuple[tuple[int, ...], ...]:
        """`representatives` as Python integers, for code that runs on the CPU."""
        return tuple(tuple(row) for row in self.representatives.tolist())

    @property
    def known_rows(self) -> tuple[tuple[int, ...], ...] | None:
        """`host_rows` if they are known without waiting for another device, else None."""
        if self.representatives.device.type == "cpu":
            return self.host_rows
        return self.__dict__.get("host_rows")

    def expand(self, batch: int) -> Membership:
        """Return this one-row membership for ``batch`` sequences (no copy of the vector)."""
        rep = self.representatives.expand(batch, self.heads)
        expanded = Membership(rep, self.clusters, self.kv_heads, self.kept_keys)
        if self.known_rows is not None:
            expanded.__dict__["host_rows"] = self.known_rows * batch
        return expanded

    def select(self, rows: Tensor) -> Membership:
        """Return the rows ``rows`` (``[N]`` integer or ``[B]`` bool), as beam search needs."""
        rep = self.representatives[rows]
        return Membership(rep, self.clusters, self.kv_heads, self.kept_keys)

    def to(self, device: torch.device | str) -> Membership:
        """Return the membership on ``device``."""
        rep = self.representatives.to(device)
        moved = Membership(rep, self.clusters, self.kv_heads, self.kept_keys)
        if self.known_rows is not None:
            moved.__dict__["host_rows"] = self.known_rows
        return moved


def _true_positions(flags: Tensor, count: int) -> Tensor:
    """Positions of the first ``count`` true flags of each row, ascending: ``[B, count]``.

    Contiguous, as kernels read it at every step.
    """
    size = flags.shape[1]
    position = torch.arange(size, device=flags.device)
    return torch.where(flags, position, position + size).argsort(1)[:, :count].contiguous()


def _checked_clusters(rep: Tensor) -> int:
    """Validate a ``[B, H]`` vector and return its number of clusters."""
    heads = rep.shape[1]
    if heads == 0 or rep.shape[0] == 0:
        raise ValueError("a membership needs at least one sequence and one head")
    if bool(((rep < 0) | (rep >= heads)).any()):
        raise ValueError(f"a representative is not a head: heads are 0 to {heads - 1}")
    if bool((rep.gather(1, rep) != rep).any()):
        raise ValueError("a representative must be its own representative")
    counts = (rep == torch.arange(heads, device=rep.device)).sum(1)
    if bool((counts != counts[0]).any()):
        raise ValueError(
            f"every sequence of a batch needs the same number of clusters, not {counts.tolist()}"
        )
    return int(counts[0])
