"""Few queries behind a long context, which several programs share, against the definition."""

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from chai_attention.errors import AttentionInputError
from chai_attention.membership import Membership
from chai_attention.ops.call import AttentionCall, PackedKV, PackedQueries, PagedKV
from chai_attention.ops.fp8 import FLOAT8
from chai_attention.ops.triton import backend, context_parts, launch_prefill, packed_window
from chai_attention.ops.triton.context_parts import count_of, join, memory_of
from chai_attention.ops.triton.head_tiles import head_tiles_of
from helpers import random_membership
from kernel_calls import DEVICE, Config
from random_cases import check_sizes

pytestmark = pytest.mark.usefixtures("nan_memory")
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
# a context that ends within a block, ones shorter than a part, none, and a row of padding
SIZES = {
    "one": [(5, 405)], "tile": [(64, 300)], "mixed": [(33, 333), (1, 20), (7, 7), (16, 170)],
    "padding": [(7, 207), (1, 0)], "two tiles": [(140, 350)],
}  # fmt: skip
WINDOW = {"recent": 32, "sinks": 4, "page": 16, "local_page": 48}
# heads, K/V heads, clusters, streaming heads, head size
CASES: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "clusters": ("paged prefill", (6, 6, 2, 0, 32), {}),
    "grouped, softcap": ("paged prefill", (6, 2, 3, 0, 48), {"softcap": 3.0, "value_dim": 24}),
    "8-bit pages": ("paged prefill", (4, 4, 2, 0, 64), {"stored": FLOAT8, "page": 32}),
    "own ids, probe": ("paged prefill", (6, 6, 2, 0, 32), {"tables": "rows", "probe_end": 5}),
    "large heads": ("paged prefill", (3, 3, 1, 0, 128), {"dtype": HALF, "tail": 3}),
    "window": ("paged window", (6, 6, 2, 0, 32), {**WINDOW, "tail": 3}),
    "window, streaming": ("paged window", (7, 7, 2, 3, 32), {**WINDOW, "tables": "rows"}),
    "window, grouped": ("paged window", (6, 3, 2, 2, 48), {**WINDOW, "value_dim": 24}),
    "window, 8-bit": ("paged window", (4, 4, 2, 1, 64), {**WINDOW, "stored": FLOAT8}),
    "all stream": ("paged window", (3, 3, 0, 3, 32), WINDOW),
    "many sinks": ("paged window", (4, 4, 2, 1, 32), {**WINDOW, "sinks": 40, "recent": 3}),
    "no sinks": ("paged window", (5, 5, 2, 1, 32), {**WINDOW, "sinks": 0, "offsets": False}),
    "long window": ("paged window", (5, 5, 2, 1, 32), {**WINDOW, "recent": 250, "softcap": 3.0}),
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("kind", "heads", "options"), CASES.values(), ids=CASES)
def test_parts_together_are_the_definition(kind, heads, options, sizes, monkeypatch) -> None:
    monkeypatch.setattr(context_parts, "LEAST_KEYS", 32)
    monkeypatch.setattr(context_parts, "processors", lambda device: 64)
    counts = []

    def joined(sums, *more):
        counts.append(len(sums))
        join(sums, *more)

    for module in (launch_prefill, packed_window):
        monkeypatch.setattr(module, "join", joined)
    given = {"dtype": torch.float32, "value_dim": heads[-1], "lse": False, **options}
    total, kv_heads, clusters, streaming, dim = heads
    check_sizes(Config(kind, total, kv_heads, clusters, dim, streaming=streaming, **given), sizes)
    if len(sizes) == 1:  # where all heads stream nothing is far
        assert bool(counts) == bool(clusters)
    assert all(count > 1 for count in counts)


