"""Writes to pages, each in a call of its own: arguments and errors are `PageWriter.write`'s."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from chai_attention.membership import Membership
from chai_attention.ops.cache_write import PageWriter
from chai_attention.ops.local_pages import LocalPages


def write_paged(*states: Tensor, **options: Any) -> None:
    """Write by what the device has: the kernel on CUDA, else the reference."""
    _write(lambda *pages: PageWriter(*pages).write, *states, **options)


def launch_paged(*states: Tensor, **options: Any) -> None:
    """Write by the kernel, interpreted where there is no GPU; nothing is checked."""
    from chai_attention.ops.triton.write import PagedWrite

    _write(PagedWrite, *states, **options)


def _write(
    make: Callable[..., Callable[..., None]],
    key: Tensor,
    value: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    slot_mapping: Tensor,
    membership: Membership,
    membership_ids: Tensor | None = None,
    local: LocalPages | None = None,
    local_slot_mapping: Tensor | None = None,
    scales: tuple[float, float] = (1.0, 1.0),
    stored: tuple[Tensor, Tensor] | None = None,
) -> None:
    write = make(key_pages, value_pages, membership, local)
    write(key, value, slot_mapping, membership_ids, local_slot_mapping, scales, stored)
