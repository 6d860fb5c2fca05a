"""Chunks of requests over far and near pages, against the definition; no vLLM needed."""

from types import SimpleNamespace

import pytest
import torch

from chai_attention.errors import UnsupportedModelError
from chai_attention.integrations.vllm.layers import ServedLayer
from chai_attention.integrations.vllm.memberships import PageMemberships, full_tokens
from chai_attention.integrations.vllm.pages import PageLayout
from chai_attention.integrations.vllm.per_request import Request, from_pages
from chai_attention.integrations.vllm.request_table import RequestTable
from chai_attention.integrations.vllm.step_rows import Row, Rows
from chai_attention.membership import Membership
from chai_attention.ops import reference, windowed
from chai_attention.ops.cache_write import write_paged
from chai_attention.ops.near_pages import NearPages
from chai_attention.ops.packed import paged_near
from chai_attention.runtime.plan import LayerPlan

DIM, PAGE = 16, 16


def served(rep: tuple[int, ...], groups: int, recent: int, sinks: int, offsets) -> ServedLayer:
    kept = Membership.from_representatives(torch.tensor(rep), kv_heads=groups).kept_keys
    table = tuple(map(tuple, offsets.tolist()))
    plan = LayerPlan(
        0, len(rep), groups, len(set(rep)), 8, "scores", rep,
        recent=recent, sinks=sinks, offsets=table,
    )  # fmt: skip
    return ServedLayer(plan, kept, rep)