def paged(batch: int, most: int, size: int, heads: int = 4) -> tuple[PackedQueries, PagedKV]:
    starts = torch.arange(batch + 1, dtype=torch.int32, device=DEVICE) * most
    query = torch.zeros(batch * most, heads, 16, device=DEVICE, dtype=HALF)
    pages = torch.zeros(2, 16, heads, 16, device=DEVICE, dtype=HALF)
    table = torch.zeros(batch, -(-size // 16), dtype=torch.int32, device=DEVICE)
    lengths = torch.full((batch,), size, dtype=torch.int32, device=DEVICE)
    return PackedQueries(query, starts, most), PagedKV(pages, pages, table, lengths)


@pytest.mark.parametrize(
    ("batch", "queries", "size", "processors", "want"),
    [
        (1, 40, 8192, 132, 16), (1, 64, 1024, 132, 4), (4, 40, 8192, 132, 8),
        (40, 40, 8192, 132, 1), (1, 65, 8192, 132, 16), (4, 129, 8192, 132, 4),
        (1, 257, 8192, 132, 1), (1, 1, 300, 132, 1), (1, 3, 4096, 20, 5),
    ],
)  # fmt: skip
def test_parts_fill_the_processors(batch, queries, size, processors, want, monkeypatch) -> None:
    monkeypatch.setattr(context_parts, "processors", lambda device: processors)
    member = Membership.identity(4, device=DEVICE)
    rows = 64 if queries <= 64 else 128
    found = count_of(*paged(batch, queries, size), member, head_tiles_of(member, 1), rows)
    assert found == want


def test_where_scores_are_shared_two_programs_run_on_a_processor(monkeypatch) -> None:
    monkeypatch.setattr(context_parts, "processors", lambda device: 9)
    shared = random_membership(4, 2, 1).to(DEVICE)
    head_tiles = head_tiles_of(shared, 2)
    given = (*paged(1, 40, 8192), shared, head_tiles)
    assert count_of(*given, 64) == 18 // head_tiles.count
    assert count_of(*given, 128) == 9 // head_tiles.count


def test_tables_on_the_device_count_as_usual_clusters(monkeypatch) -> None:
    """Memberships of requests have tables for the worst clusters there could be.

    Of clusters of any sizes, two members a head tile, every other one has half of one to spare.
    """
    monkeypatch.setattr(context_parts, "processors", lambda device: 40)
    member = random_membership(8, 2, 3).to(DEVICE)
    head_tiles = replace(head_tiles_of(member, 2), exact=False)
    assert head_tiles.count > 4
    assert count_of(*paged(1, 100, 8192, 8), member, head_tiles, 128) == 40 // 5


def test_hopper_shares_contexts_where_that_is_worth_it(monkeypatch) -> None:
    """Its own kernel is faster than few parts, and than any where there are many queries."""
    member = Membership.identity(4, device=DEVICE)
    found = []
    for processors, queries in ((4, 100), (11, 100), (12, 100), (24, 256), (99, 257)):
        monkeypatch.setattr(context_parts, "processors", lambda device, n=processors: n)
        found.append(backend.shares_contexts(*paged(1, queries, 8192), member))
    assert found == [False, False, True, True, False]


def test_prompts_without_context_have_no_parts() -> None:
    queries, _ = paged(1, 40, 4096)
    key = torch.zeros(40, 4, 16, device=DEVICE)
    member = Membership.identity(4, device=DEVICE)
    assert count_of(queries, PackedKV(key, key), member, head_tiles_of(member, 1), 64) == 1


@pytest.mark.parametrize(("starts", "most"), [([0, 0], 0), ([0], 5)])
def test_padding_without_any_query_is_left_alone(starts, most) -> None:
    _, kv = paged(len(starts) - 1, 0, 4096)
    query = torch.zeros(5, 4, 16, device=DEVICE, dtype=HALF)
    starts = torch.tensor(starts, dtype=torch.int32, device=DEVICE)
    call = AttentionCall(Membership.identity(4, device=DEVICE), 1.0)
    out = torch.full_like(query, 7.0)
    queries = PackedQueries(query, starts, most)
    backend.of_device(query.device).packed_prefill(queries, kv, call, out, None)
    assert (out == 7.0).all()


def test_all_layers_of_a_step_use_the_same_memory() -> None:
    """Some dozen megabytes each would be taken, and given back, in every layer."""
    out, step = torch.zeros(5, 6, 24, device=DEVICE), {}
    first, again, other = (memory_of(n, out.clone(), step) for n in (3, 3, 2))
    assert all(a is b for a, b in zip(first, again, strict=True))
    assert [x.shape for x in other] == [(2, 5, 6, 24), (2, 5, 6)]
    assert memory_of(3, out, {})[0] is not first[0]
    assert memory_of(3, out)[0] is not memory_of(3, out)[0]


def test_pages_that_layers_share_are_refused_as_any_others() -> None:
    queries, kv = paged(1, 40, 4096)
    call, out = AttentionCall(Membership.identity(4, device=DEVICE), 1.0), queries.query.clone()
    strided = torch.zeros(2, 16, 4, 32, device=DEVICE, dtype=HALF)[..., ::2]
    for key, value in ((kv.key, kv.value.float()), (kv.key, strided), (kv.key.float(),) * 2):
        pages = replace(kv, key=key, value=value, shared={})
        for _ in range(2):
            with pytest.raises(AttentionInputError):
                backend.TRITON.packed_prefill(queries, pages, call, out, None)


def test_the_mean_leaves_alone_what_is_behind_the_last_sequence() -> None:
    torch.manual_seed(0)
    out = torch.full((5, 6, 24), 7.0, device=DEVICE)
    sums, lse = memory_of(3, out)
    assert (sums.shape, lse.shape) == ((3, 5, 6, 24), (3, 5, 6))
    sums.normal_(), lse.normal_()
    lse[1, 2], lse[0, 3] = float("-inf"), float("-inf")
    sums[1, 2], sums[0, 3] = torch.nan, torch.nan  # parts without keys write nothing
    starts = torch.tensor([0, 4, 4], dtype=torch.int32, device=DEVICE)
    head_tiles = head_tiles_of(Membership.identity(6, device=DEVICE), 1)
    join(sums, lse, starts, head_tiles, out)
    share = (lse * torch.log(torch.tensor(2.0))).softmax(0)[..., None]  # an lse to the base of 2
    want = (sums.nan_to_num() * share).sum(0)
    torch.testing.assert_close(out[:4], want[:4])
    assert (out[4] == 7.0).all()
