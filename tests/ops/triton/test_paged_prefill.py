"""Prefill over pages: the kernel against the definition, on a GPU if there is one."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

pytest.importorskip("triton")

from chai_attention.ops import Probe, reference
from helpers import random_membership
from op_calls import dispatched, kernels
from packed_cases import packed_case

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
HALF = torch.bfloat16 if CUDA else torch.float16  # the interpreter multiplies bfloat16 wrongly


@pytest.fixture(autouse=True)
def _nan_memory(nan_memory):
    """Fresh memory holds NaN."""


def loss_of(case):
    """What torch's own attention loses on these inputs."""
    starts, worst = case.starts.tolist(), 0.0
    for b, (start, stop) in enumerate(pairwise(starts)):
        key, value = (x[b].to(DEVICE) for x in (case.caches.full_keys, case.caches.full_values))
        query = case.query[start:stop].transpose(0, 1)
        group = query.shape[0] // key.shape[0]
        states = [query, *(x.repeat_interleave(group, 0) for x in (key, value))]
        mask = reference.visible(1, stop - start, key.shape[1], None, None, query.device)[0]
        exact = F.scaled_dot_product_attention(*(x.double() for x in states), attn_mask=mask)
        low = F.scaled_dot_product_attention(*states, attn_mask=mask)
        if start < stop:
            worst = max(worst, (low.double() - exact).abs().max().item())
    return worst


def check(
    heads, kv_heads, clusters, queries, contexts, dim, dtype, *, page=16, value_dim=None,
    one_buffer=False, softcap=None, probe_end=0, shared=False, tail=3,
):  # fmt: skip
    batch = len(queries)
    tables = random_membership(heads, clusters, 1 if shared else batch + 2, kv_heads)
    rows = None if shared else torch.randint(0, batch + 2, (batch,), dtype=torch.int32)
    member = tables.expand(batch) if rows is None else tables.select(rows.long())
    case = packed_case(
        member, queries, contexts, page, dim, value_dim or dim, dtype, DEVICE, one_buffer, tail
    )
    caches, total = case.caches, sum(queries)
    probe = Probe(case.query, case.key, case.value, probe_end) if probe_end else None
    options = {"most_queries": max(queries), "scale": dim**-0.5, "softcap": softcap}
    want, want_lse = dispatched.paged_prefill(
        case.query.double().cpu(), caches.keys.double().cpu(), caches.values.double().cpu(),
        caches.table.cpu(), tables, query_starts=case.starts.cpu(), lengths=caches.lengths.cpu(),
        rows=rows, probe=None if probe is None else Probe(
            *(x.double().cpu() for x in probe[:3]), probe_end
        ), return_lse=True, **options,
    )  # fmt: skip
    line = torch.repeat_interleave(torch.arange(batch), torch.tensor(queries))
    line = torch.cat([line, line.new_zeros(tail)])
    slots = member.slot_heads[line].to(DEVICE)[:, :, None].expand(-1, -1, dim)
    bound = 2 * loss_of(case) + 4 * torch.finfo(dtype).eps
    for query in (case.query, case.query.gather(1, slots)):
        out = torch.full((total + tail, heads + 1, value_dim or dim), torch.nan, dtype=dtype)
        out = out.to(DEVICE)[:, 1:]
        _, lse = kernels.paged_prefill(
            query, caches.keys, caches.values, caches.table, tables.to(DEVICE), out,
            query_starts=case.starts, lengths=caches.lengths, probe=probe,
            rows=None if rows is None else rows.to(DEVICE), return_lse=True, **options,
        )  # fmt: skip
        assert (out[:total].double().cpu() - want[:total]).abs().max().item() <= bound
        assert out[total:].isnan().all()
        assert_close(lse[:total].cpu(), want_lse[:total], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("one_buffer", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "clusters", "dim", "page"),
    [(9, 9, 4, 48, 16), (12, 12, 1, 64, 16), (32, 32, 5, 128, 16), (9, 3, 4, 80, 32),
     (8, 8, 8, 96, 48)],
)  # fmt: skip
def test_fresh_and_continued_sequences(heads, kv_heads, clusters, dim, page, one_buffer, dtype):
    check(
        heads, kv_heads, clusters, [5, 1, 63, 0, 2], [0, 40, 30, 0, 0], dim, dtype, page=page,
        one_buffer=one_buffer,
    )  # fmt: skip


@pytest.mark.parametrize("queries", [1, 5, 63, 129])
@pytest.mark.parametrize("context", [0, 1, 65, 150])
def test_lengths(queries, context):
    check(9, 9, 3, [queries, 3], [context, 0], 64, HALF, shared=True)


@pytest.mark.parametrize("probe_end", [1, 5, 40])
@pytest.mark.parametrize(("heads", "kv_heads", "clusters"), [(9, 9, 3), (6, 2, 3)])
def test_first_tokens_of_fresh_prompts_attend_in_full(probe_end, heads, kv_heads, clusters):
    """Longer and shorter prompts than the window, and a continued one, which is left alone."""
    check(heads, kv_heads, clusters, [35, 3, 20], [0, 0, 7], 32, torch.float32, probe_end=probe_end)


def test_softcap_and_sizes_of_v():
    check(6, 6, 2, [20, 4], [0, 33], 32, torch.float32, value_dim=24, softcap=3.0, probe_end=5)


def test_sequences_without_keys_get_zeros():
    """Rows of padding in a batch of fixed size: no page, length 0."""
    member = random_membership(6, 2, 1)
    case = packed_case(member.expand(2), [7, 1], [20, 0], 16, 32, 32, torch.float32, DEVICE)
    lengths = case.caches.lengths.clone()
    lengths[1] = 0
    out = torch.empty(8, 6, 32, device=DEVICE)
    _, lse = kernels.paged_prefill(
        case.query, case.caches.keys, case.caches.values, case.caches.table, member.to(DEVICE),
        out, query_starts=case.starts, lengths=lengths, most_queries=7, scale=0.2, return_lse=True,
    )  # fmt: skip
    assert (out[7] == 0).all()
    assert (lse[7] == -torch.inf).all()
    assert not out[:7].isnan().any()


@pytest.mark.skipif(not CUDA, reason="large shapes need a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "clusters"), [(32, 32, 4), (32, 32, 16), (12, 12, 12), (32, 8, 4)]
)
def test_large(heads, kv_heads, clusters, dim, dtype):
    check(
        heads, kv_heads, clusters, [300, 1, 0, 513, 77, 128], [0, 700, 0, 1000, 3, 0], dim, dtype,
        one_buffer=True, probe_end=32,
    )  # fmt: skip
