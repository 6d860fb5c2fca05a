"""Tables of many memberships, which change in place while kernels and CUDA graphs read them."""

from __future__ import annotations

from dataclasses import fields
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from chai_attention.index_tables import table_of
from chai_attention.membership import Membership
from chai_attention.ops.windowed import head_offsets

if TYPE_CHECKING:
    from chai_attention.ops.triton.membership_tables import TableList


class MembershipTables:
    """A membership of many rows that change one by one, with all that was made of it.

    Args:
        membership: of R rows, on the device of its kernels and made there, so that nothing counts
            on who is in which cluster.
        offsets: ``[H, H]`` float32 of `windowed.head_offsets`, None for zeros.
        has_window: whether heads have an exact window, and so offsets.
        clustered: the heads that representatives are given of; None for all. The others follow
            themselves.
    """

    def __init__(
        self,
        membership: Membership,
        offsets: Tensor | None = None,
        has_window: bool = False,
        clustered: tuple[int, ...] | None = None,
    ):
        self.membership = membership
        self.offset = head_offsets(offsets, membership) if has_window else None  # [R, H]
        self._offsets = offsets
        self._part: tuple[Tensor, Tensor] | None = None
        if clustered is not None:
            heads, device = range(membership.heads), membership.representatives.device
            inside = tuple(clustered.index(h) if h in clustered else -1 for h in heads)
            self._part = table_of(inside, device), table_of(clustered, device)
        self._tables: TableList | None = None
        self._listed: tuple[int, ...] | None = None  # how many tables there were then

    def put(self, ids: Tensor, representatives: Tensor) -> None:
        """Set some rows, and everything that was made of them, where it lies in memory.

        Nothing is read on the host, and on CUDA it is one launch.

        Args:
            ids: ``[n]`` integer, the rows that change.
            representatives: ``[n or 1, heads]`` int64, whom each of the heads follows, by their
                numbers among themselves.
        """
        member = self.membership
        if member.representatives.is_cuda and find_spec("triton") is not None:
            from chai_attention.ops.triton import membership_tables as kernels

            far = vars(member).get("far")
            made = len(vars(member)), len(member.derived), 0 if far is None else len(vars(far))
            if made != self._listed:
                self._tables = kernels.list_tables(member, self.offset, self._offsets)
                self._listed = made
            if self._tables is not None:
                vars(member).pop("host_rows", None)
                kernels.put_tables(member, self._tables, ids, representatives, self._part)
                return
        new = Membership.from_representatives(
            self._of_all(representatives).expand(ids.shape[0], member.heads),
            member.clusters, member.kv_heads, member.kept_keys, member.streaming,
        )  # fmt: skip
        update_tables(member, ids.long(), new)
        # what does not depend on who is in which cluster stays
        if self.offset is not None and self._offsets is not None:
            self.offset[ids.long()] = head_offsets(self._offsets, new)

    def _of_all(self, representatives: Tensor) -> Tensor:
        """``[n, H]`` by the heads' own numbers."""
        if self._part is None:
            return representatives
        inside, outside = self._part
        followed = outside[representatives[:, inside.clamp_min(0)]]
        return torch.where(inside < 0, torch.arange(len(inside), device=inside.device), followed)


def update_tables(membership: Membership, ids: Tensor, new: Membership) -> None:
    """Put ``new`` into some rows of ``membership``, in place.

    All tables that were made of it so far, its own and the kernels', are brought up to date where
    they lie in memory. Nothing is read on the host.

    Args:
        membership: of R rows, on the device of its kernels and made there, so that nothing counts
            on who is in which cluster.
        ids: ``[B]`` int64, the rows that change.
        new: of B rows, with as many clusters, K/V heads and kept K heads, and the same heads that
            stream.
    """
    membership.representatives[ids] = new.representatives
    made = vars(membership)
    made.pop("host_rows", None)
    for name, table in made.items():
        # what is the same for all rows, whoever is in a cluster, is one row or an expanded one
        if isinstance(table, Tensor) and name != "representatives":  # noqa: SIM102
            if table.ndim > 1 and table.stride(0):
                table[ids] = getattr(new, name)
    far = made.get("far")
    if isinstance(far, Membership) and far is not membership and new.far is not None:
        update_tables(far, ids, new.far)
    for (make, *arguments), held in membership.derived.items():
        fresh = new.derive(make, *arguments)
        vars(held).pop("used", None)
        for field in fields(held):
            table = getattr(held, field.name)
            if isinstance(table, Tensor):
                _write_head_tiles(table, ids, getattr(fresh, field.name))


def _write_head_tiles(table: Tensor, ids: Tensor, new: Tensor) -> None:
    """Write head tiles, of which rows with a known membership have fewer than there is room for."""
    count = new.shape[1]
    table[ids, :count] = new
    if count < table.shape[1]:
        table[ids, count:] = -1
