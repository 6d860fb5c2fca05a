"""The probe window on the GPU: attention maps of all heads, and the effect of exchanging them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from chai_attention.ops.probe import Windows
from chai_attention.ops.triton.decode import _scores_base2, padded

MAX_WINDOW = 128  # maps of more do not fit the registers of a program
MAX_VALUE_WINDOW = 64  # and differences of maps its shared memory
WARPS = {16: 4, 32: 4, 64: 4, 128: 8}  # by tokens of the window, padded
BLOCK = 64  # columns of Q, K and V that a program multiplies at a time
# products of float32 in three TF32 products, which loses nothing that could change a choice
PRECISION = "tf32x3"


@triton.jit
def _maps(
    q_ptr, k_ptr, token_ptr, count_ptr, head_ptr, out_ptr, scale, softcap,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks,
    HEADS: tl.constexpr, GROUP: tl.constexpr, W: tl.constexpr, WP: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_TOKENS: tl.constexpr, HAS_HEADS: tl.constexpr,
):  # fmt: skip
    """Causal probabilities of one head, ``[W, W]``; zeros in the future."""
    place, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    head = place
    if HAS_HEADS:
        head = tl.load(head_ptr + place)
    i = tl.arange(0, WP)
    at = i.to(tl.int64)
    scored = i < W
    if HAS_TOKENS:
        # without scores all heads' maps are alike, which moves no head from another
        scored = i < tl.load(count_ptr + row)
        at = tl.load(token_ptr + row * W + i, mask=i < W, other=0)
    q_base = q_ptr + row * stride_qb + head * stride_qh + at[:, None] * stride_qs
    k_base = k_ptr + row * stride_kb + (head // GROUP) * stride_kh + at[:, None] * stride_ks
    s = tl.zeros([WP, WP], dtype=tl.float32)
    for first in range(0, D, BLOCK):
        d = first + tl.arange(0, BLOCK)[None, :]
        mask = (i < W)[:, None] & (d < D)
        q = tl.load(q_base + d, mask=scored[:, None] & (d < D), other=0.0).to(tl.float32)
        k = tl.load(k_base + d, mask=mask, other=0.0).to(tl.float32)
        s = tl.dot(q, tl.trans(k), s, input_precision=PRECISION)
    s = _scores_base2(s * scale, softcap, HAS_SOFTCAP)
    s = tl.where(i[None, :] <= i[:, None], s, float("-inf"))
    p = tl.exp2(s - tl.max(s, axis=1)[:, None])
    p = p / tl.sum(p, axis=1)[:, None]
    out = out_ptr + (row * HEADS + place) * (W * W) + i[:, None] * W + i[None, :]
    tl.store(out, p, mask=(i < W)[:, None] & (i < W)[None, :])


@triton.jit
def _distances(
    map_ptr, v_ptr, out_ptr, stride_vb, stride_vh, stride_vs,
    HEADS: tl.constexpr, GROUP: tl.constexpr, W: tl.constexpr, WP: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Squared change of one head's output for the maps of every head.

    The change is a difference of maps times V. Its square needs only the inner products of V's
    rows, ``[W, W]``; rows of maps have the same sum, so V may be centred, which keeps its mean
    from drowning the difference.
    """
    head, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i = tl.arange(0, WP)
    base = v_ptr + row * stride_vb + (head // GROUP) * stride_vh
    base += i.to(tl.int64)[:, None] * stride_vs
    products = tl.zeros([WP, WP], dtype=tl.float32)
    for first in range(0, D, BLOCK):
        d = first + tl.arange(0, BLOCK)[None, :]
        mask = (i < W)[:, None] & (d < D)
        v = tl.load(base + d, mask=mask, other=0.0).to(tl.float32)
        v = tl.where(mask, v - tl.sum(v, axis=0)[None, :] / W, 0.0)
        products = tl.dot(v, tl.trans(v), products, input_precision=PRECISION)
    inside = (i < W)[:, None] & (i < W)[None, :]
    at = i[:, None] * W + i[None, :]
    maps = map_ptr + row * HEADS * (W * W)
    own = tl.load(maps + head * (W * W) + at, mask=inside, other=0.0)
    out = out_ptr + (row * HEADS + head) * HEADS
    for other in range(HEADS):
        change = tl.load(maps + other * (W * W) + at, mask=inside, other=0.0) - own
        square = change * tl.dot(change, products, input_precision=PRECISION)
        tl.store(out + other, tl.maximum(tl.sum(square), 0.0))


def window_maps(
    query: Tensor, key: Tensor, *, scale: float, softcap: float | None = None
) -> Tensor:
    """Causal attention maps of every head over the window.

    Args:
        query: ``[B, H, W, D]``, any strides but the last; W up to 128.
        key: ``[B, G, W, D]``, the same.
        scale: factor on the scores.
        softcap: as in `ops.reference.clustered_attention`.

    Returns:
        ``[B, H, W * W]`` float32.
    """
    batch, heads, window = query.shape[:3]
    return _run_maps(
        query, key, None, (batch, heads, window), heads // key.shape[1], scale, softcap,
        (*query.stride()[:3], *key.stride()[:3]),
    )  # fmt: skip


def packed_maps(
    query: Tensor, key: Tensor, windows: Windows, *, scale: float, softcap: float | None = None
) -> Tensor:
    """The same of windows among packed tokens.

    Args:
        query: ``[T, H, D]``, any strides but the last.
        key: ``[T, G, D]``, the same.
        windows: which tokens, and of which heads.
        scale: factor on the scores.
        softcap: as in `ops.reference.clustered_attention`.

    Returns:
        ``[B, heads, W * W]`` float32.
    """
    heads = query.shape[1] if windows.heads is None else windows.heads.shape[0]
    batch, window = windows.tokens.shape
    return _run_maps(
        query, key, windows, (batch, heads, window), query.shape[1] // key.shape[1], scale,
        softcap, (0, query.stride(1), query.stride(0), 0, key.stride(1), key.stride(0)),
    )  # fmt: skip


def _run_maps(
    query: Tensor,
    key: Tensor,
    windows: Windows | None,
    size: tuple[int, int, int],
    group: int,
    scale: float,
    softcap: float | None,
    strides: tuple[int, ...],
) -> Tensor:
    batch, heads, window = size
    dim = query.shape[-1]
    maps = torch.empty(batch, heads, window * window, dtype=torch.float32, device=query.device)
    wide = padded(window)
    precision = PRECISION if query.dtype == torch.float32 else "tf32"  # exact for 16 bits
    tokens, real, chosen = windows or (None, None, None)
    _maps[(heads, batch)](
        query, key, tokens, real, chosen, maps, scale, softcap or 1.0, *strides,
        HEADS=heads, GROUP=group, W=window, WP=wide, D=dim,
        BLOCK=min(BLOCK, padded(dim)), PRECISION=precision,
        HAS_SOFTCAP=softcap is not None, HAS_TOKENS=tokens is not None,
        HAS_HEADS=chosen is not None, num_warps=WARPS[wide],
    )  # fmt: skip
    return maps


def output_distances(maps: Tensor, value: Tensor) -> Tensor:
    """`ops.probe.window_output_distances` of maps that are known.

    Args:
        maps: ``[B, H, W * W]`` of `window_maps`.
        value: ``[B, G, W, Dv]``, any strides but the last.

    Returns:
        ``[B, H, H]`` float32.
    """
    batch, heads, _ = maps.shape
    groups, window, dim = value.shape[1:]
    out = torch.empty(batch, heads, heads, dtype=torch.float32, device=maps.device)
    wide = padded(window)
    _distances[(heads, batch)](
        maps, value, out, *value.stride()[:3],
        HEADS=heads, GROUP=heads // groups, W=window, WP=wide, D=dim,
        BLOCK=min(BLOCK, padded(dim)), PRECISION=PRECISION,
        num_warps=WARPS[wide],
    )  # fmt: skip
    return out
