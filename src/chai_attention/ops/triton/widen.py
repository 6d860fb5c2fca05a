"""Copies of 8-bit pages in a wider dtype, for kernels that take nothing else."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from chai_attention.ops.triton.sizes import cdiv

BLOCK = 4096  # numbers a program copies


@triton.jit(do_not_specialize_on_alignment=["used_ptr"])
def _widen(page_ptr, used_ptr, out_ptr, numbers, stride, BLOCK: tl.constexpr):
    """A part of one page."""
    place = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < numbers
    page = tl.load(used_ptr + place).to(tl.int64)
    x = tl.load(page_ptr + page * stride + at, mask=there)
    tl.store(out_ptr + place * numbers + at, x.to(out_ptr.dtype.element_ty), mask=there)


def widen_pages(pages: Tensor, used: Tensor, out: Tensor) -> None:
    """`ops.fp8.widen_pages` on CUDA."""
    numbers = out[0].numel()
    _widen[(cdiv(numbers, BLOCK), used.shape[0])](
        pages, used, out, numbers, pages.stride(0), BLOCK=BLOCK, num_warps=8
    )
