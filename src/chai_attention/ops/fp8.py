"""K and V in pages of 8-bit floats: half the bytes of 16-bit ones.

Pages hold K and V divided by a scale each, rounded to e4m3 (4 bits of exponent, 3 of mantissa; at
most 448). Kernels read them as they are: the scale of K is part of the factor on the scores, and
that of V a factor on the output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chai_attention.errors import AttentionInputError

FLOAT8 = torch.float8_e4m3fn
LARGEST = float(torch.finfo(FLOAT8).max)


def narrow(states: Tensor, scale: float = 1.0) -> Tensor:
    """Return ``states / scale`` as 8-bit floats; what is too large becomes the largest.

    Args:
        states: K or V of any shape, float32, bfloat16, float16 or float64.
        scale: what pages are divided by.
    """
    if scale != 1:
        states = states.float() * (1 / scale)
    return states.clamp(-LARGEST, LARGEST).to(FLOAT8)


def as_stored(states: Tensor, scale: float = 1.0) -> Tensor:
    """Return what is read back after ``states`` were written to 8-bit pages, in their own dtype.

    All of e4m3's numbers are numbers of the 16-bit dtypes too, so nothing else is rounded. A prompt
    that attends to this gets the answer that it gets from pages, however it is cut into chunks.
    """
    return narrow(states, scale).to(states.dtype)


def widen_pages(pages: Tensor, used: Tensor, out: Tensor) -> None:
    """Copy pages into memory of a wider dtype.

    Args:
        pages: ``[P, N, heads, D]``; the numbers of a page are consecutive in memory.
        used: ``[n]`` int64, the pages to copy.
        out: ``[n, N, heads, D]``, contiguous, of any dtype that holds their numbers.

    Raises:
        AttentionInputError: other shapes or memory.
    """
    whole = pages.shape[0] < 2 or pages[0].is_contiguous()
    if out.shape != (used.shape[0], *pages.shape[1:]) or not out.is_contiguous() or not whole:
        raise AttentionInputError(
            f"{used.shape[0]} pages of shape {list(pages.shape[1:])}, each one run of memory, do "
            f"not fit into {list(out.shape)}"
        )
    if not out.numel():
        return
    if pages.device.type == "cuda":
        from chai_attention.ops.triton import widen

        widen.widen_pages(pages, used, out)
    else:
        out.copy_(pages.view(torch.uint8)[used].view(pages.dtype))
