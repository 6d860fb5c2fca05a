"""Attention maps of the probe window, all heads of all sequences in one launch."""

from __future__ import annotations

# Kernels are Triton's language in Python's syntax: only their launchers have types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-calls=False, disallow-untyped-decorators=False
import torch
import triton
import triton.language as tl
from torch import Tensor

from chai_attention.ops.triton.decode import _scores_base2, padded

MAX_WINDOW = 128  # maps of more do not fit the registers of a program


@triton.jit
def _maps(
    q_ptr, k_ptr, out_ptr, scale, softcap,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks,
    HEADS: tl.constexpr, GROUP: tl.constexpr, W: tl.constexpr, WP: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Causal probabilities of one head, ``[W, W]``; zeros in the future."""
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i, d = tl.arange(0, WP), tl.arange(0, DP)
    mask = (i < W)[:, None] & (d < D)[None, :]
    at = i.to(tl.int64)[:, None]
    q = tl.load(
        q_ptr + row * stride_qb + head * stride_qh + at * stride_qs + d[None, :],
        mask=mask, other=0.0,
    )  # fmt: skip
    k = tl.load(
        k_ptr + row * stride_kb + (head // GROUP) * stride_kh + at * stride_ks + d[None, :],
        mask=mask, other=0.0,
    )  # fmt: skip
    s = tl.dot(q.to(tl.float32), tl.trans(k.to(tl.float32)), input_precision="ieee") * scale
    s = _scores_base2(s, softcap, HAS_SOFTCAP)
    s = tl.where(i[None, :] <= i[:, None], s, float("-inf"))
    p = tl.exp2(s - tl.max(s, axis=1)[:, None])
    p = p / tl.sum(p, axis=1)[:, None]
    out = out_ptr + (row * HEADS + head) * (W * W) + i[:, None] * W + i[None, :]
    tl.store(out, p, mask=(i < W)[:, None] & (i < W)[None, :])


def window_maps(
    query: Tensor, key: Tensor, *, scale: float, softcap: float | None = None
) -> Tensor:
    """Causal attention maps of every head over the window.

    Args:
        query: ``[B, H, W, D]``, any strides but the last; W up to 128.
        key: ``[B, G, W, D]``.
        scale: factor on the scores.
        softcap: as in `ops.reference.attention`.

    Returns:
        ``[B, H, W * W]`` float32.
    """
    batch, heads, window, dim = query.shape
    maps = torch.empty(batch, heads, window * window, device=query.device)
    wide = padded(window)
    _maps[(heads, batch)](
        query, key, maps, scale, softcap or 1.0, *query.stride()[:3], *key.stride()[:3],
        HEADS=heads, GROUP=heads // key.shape[1], W=window, WP=wide, D=dim, DP=padded(dim),
        HAS_SOFTCAP=softcap is not None, num_warps=4 if wide <= 64 else 8,
    )  # fmt: skip
    return maps
