"""The tables attention needs, from one vector: which head's scores each head uses.

Words: *H* query heads, *G* K/V heads (``G == H`` in multi-head attention), *k* clusters. A
*slot* is a cluster's place in the K cache; slots are ordered by their representative. A
*streaming head* sees local keys only (the exact window): far ones weigh nothing for it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from chai_attention.index_tables import checked_clusters, marked, table_of, true_positions

_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class Membership:
    """Who represents whom in one layer, for every sequence of a batch.

    Build one with `from_representatives` or `identity`. Every row of a batch has the same number
    of clusters and of kept K heads, so that caches are rectangular; who is in which cluster
    differs by row, who streams does not.

    >>> import torch
    >>> membership = Membership.from_representatives(torch.tensor([0, 0, 2, 0, 2, 5]))
    >>> membership.clusters, membership.kept_keys  # 3 of 6 K heads are held
    (3, 3)
    >>> membership.slot_heads  # [B, k]: whose K is in each slot of the cache
    tensor([[0, 2, 5]])
    >>> membership.slot  # [B, H]: the slot whose scores each head uses
    tensor([[0, 0, 1, 0, 1, 2]])
    >>> membership.order  # [B, H]: heads in cluster order, as V is held
    tensor([[0, 1, 3, 2, 4, 5]])

    Attributes:
        representatives: ``[B, H]`` int64, the head whose attention probabilities each head uses;
            ``representatives[b, representatives[b, h]] == representatives[b, h]``. A streaming
            head's entry is itself.
        clusters: k, the number of distinct representatives of each row, streaming heads left out.
        kv_heads: G, the number of K/V heads; divides H.
        kept_keys: number of K heads a cache holds per row: k for multi-head attention, else the
            largest number of K/V heads that the representatives of any row read.
        streaming: heads that see local keys only, ascending.
    """

    representatives: Tensor
    clusters: int
    kv_heads: int
    kept_keys: int
    streaming: tuple[int, ...] = ()

    @classmethod
    def from_representatives(
        cls,
        representatives: Tensor,
        clusters: int | None = None,
        kv_heads: int | None = None,
        kept_keys: int | None = None,
        streaming: Sequence[int] = (),
    ) -> Membership:
        """Make the tables of ``representatives`` (``[H]`` or ``[B, H]``, any integer dtype).

        Args:
            representatives: head used by each head.
            clusters: k if the caller knows it. When None, it is counted and the vector is
                checked, which reads the tensor on the host.
            kv_heads: G; None for multi-head attention.
            kept_keys: K/V heads kept if the caller knows it (grouped-query attention only);
                None counts them, which reads the tensor on the host.
            streaming: heads that see local keys only; each represents itself alone.

        Raises:
            ValueError: a head out of range, a representative that is not its own
                representative or that streams, rows with different numbers of clusters, or more
                kept K heads than K/V heads that see far keys.
        """
        rep = representatives.long()
        if rep.ndim == 1:
            rep = rep[None]
        heads = rep.shape[1]
        streaming = tuple(sorted(set(streaming)))
        kv_heads = heads if kv_heads is None else kv_heads
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"{heads} heads cannot be split over {kv_heads} K/V heads")
        if clusters is None:
            clusters = checked_clusters(rep, streaming)
        if kv_heads == heads:
            kept_keys = clusters
        elif kept_keys is None:
            far = rep[:, [head for head in range(heads) if head not in streaming]]
            used = marked(far // (heads // kv_heads), kv_heads)
            kept_keys = int(used.sum(1).max())
        made = cls(rep, clusters, kv_heads, kept_keys, streaming)
        # else a cache would have places for K heads that the tables do not name
        if kv_heads < heads and kept_keys > made.kept_values:
            raise ValueError(
                f"{kept_keys} kept K heads, but only {made.kept_values} K/V heads have a query "
                "head that sees far keys"
            )
        return made

    @classmethod
    def with_streaming(
        cls, far: Membership, heads: int, kv_heads: int, streaming: Sequence[int]
    ) -> Membership:
        """Put a membership of the heads that see far keys beside heads that stream.

        Args:
            far: of the query heads of all K/V heads that do not stream whole, in their order.
            heads: H.
            kv_heads: G.
            streaming: heads that see local keys only.
        """
        streaming = tuple(sorted(set(streaming)))
        if not streaming:
            return far
        alone = torch.arange(heads, device=far.device).repeat(far.batch, 1)
        made = cls(alone, far.clusters, kv_heads, far.kept_keys, streaming)
        sees = [head for head in made.far_heads if head not in streaming]
        inside = table_of(tuple(made.far_heads.index(head) for head in sees), far.device)
        followed = table_of(made.far_heads, far.device)[far.representatives[:, inside]]
        made.representatives.index_copy_(1, table_of(tuple(sees), far.device), followed)
        made.__dict__["far"] = far
        return made

    @classmethod
    def from_tables(
        cls, representatives: Tensor, clusters: int, kv_heads: int, kept_keys: int, **tables: Tensor
    ) -> Membership:
        """Take a membership whose tables a kernel has made, by their names here."""
        membership = cls(representatives, clusters, kv_heads, kept_keys)
        membership.__dict__.update(tables)  # where cached properties keep what they computed
        return membership

    @classmethod
    def identity(
        cls,
        heads: int, kv_heads: int | None = None, batch: int = 1,
        device: torch.device | str | None = None,
    ) -> Membership:  # fmt: skip
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
    def device(self) -> torch.device:
        """Where the tables are."""
        return self.representatives.device

    @property
    def group_size(self) -> int:
        """Query heads per K/V head, ``H // G``."""
        return self.heads // self.kv_heads

    @property
    def is_identity(self) -> bool:
        """Whether every head keeps its own scores."""
        return self.clusters == self.heads

    # ---- streaming heads

    @cached_property
    def far_kv_heads(self) -> tuple[int, ...]:
        """K/V heads of which some query head sees far keys, ascending: their V is kept."""
        sees = sorted(set(range(self.heads)) - set(self.streaming))
        return tuple(dict.fromkeys(head // self.group_size for head in sees))

    @cached_property
    def far_heads(self) -> tuple[int, ...]:
        """Query heads of `far_kv_heads`, ascending.

        With grouped queries some of them may stream; the far keys then weigh nothing for them.
        """
        group = self.group_size
        return tuple(head for head in range(self.heads) if head // group in self.far_kv_heads)

    @property
    def kept_values(self) -> int:
        """Number of V heads a cache holds for all tokens; G if no K/V head streams whole."""
        return len(self.far_kv_heads)

    @property
    def reorders_values(self) -> bool:
        """Whether `value_heads` is something else than all V heads in their natural order."""
        return self.group_size == 1 or self.kept_values < self.kv_heads

    @cached_property
    def far(self) -> Membership | None:
        """The membership of `far_heads`, numbered anew from 0; None if all heads stream.

        What attends to far keys takes this one, whose K and V caches are those of this layer. A
        streaming head in it (grouped queries only) follows a head that reads the same V.
        """
        if not self.streaming:
            return self
        if not self.far_heads:
            return None
        group = self.group_size
        number = {head: place for place, head in enumerate(self.far_heads)}
        leader = {h // group: h for h in reversed(self.far_heads) if h not in self.streaming}
        follows = [h if h not in self.streaming else leader[h // group] for h in self.far_heads]
        rep = self.far_place[self.representatives[:, follows]]
        far = Membership(rep, self.clusters, len(self.far_kv_heads), self.kept_keys)
        if self.known_rows is not None:
            far.__dict__["host_rows"] = tuple(
                tuple(number[row[head]] for head in follows) for row in self.known_rows
            )
        return far

    @cached_property
    def far_place(self) -> Tensor:
        """``[H]`` int64: each head's place among `far_heads`; 0 for heads that are not."""
        number = {head: place for place, head in enumerate(self.far_heads)}
        return table_of(tuple(number.get(head, 0) for head in range(self.heads)), self.device)

    @cached_property
    def streams(self) -> Tensor:
        """``[H]`` bool: whether a head sees local keys only."""
        flags = tuple(int(head in self.streaming) for head in range(self.heads))
        return table_of(flags, self.device).bool()

    # ---- who is where

    @cached_property
    def _is_representative(self) -> Tensor:
        """``[B, H]`` bool."""
        own = self.representatives == torch.arange(self.heads, device=self.device)
        return own & ~self.streams if self.streaming else own

    @cached_property
    def slot_heads(self) -> Tensor:
        """``[B, k]`` int64: the representative head of each slot, ascending."""
        return true_positions(self._is_representative, self.clusters)

    @cached_property
    def slot(self) -> Tensor:
        """``[B, H]`` int64: the slot (cluster) of each head; any for a streaming head."""
        rank = self._is_representative.long().cumsum(1) - 1
        return rank.gather(1, self.representatives).clamp_min(0)

    @cached_property
    def key_heads(self) -> Tensor:
        """``[B, kept_keys]`` int64: the K/V head stored at each place of the K cache.

        Rows that need fewer than ``kept_keys`` K/V heads are filled up with the lowest heads
        they do not need, so that every place holds real data.
        """
        if self.kv_heads == self.heads:
            return self.slot_heads
        if self.streaming:
            return self._natural(None if self.far is None else self.far.key_heads)
        return true_positions(self._needed_kv_heads, self.kept_keys)

    @cached_property
    def removed_key_heads(self) -> Tensor:
        """``[B, G - kept_keys]`` int64: the K/V heads whose K no cache place holds, ascending."""
        kept = marked(self.key_heads, self.kv_heads)
        return true_positions(~kept, self.kv_heads - self.kept_keys)

    @cached_property
    def key_place(self) -> Tensor:
        """``[B, G]`` int64: where each K/V head is in `key_heads` and then `removed_key_heads`."""
        return torch.cat([self.key_heads, self.removed_key_heads], 1).argsort(1)

    def _natural(self, far_kv_heads: Tensor | None) -> Tensor:
        """K/V heads of `far`, ``[B, n]``, by their numbers here."""
        if far_kv_heads is None:
            return torch.zeros(self.batch, 0, dtype=torch.long, device=self.device)
        return table_of(self.far_kv_heads, self.device)[far_kv_heads]

    @cached_property
    def _needed_kv_heads(self) -> Tensor:
        """``[B, G]`` bool: K/V heads read by a representative, filled up to `kept_keys`."""
        needed = marked(self.representatives // self.group_size, self.kv_heads)
        missing = self.kept_keys - needed.sum(1, keepdim=True)
        spare_rank = (~needed).long().cumsum(1)
        return needed | (spare_rank <= missing)

    @cached_property
    def key_slot(self) -> Tensor:
        """``[B, k]`` int64: the place in the K cache that each slot's scores read."""
        if self.kv_heads == self.heads:
            return torch.arange(self.clusters, device=self.device).expand(self.batch, -1)
        if self.streaming and self.far is not None:
            return self.far.key_slot
        rank = self._needed_kv_heads.long().cumsum(1) - 1
        return rank.gather(1, self.slot_heads // self.group_size)

    @cached_property
    def order(self) -> Tensor:
        """``[B, H]`` int64: heads sorted by (slot, head), so that a cluster is contiguous."""
        heads = torch.arange(self.heads, device=self.device)
        return (self.slot * self.heads + heads).argsort(1)

    @cached_property
    def offsets(self) -> Tensor:
        """``[B, k + 1]`` int64: cluster c is ``order[offsets[c]:offsets[c + 1]]``."""
        counts = self.slot.new_zeros(self.batch, self.clusters + 1)
        counts.scatter_add_(1, self.slot + 1, torch.ones_like(self.slot))
        return counts.cumsum(1)

    @cached_property
    def value_heads(self) -> Tensor:
        """``[B, kept_values]`` int64: the V head stored at each place of the V cache.

        Multi-head attention stores V in cluster order (`order`), which makes the V of a
        cluster's members one contiguous block; grouped-query attention keeps the natural order,
        because heads of several clusters read one V head.
        """
        if self.streaming:
            return self._natural(None if self.far is None else self.far.value_heads)
        if self.kv_heads == self.heads:
            return self.order
        places = torch.arange(self.kv_heads, device=self.device)
        return places.expand(self.batch, self.kv_heads).contiguous()

    @cached_property
    def value_slot(self) -> Tensor:
        """``[B, H]`` int64: the place in the V cache that each head reads.

        Places of streaming V heads come behind: see `value_place`.
        """
        if self.streaming:
            return self.value_place.repeat_interleave(self.group_size, 1)
        if self.kv_heads == self.heads:
            return self.order.argsort(1)
        heads = torch.arange(self.heads, device=self.device)
        return (heads // self.group_size).expand(self.batch, self.heads)

    @cached_property
    def removed_value_heads(self) -> Tensor:
        """``[B, G - kept_values]`` int64: V heads no cache place holds, ascending."""
        removed = tuple(head for head in range(self.kv_heads) if head not in self.far_kv_heads)
        return table_of(removed, self.device).expand(self.batch, -1)

    @cached_property
    def value_place(self) -> Tensor:
        """``[B, G]`` int64: each V head's place in `value_heads`, then `removed_value_heads`."""
        return torch.cat([self.value_heads, self.removed_value_heads], 1).argsort(1)

    @cached_property
    def host_rows(self) -> tuple[tuple[int, ...], ...]:
        """`representatives` as Python integers, for code that runs on the CPU."""
        return tuple(tuple(row) for row in self.representatives.tolist())

    @property
    def known_rows(self) -> tuple[tuple[int, ...], ...] | None:
        """`host_rows` if they are known without waiting for another device, else None."""
        if self.device.type == "cpu":
            return self.host_rows
        return self.__dict__.get("host_rows")

    @cached_property
    def derived(self) -> dict[tuple[Any, ...], Any]:
        """What kernels have made of these tables: by the function that did, and its arguments."""
        return {}

    def derive(self, make: Callable[..., _T], *args: Hashable) -> _T:
        """Return ``make(self, *args)``, made once; it lives and changes with the membership.

        Args:
            make: a function of a module, not a closure.
            args: what it takes beside the membership.
        """
        key = (make, *args)
        if key not in self.derived:
            self.derived[key] = make(self, *args)
        made: _T = self.derived[key]
        return made

    def expand(self, batch: int) -> Membership:
        """Return this one-row membership for ``batch`` sequences (no copy of the vector)."""
        rep = self.representatives.expand(batch, self.heads)
        return self._with(rep, None if self.known_rows is None else self.known_rows * batch)

    def select(self, rows: Tensor) -> Membership:
        """Return the rows ``rows`` (``[N]`` integer or ``[B]`` bool), as beam search needs."""
        return self._with(self.representatives[rows], None)

    def to(self, device: torch.device | str) -> Membership:
        """Return the membership on ``device``: this one, with all that was made of it, if it is."""
        rep = self.representatives.to(device)
        return self if rep is self.representatives else self._with(rep, self.known_rows)

    def _with(self, rep: Tensor, rows: tuple[tuple[int, ...], ...] | None) -> Membership:
        """The same of other sequences or on another device; ``rows`` where they are known."""
        made = replace(self, representatives=rep)
        if rows is not None:
            made.__dict__["host_rows"] = rows
        return made