@pytest.mark.parametrize(
    ("rep", "groups"),
    [((0, 0, 2, 2, 0, 5), 6), ((0, 1, 0, 1, 4, 4), 3), ((0, 0, 0, 0), 4), ((0, 1, 0, 1), 2)],
)
@pytest.mark.parametrize("recent", [1, 5, 33])
@pytest.mark.parametrize("chunks", [[40], [3, 1, 20, 1, 1, 14], [1] * 12, [2, 38]])
def test_window_does_not_depend_on_chunks(
    rep: tuple[int, ...], groups: int, recent: int, chunks: list[int]
) -> None:
    sinks, heads, near_page = 3, len(rep), 8
    offsets = torch.randn(heads, heads)
    layer = served(rep, groups, recent, sinks, offsets)
    layout, member = layer.layout(DIM, DIM), layer.membership()
    pages = layout.split(torch.full((8, 1, PAGE, layout.numbers_per_token), torch.nan))
    near_layout = layer.near_layout(DIM, DIM)
    assert near_layout is not None
    near_cache = torch.full((12, 1, near_page, near_layout.numbers_per_token), torch.nan)
    length = sum(chunks)
    query, key, value = (torch.randn(length, n, DIM) for n in (heads, groups, groups))
    table, near_table = torch.tensor([5, 2, 7, 1]), torch.tensor([3, 11, 2, 9, 5])
    near = NearPages(*near_layout.split(near_cache), near_table[None].clone(), recent, sinks)
    past, outputs = 0, []
    for count in chunks:
        new = slice(past, past + count)
        position = torch.arange(past, past + count)
        write_paged(
            key[new], value[new], *pages, table[position // PAGE] * PAGE + position % PAGE, member,
            near=near, near_slot_mapping=near_table[position // near_page] * near_page
            + position % near_page,
        )  # fmt: skip
        # what lies before the window but for the first page is given back, and is somebody else's
        for index in range(1, (past - recent + 1) // near_page):
            near_cache[near_table[index]] = torch.nan
            near.block_table[0, index] = 0
        q, k, v = (x[new].transpose(0, 1)[None] for x in (query, key, value))
        keys, values = (from_pages(x, table, past + count) for x in pages)
        request = Request(q, k, v, keys, values, member, 0.3, None)
        [own] = paged_near(near, [(keys[0], values[0])], member, [count])
        offset = windowed.head_offsets(offsets, member)
        outputs.append(request.attend_near(recent, sinks, offset, own))
        past += count
    q, k, v = (x.double().transpose(0, 1)[None] for x in (query, key, value))
    wanted = reference.recent_attention(
        q, k, v, member, recent=recent, sinks=sinks, scale=0.3, offsets=offsets.double()
    )
    torch.testing.assert_close(torch.cat(outputs).double(), wanted[0], atol=2e-5, rtol=2e-5)


def test_full_attention_of_the_first_tokens() -> None:
    member = Membership.from_representatives(torch.tensor([[0, 0, 2]]))
    q, k, v = torch.randn(3, 1, 3, 9, DIM)
    keys, values = k[:, member.key_heads[0]], v[:, member.value_heads[0]]
    request = Request(q, k, v, keys, values, member, 0.3, 20.0)
    own = Membership.identity(3)
    wanted = reference.attention(q, k, v, own, scale=0.3, softcap=20.0)[0][0]
    torch.testing.assert_close(request.attend_fully(4), wanted[:4])
    shared = reference.attention(
        q[:, member.slot_heads[0]], keys, values, member, scale=0.3, softcap=20.0
    )[0][0]
    torch.testing.assert_close(request.attend(), shared)


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


def test_memberships_by_page_stay_up_to_date() -> None:
    offsets = torch.randn(4, 4)
    fallback = (0, 1, 0, 1)
    layer = served(fallback, 4, 2, 0, offsets)
    pages = PageMemberships(layer, 6, torch.device("cpu"))
    everything = pages._all
    before = everything.value_heads, everything.slot, everything.key_place  # made and remembered
    assert pages.of(torch.tensor([3], dtype=torch.int32))[0].host_rows == (fallback,)
    new = Membership.from_representatives(torch.tensor([[0, 0, 2, 2], [0, 0, 0, 3]]), 2)
    pages.publish(torch.tensor([4, 1], dtype=torch.int32), new.representatives)
    rows = torch.tensor([1, 4, 0], dtype=torch.int32)
    found, lines = pages.of(rows)
    assert lines is None
    assert found.host_rows == ((0, 0, 0, 3), (0, 0, 2, 2), fallback)
    wanted = windowed.head_offsets(offsets, found)
    torch.testing.assert_close(pages.offsets(rows), wanted)
    # tables that were made of all pages' memberships have the new rows, in place
    fresh = Membership.from_representatives(everything.representatives.clone(), 2)
    for table, name in zip(before, ("value_heads", "slot", "key_place"), strict=True):
        assert getattr(everything, name) is table
        assert torch.equal(table, getattr(fresh, name))


def test_rows_of_a_step() -> None:
    starts, lengths = torch.tensor([0, 1, 2, 9, 9]), torch.tensor([5, 1, 10, 0])
    rows = Rows(starts.numpy(), lengths.numpy(), {1: 1}.__getitem__)
    starts[:], lengths[:] = -1, -1  # vLLM describes the next step there
    want = [Row(0, 0, 1, 4, 5), Row(1, 1, 2, 0, 1), Row(2, 2, 9, 3, 10), Row(3, 9, 9, 0, 0)]
    assert list(rows) == want
    assert [row.length for row in rows] == [5, 1, 10, 0]
    assert rows.leading_decodes() == 2
    assert rows.fresh() == want[1:2]
    assert rows.behind(1) == want[1:3]
    assert rows.behind(3) == []
    assert Rows([0, 1, 2], [5, 1]).leading_decodes() == 2


def test_what_the_model_runner_knows_of_requests() -> None:
    class Runner:
        def table(self) -> RequestTable:
            return RequestTable.of_caller()

    older, newer = Runner(), Runner()
    older.input_batch = SimpleNamespace(num_prompt_tokens=[7, 3])
    newer.req_states = SimpleNamespace(prompt_len=SimpleNamespace(np=[7, 3, 9]))
    assert older.table().prompt(1, None) == 3
    assert newer.table().prompt(0, [2, 1]) == 9
    with pytest.raises(UnsupportedModelError, match="lengths of prompts"):
        Runner().table()


def test_tokens_with_full_attention_are_the_prompts_own() -> None:
    online = LayerPlan(0, 4, 4, 2, 8, "scores", probe_start=2)
    first = {
        (40, 40): 10, (40, 8): 8, (40, 7): 7, (8, 40): 8,  # generated tokens are not the prompt's
        (40, 6): 0, (6, 40): 0,  # too few to decide
    }  # fmt: skip
    for (tokens, prompt), count in first.items():
        assert full_tokens(online, Row(0, 5, 5 + tokens, 0, prompt)) == count
    assert full_tokens(online, Row(0, 5, 45, 3, 43)) == 0  # goes on
