"""Memberships of requests by their first pages, and what they are decided on; no vLLM needed."""

from types import SimpleNamespace

import pytest
import torch

from chai_attention.errors import UnsupportedModelError
from chai_attention.integrations.vllm.layers import LayerShard
from chai_attention.integrations.vllm.memberships import PageMemberships, RequestTable, full_tokens
from chai_attention.integrations.vllm.request_spans import RequestSpan, RequestSpans
from chai_attention.membership import Membership
from chai_attention.ops import windowed
from chai_attention.runtime.plan import LayerPlan


def test_memberships_by_page_stay_up_to_date() -> None:
    offsets, fallback = torch.randn(4, 4), (0, 1, 0, 1)
    table = tuple(map(tuple, offsets.tolist()))
    plan = LayerPlan(0, 4, 4, 2, 8, "scores", fallback, recent=2, sinks=0, offsets=table)
    pages = PageMemberships(LayerShard(plan, 2, fallback), 6, torch.device("cpu"))
    everything = pages._all
    before = everything.value_heads, everything.slot, everything.key_place  # made and remembered
    assert pages.of(torch.tensor([3], dtype=torch.int32))[0].host_rows == (fallback,)
    new = Membership.from_representatives(torch.tensor([[0, 0, 2, 2], [0, 0, 0, 3]]), 2)
    pages._tables.put(torch.tensor([4, 1], dtype=torch.int32), new.representatives)
    first = torch.tensor([1, 4, 0], dtype=torch.int32)
    found, ids = pages.of(first)
    assert ids is None
    assert found.host_rows == ((0, 0, 0, 3), (0, 0, 2, 2), fallback)
    wanted = windowed.head_offsets(offsets, found)
    torch.testing.assert_close(pages.offsets(first), wanted)
    # tables that were made of all pages' memberships have the new rows, in place
    fresh = Membership.from_representatives(everything.representatives.clone(), 2)
    for held, name in zip(before, ("value_heads", "slot", "key_place"), strict=True):
        assert getattr(everything, name) is held
        assert torch.equal(held, getattr(fresh, name))


def test_requests_of_a_step() -> None:
    starts, lengths = torch.tensor([0, 1, 2, 9, 9]), torch.tensor([5, 1, 10, 0])
    requests = RequestSpans(starts.numpy(), lengths.numpy(), {1: 1}.__getitem__)
    starts[:], lengths[:] = -1, -1  # vLLM describes the next step there
    want = [
        RequestSpan(0, 0, 1, 4, 5),
        RequestSpan(1, 1, 2, 0, 1),
        RequestSpan(2, 2, 9, 3, 10),
        RequestSpan(3, 9, 9, 0, 0),
    ]
    assert list(requests) == want
    assert [each.seq_len for each in requests] == [5, 1, 10, 0]
    assert requests.leading_decodes() == 2
    assert requests.new() == want[1:2]
    assert requests.behind(1) == want[1:3]
    assert requests.behind(3) == []
    assert RequestSpans([0, 1, 2], [5, 1]).leading_decodes() == 2


def test_what_the_model_runner_knows_of_requests() -> None:
    class Runner:
        def table(self) -> RequestTable:
            return RequestTable.of_caller()

    older, newer = Runner(), Runner()
    older.input_batch = SimpleNamespace(num_prompt_tokens=[7, 3])
    newer.req_states = SimpleNamespace(prompt_len=SimpleNamespace(np=[7, 3, 9]))
    assert older.table().prompt_len(1, None) == 3
    assert newer.table().prompt_len(0, [2, 1]) == 9
    with pytest.raises(UnsupportedModelError, match="lengths of prompts"):
        Runner().table()


def test_tokens_with_full_attention_are_the_prompts_own() -> None:
    online = LayerPlan(0, 4, 4, 2, 8, "scores", probe_start=2)
    first = {
        (40, 40): 10, (40, 8): 8, (40, 7): 7, (8, 40): 8,  # generated tokens are not the prompt's
        (40, 6): 0, (6, 40): 0,  # too few to decide
    }  # fmt: skip
    for (tokens, prompt), count in first.items():
        assert full_tokens(online, RequestSpan(0, 5, 5 + tokens, 0, prompt)) == count
    assert full_tokens(online, RequestSpan(0, 5, 45, 3, 43)) == 0  # goes on
