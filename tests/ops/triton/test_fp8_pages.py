"""Kernels over 8-bit pages, on a GPU if there is one, else interpreted."""

import pytest
import torch

pytest.importorskip("triton")

from chai_attention.ops.fp8 import FLOAT8, as_stored, widen_pages
from chai_attention.ops.local_pages import LocalPages
from chai_attention.ops.triton import widen
from helpers import TOLERANCE, random_membership
from page_writes import launch_paged, write_paged
from paged_caches import paged_caches

pytestmark = pytest.mark.usefixtures("nan_memory")
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def rounded_down(*shape, scale):
    """Numbers a little larger than 8-bit ones, of which none is smaller than normal.

    The interpreter rounds others wrongly: upwards in the middle, and 1.99 to 1.
    """
    local = torch.randn(*shape).clamp(-3, 3).to(FLOAT8).float()
    local = torch.where(local.abs() < 2.0**-6, 0.0, local)
    return local * (1.01 + 0.01 * torch.rand(shape)) * scale


@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.3, 7.0)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_write_rounds_like_the_reference(dtype, scales):
    heads, dim, page, tokens = 5, 48, 16, 40
    member = random_membership(heads, 2)
    key, value = (rounded_down(tokens, heads, dim, scale=scale).to(dtype) for scale in scales)
    key[3, 0, 5], key[4, 1, 6] = 1e4, -1e4
    if CUDA:
        key[5:9], value[0] = torch.randn(4, heads, dim).to(dtype), 2.0**-9 * 1.5
    position = torch.arange(tokens)
    slots = torch.where(position == 11, -1, position + 3)
    local_slots = torch.where(position == 13, -1, position + 5)
    results = []
    for function, device in ((launch_paged, DEVICE), (write_paged, "cpu")):
        pages = [torch.zeros(3, page, n, dim, device=device).to(FLOAT8) for n in (2, heads)]
        local = LocalPages(
            torch.zeros(3, page, heads - 2, dim, device=device).to(FLOAT8),
            torch.zeros(3, page, 0, dim, device=device).to(FLOAT8),
            torch.zeros(1, 1, dtype=torch.int32), 8, 2,
        )  # fmt: skip
        function(
            key.to(device), value.to(device), *pages, slots.to(device), member.to(device), None,
            local, local_slots.to(device), scales,
        )  # fmt: skip
        results.append([x.view(torch.uint8) for x in (*pages, local.key)])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("kv_heads", "streaming", "windowed", "rows"),
    [(6, 0, False, 1), (6, 0, True, 1), (6, 2, True, 1), (3, 2, True, 1), (6, 0, False, 3)],
)
def test_write_also_gives_back_what_pages_hold(dtype, kv_heads, streaming, windowed, rows):
    heads, dim, value_dim, page, tokens, scales = 6, 48, 40, 16, 40, (0.5, 3.0)
    member = random_membership(heads, 2, rows, kv_heads, streaming)
    # views into one tensor, as projections leave them
    fused = torch.cat(
        [rounded_down(tokens, kv_heads, dim, scale=scale) for scale in scales], 2
    ).to(dtype)  # fmt: skip
    key, value = fused[..., :dim], fused[..., dim : dim + value_dim]
    key[3, 0, 5], value[4, 1, 6] = 1e4, -1e4
    lines = torch.arange(tokens, dtype=torch.int32) % rows if rows > 1 else None
    position = torch.arange(tokens)
    slots = torch.where(position % 11 == 1, -1, position + 3)
    local_slots = torch.where(position % 7 == 2, -1, position + 5)
    kept, kept_values = member.kept_keys, member.kept_values
    written = []
    for stored in (None, [torch.full(x.shape, torch.nan, dtype=dtype) for x in (key, value)]):
        pages = [
            torch.zeros(3, page, n, d, device=DEVICE).to(FLOAT8)
            for n, d in (
                (kept, dim), (kept_values, value_dim),
                (kv_heads - kept, dim), (kv_heads - kept_values, value_dim),
            )
        ]  # fmt: skip
        local = LocalPages(*pages[2:], torch.zeros(1, 1, dtype=torch.int32), 8, 2)
        room = None if stored is None else tuple(x.to(DEVICE) for x in stored)
        launch_paged(
            key.to(DEVICE), value.to(DEVICE), *pages[:2], slots.to(DEVICE), member.to(DEVICE),
            None if lines is None else lines.to(DEVICE), local if windowed else None,
            local_slots.to(DEVICE) if windowed else None, scales, room,
        )  # fmt: skip
        written.append([x.view(torch.uint8) for x in pages])
    for got, want, scale in zip(room, (key, value), scales, strict=True):
        assert torch.equal(got.cpu(), as_stored(want, scale))
    # and the pages are what they are without
    for got, want in zip(*written, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("one_buffer", [False, True])
def test_copies_of_pages(dtype, one_buffer):
    case = paged_caches(
        random_membership(5, 2), [100], 16, 48, 40, dtype, DEVICE, one_buffer, FLOAT8
    )  # fmt: skip
    used = torch.tensor([5, 0, 5, 2], device=DEVICE)
    for pages in (case.keys, case.values):
        raw, results = pages.view(torch.uint8), []
        raw[(raw & 0x7F) == 0x7F] = 0  # the interpreter takes NaN for a number
        for function, device in ((widen.widen_pages, DEVICE), (widen_pages, "cpu")):
            out = torch.full((4, *pages.shape[1:]), torch.nan, dtype=dtype, device=device)
            function(pages.to(device), used.to(device), out)
            results.append(out.cpu())
        want = pages.cpu().to(dtype)[used.cpu()]
        for got in results:
            assert torch.equal(got, want)
