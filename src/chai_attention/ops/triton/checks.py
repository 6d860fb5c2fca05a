"""Checks of what the kernels do not support."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from chai_attention.errors import AttentionInputError
from chai_attention.ops.fp8 import FLOAT8

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
Table = TypeVar("Table", Tensor, Tensor | None)


def check(*tensors: Tensor, pages: tuple[Tensor, ...] = ()) -> None:
    """Check tensors whose last dimension is a head's numbers; ``pages`` may be of 8-bit floats.

    Raises:
        AttentionInputError: a dtype or head size without a kernel, or strided head dimensions.
    """
    is_fp8 = {tensor.dtype for tensor in pages} == {FLOAT8}
    every = tensors + pages
    alike = tensors if is_fp8 else every
    if len({tensor.dtype for tensor in alike}) > 1 or alike[0].dtype not in DTYPES:
        names = ", ".join(str(tensor.dtype) for tensor in alike)
        raise AttentionInputError(
            f"the kernels take float32, bfloat16 or float16, one for all, not {names}; pages may "
            "also be of float8_e4m3fn"
        )
    dim = max(tensor.shape[-1] for tensor in every)
    if dim > MAX_HEAD_DIM:
        raise AttentionInputError(f"head size {dim} is more than the kernels' {MAX_HEAD_DIM}")
    if any(tensor.stride(-1) != 1 for tensor in every):
        raise AttentionInputError("the numbers of a head must be consecutive in memory")


def by_row(table: Table) -> Table:
    """A table of lengths, places and the like, each line consecutive in memory."""
    if table is None or table.stride(-1) == 1:
        return table
    return table.contiguous()


def page_strides(pages: Tensor) -> tuple[int, int, int]:
    """Strides of page, head and token of ``[P, N, heads, D]``."""
    page, token, head, _ = pages.stride()
    return page, head, token
