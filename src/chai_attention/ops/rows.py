"""Memberships whose rows change while kernels, and CUDA graphs, read their tables."""

from __future__ import annotations

from dataclasses import fields

from torch import Tensor

from chai_attention.membership import Membership


def update_rows(membership: Membership, rows: Tensor, new: Membership) -> None:
    """Put ``new`` into some rows of ``membership``, in place.

    All tables that were made of it so far, its own and the kernels', are brought up to date where
    they lie in memory. Nothing is read on the host.

    Args:
        membership: of R rows, on the device of its kernels and made there, so that nothing counts
            on who is in which cluster.
        rows: ``[B]`` int64, the rows that change.
        new: of B rows, with as many clusters, K/V heads and kept K heads, and the same heads that
            stream.
    """
    membership.representatives[rows] = new.representatives
    made = vars(membership)
    made.pop("host_rows", None)
    for name, table in made.items():
        # what is the same for all rows, whoever is in a cluster, is one row or an expanded one
        if isinstance(table, Tensor) and name != "representatives":  # noqa: SIM102
            if table.ndim > 1 and table.stride(0):
                table[rows] = getattr(new, name)
    far = made.get("far")
    if isinstance(far, Membership) and far is not membership and new.far is not None:
        update_rows(far, rows, new.far)
    for (make, *arguments), held in membership.derived.items():
        fresh = new.derive(make, *arguments)
        vars(held).pop("used", None)
        for field in fields(held):
            table = getattr(held, field.name)
            if isinstance(table, Tensor):
                _write_rows(table, rows, getattr(fresh, field.name))


def _write_rows(table: Tensor, rows: Tensor, new: Tensor) -> None:
    """Write chunks; rows whose membership is known have fewer of them than there is room for."""
    count = new.shape[1]
    table[rows, :count] = new
    if count < table.shape[1]:
        table[rows, count:] = -1
