"""HeadTiles of requests over far and local pages, against the definition; no vLLM needed."""

import pytest
import torch

from chai_attention.integrations.vllm.attend import StepAttention
from chai_attention.integrations.vllm.layers import LayerShard, PageLayout, Pages
from chai_attention.integrations.vllm.memberships import FixedMembership
from chai_attention.integrations.vllm.metadata import ChaiMetadata, LocalTables
from chai_attention.integrations.vllm.request_spans import RequestSpans
from chai_attention.membership import Membership
from chai_attention.ops import reference
from chai_attention.runtime.plan import LayerPlan
from page_writes import write_paged

DIM, PAGE, LOCAL_PAGE = 16, 16, 8
TABLE, LOCAL_TABLE = torch.tensor([[5, 2, 7, 1]]), torch.tensor([[3, 11, 2, 9, 5]])


def shard(rep: tuple[int, ...], groups: int, recent: int, sinks: int, offsets) -> LayerShard:
    kept = Membership.from_representatives(torch.tensor(rep), kv_heads=groups).kept_keys
    table = tuple(map(tuple, offsets.tolist()))
    plan = LayerPlan(
        0, len(rep), groups, len(set(rep)), 8, "scores", rep,
        recent=recent, sinks=sinks, offsets=table,
    )  # fmt: skip
    return LayerShard(plan, kept, rep)


def step_of(past: int, count: int, local_table: torch.Tensor) -> ChaiMetadata:
    """A step with ``count`` tokens of one request behind ``past`` others."""
    position = torch.arange(past, past + count)
    return ChaiMetadata(
        RequestSpans([0, count], [past + count]), count, int(count == 1),
        torch.tensor([0, count], dtype=torch.int32),
        torch.tensor([past + count], dtype=torch.int32), TABLE.int(),
        TABLE[0, position // PAGE] * PAGE + position % PAGE,
        TABLE[0, :1].int(), TABLE[0, :1].int().expand(count), count, past + count, False,
        LocalTables(
            local_table.int(),
            LOCAL_TABLE[0, position // LOCAL_PAGE] * LOCAL_PAGE + position % LOCAL_PAGE,
        ),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("rep", "groups"),
    [((0, 0, 2, 2, 0, 5), 6), ((0, 1, 0, 1, 4, 4), 3), ((0, 0, 0, 0), 4), ((0, 1, 0, 1), 2)],
)
@pytest.mark.parametrize("recent", [1, 5, 33])
@pytest.mark.parametrize("chunks", [[40], [3, 1, 20, 1, 1, 14], [1] * 12, [2, 38]])
def test_window_does_not_depend_on_chunks(
    rep: tuple[int, ...], groups: int, recent: int, chunks: list[int]
) -> None:
    sinks, heads = 3, len(rep)
    offsets = torch.randn(heads, heads)
    layer = shard(rep, groups, recent, sinks, offsets)
    layout, member = layer.layout(DIM, DIM), layer.membership()
    far = layout.split(torch.full((8, 1, PAGE, layout.numbers_per_token), torch.nan))
    local_layout = layer.local_layout(DIM, DIM)
    assert local_layout is not None
    local_cache = torch.full((12, 1, LOCAL_PAGE, local_layout.numbers_per_token), torch.nan)
    pages = Pages(*far, *local_layout.split(local_cache))
    attention = StepAttention(layer.plan, FixedMembership(layer, 1, torch.device("cpu")), 0.3, None)
    length = sum(chunks)
    query, key, value = (torch.randn(length, n, DIM) for n in (heads, groups, groups))
    out, past, local_table = torch.full_like(query, torch.nan), 0, LOCAL_TABLE.clone()
    for count in chunks:
        new, step = slice(past, past + count), step_of(past, count, local_table)
        write_paged(
            key[new], value[new], *far, step.slot_mapping, member,
            local=attention.local_pages(pages, step.local.block_table, step.block_table),
            local_slot_mapping=attention.local_slots(step, pages),
        )  # fmt: skip
        # what lies before the window but for the first page is given back, and is somebody else's
        for index in range(1, (past - recent + 1) // LOCAL_PAGE):
            local_cache[LOCAL_TABLE[0, index]] = torch.nan
            local_table[0, index] = step.local.block_table[0, index] = 0
        attention.run(step, query[new], key[new], value[new], pages, out[new])
        past += count
    q, k, v = (x.double().transpose(0, 1)[None] for x in (query, key, value))
    wanted = reference.recent_attention(
        q, k, v, member, recent=recent, sinks=sinks, scale=0.3, offsets=offsets.double()
    )
    torch.testing.assert_close(out.double(), wanted[0], atol=2e-5, rtol=2e-5)


def test_pages_are_one_run_of_memory() -> None:
    layout = PageLayout(key_heads=2, value_heads=3, head_dim=4, value_dim=5)
    cache = torch.arange(2.0 * PAGE * layout.numbers_per_token).view(2, 1, PAGE, -1)
    keys, values = layout.split(cache)
    assert keys.shape == (2, PAGE, 2, 4)
    assert values.shape == (2, PAGE, 3, 5)
    for page in range(2):
        run = torch.cat([keys[page].flatten(), values[page].flatten()])
        assert torch.equal(run, cache[page].flatten())
    values[1, 3, 2] = -1  # views, not copies
    assert bool((cache[1] == -1).any())
    assert layout.page_bytes(PAGE, 2) == cache[0].numel() * 2


def test_short_contexts_are_not_divided_like_the_longest_one_of_the_step() -> None:
    starts, lengths = [0, 1, 4, 24, 94], [5000, 10, 50, 70]
    tables = torch.zeros(4, 400, dtype=torch.int32)
    step = ChaiMetadata(
        RequestSpans(starts, lengths), 94, 1, torch.tensor(starts, dtype=torch.int32),
        torch.tensor(lengths, dtype=torch.int32), tables, torch.zeros(94).long(), tables[:, 0],
        torch.zeros(94, dtype=torch.int32), 70, 5000, False,
    )  # fmt: skip
    batches = step.prefill_batches(65)
    assert [(each.start, each.stop, each.max_seq_len) for each in batches] == [
        (1, 3, 50),
        (3, 4, 70),
    ]
    assert step.prefill_batches(71)[0].max_seq_len == 70
