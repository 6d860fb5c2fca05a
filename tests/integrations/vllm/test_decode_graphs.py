"""Decodes of steps that hold prompts, replayed over memory of their own; no vLLM needed."""

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from chai_attention.integrations.vllm.attend import StepAttention
from chai_attention.integrations.vllm.decode_graphs import DecodeGraphs, DecodeMemory, sizes_of
from chai_attention.integrations.vllm.layers import LayerShard, Pages
from chai_attention.integrations.vllm.memberships import FixedMembership
from chai_attention.integrations.vllm.metadata import ChaiMetadata, LocalTables
from chai_attention.integrations.vllm.request_spans import RequestSpans
from chai_attention.membership import Membership
from chai_attention.runtime.plan import LayerPlan

DIM, PAGE, LOCAL_PAGE, HEADS, LONGEST = 16, 32, 16, 6, 100
REP = (0, 0, 2, 2, 0, 5)


CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="captures need a GPU")


def shard(recent: int) -> LayerShard:
    kept = Membership.from_representatives(torch.tensor(REP), kv_heads=HEADS).kept_keys
    plan = LayerPlan(
        0, HEADS, HEADS, len(set(REP)), 8, "scores", REP, recent=recent, sinks=min(recent, 3)
    )
    return LayerShard(plan, kept, REP)


def random_step(decodes: int, prompt: int, device: str = "cpu") -> ChaiMetadata:
    """Requests that decode at random lengths, and one prompt behind them."""

    def table(pages: int, width: int) -> torch.Tensor:
        return torch.randint(0, pages, (count, width), dtype=torch.int32, device=device)

    lengths = [*torch.randint(1, LONGEST, (decodes,)).tolist(), prompt]
    new = [1] * decodes + [prompt]
    starts = torch.tensor([0, *new]).cumsum(0)
    count, tokens = len(new), sum(new)
    far, local = -(-LONGEST // PAGE), -(-LONGEST // LOCAL_PAGE)
    slots = torch.full((tokens,), -1, device=device)
    return ChaiMetadata(
        RequestSpans(starts, lengths), tokens, decodes, starts.int().to(device),
        torch.tensor(lengths, dtype=torch.int32, device=device), table(40, far + 2), slots,
        table(1, 1)[:, 0], torch.zeros_like(slots).int(), prompt, max(lengths), False,
        LocalTables(table(60, local), slots),
    )  # fmt: skip


def random_layer(
    recent: int, most: int, dim: int = DIM, **kind: Any
) -> tuple[StepAttention, Pages, DecodeMemory]:
    layer, kind = shard(recent), {"dtype": torch.float32, "device": "cpu", **kind}
    layout, local_layout = layer.layout(dim, dim), layer.local_layout(dim, dim)
    far = layout.split(torch.randn(40, 1, PAGE, layout.numbers_per_token, **kind))
    pages = Pages(*far)
    if local_layout is not None:
        local = torch.randn(60, 1, LOCAL_PAGE, local_layout.numbers_per_token, **kind)
        pages = Pages(*far, *local_layout.split(local))
    device = torch.device(kind["device"])
    attention = StepAttention(layer.plan, FixedMembership(layer, 64, device), 0.3, None)
    sizes = (PAGE, None if local_layout is None else LOCAL_PAGE)
    memory = DecodeMemory(most, LONGEST, HEADS, (dim, dim), sizes, kind["dtype"], device)
    return attention, pages, memory


@pytest.mark.parametrize("recent", [0, 5, 33])
def test_replayed_decodes_are_those_of_a_step(recent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    attention, pages, memory = random_layer(recent, most=13)
    replayed: list[int] = []

    def capture(run: Callable[[], None], memory: DecodeMemory) -> Callable[[], None]:
        size = memory.sizes[-1 - len(captured)]
        captured.append(size)

        def replay() -> None:
            replayed.append(size)
            run()

        return replay

    captured: list[int] = []
    monkeypatch.setattr("chai_attention.integrations.vllm.decode_graphs._capture", capture)
    plain, _, _ = random_layer(recent, most=13)
    attention.capture(pages, memory)
    assert captured == [13, 12, 8, 6, 4]
    # fewer decodes behind more: what stood behind the last ones is not read
    for decodes, size in [(13, 13), (2, 4), (5, 6), (12, 12), (1, 4)]:
        step = random_step(decodes, prompt=7)
        query, key, value = torch.randn(3, step.num_actual_tokens, HEADS, DIM)
        memory.query.fill_(torch.nan)
        outs = [torch.full_like(query, torch.nan) for _ in range(2)]
        for each, out in zip((attention, plain), outs, strict=True):
            each.run(step, query, key, value, pages, out)
        assert not outs[1].isnan().any()
        torch.testing.assert_close(*outs)
        assert replayed.pop() == size
        assert not replayed


@CUDA
@pytest.mark.parametrize("recent", [0, 5, 33])
@pytest.mark.parametrize("dim", [64, 128])
def test_captured_decodes_are_those_of_a_step(recent: int, dim: int) -> None:
    attention, pages, memory = random_layer(recent, 13, dim, dtype=torch.bfloat16, device="cuda")
    plain = StepAttention(attention.plan, attention.memberships, 0.3, None)
    attention.capture(pages, memory)
    for decodes in (13, 2, 5, 12, 1):
        step = random_step(decodes, 7, "cuda")
        states = torch.randn(3, step.num_actual_tokens, HEADS, dim, device="cuda")
        query, key, value = states.bfloat16()
        memory.query.fill_(torch.nan)
        outs = [torch.full_like(query, torch.nan) for _ in range(2)]
        for each, out in zip((attention, plain), outs, strict=True):
            each.run(step, query, key, value, pages, out)
        assert not outs[1].isnan().any()
        # a capture cuts contexts of any length into parts, which rounds otherwise
        torch.testing.assert_close(*outs, atol=2e-2, rtol=2e-2)


def test_all_layers_of_a_step_take_its_tables_over_once() -> None:
    _, _, memory = random_layer(5, most=9)
    first, second = random_step(3, 2), random_step(8, 2)
    assert memory.fill(first) == 4
    memory.batch(4).seq_lens[0] = 77
    assert memory.fill(first) == 4
    assert memory.batch(4).seq_lens[0] == 77
    assert memory.fill(second) == 8
    assert memory.batch(8).seq_lens.tolist() == second.seq_lens[:8].tolist()
    assert memory.fill(first) == 4
    assert memory.batch(4).seq_lens.tolist() == [*first.seq_lens[:3].tolist(), 0]


def test_steps_beyond_the_largest_graph_and_trials_run_as_they_are() -> None:
    _, _, memory = random_layer(5, most=4)
    never: list[int] = []
    graphs = DecodeGraphs(memory, attention_unused, lambda run, memory: lambda: never.append(1))
    step = random_step(5, 3)
    query, out = torch.randn(2, step.num_actual_tokens, HEADS, DIM)
    assert not graphs.run(step, query, out)
    for name in ("is_capture", "is_warm_up"):
        trial = random_step(3, 3)
        setattr(trial, name, True)
        assert not graphs.run(trial, query, out)
    assert not never


def attention_unused(*args: object) -> None:
    raise AssertionError("nothing is captured here")


@pytest.mark.parametrize("most", [1, 3, 4, 5, 64, 640, 5000])
def test_sizes_grow_by_half_at_most_and_reach_the_most_requests(most: int) -> None:
    sizes = sizes_of(most)
    assert sizes[-1] == min(most, 1024)
    assert sizes[0] == min(4, most)
    assert all(a < b <= 1.5 * a for a, b in pairwise(sizes))


@pytest.mark.parametrize(
    ("mode", "microbatches", "wanted"),
    [(None, False, False), (0, False, False), (2, False, True), (2, True, False)],
)
def test_microbatches_and_eager_engines_have_no_graphs(
    mode: int | None, microbatches: bool, wanted: bool
) -> None:
    pytest.importorskip("vllm", reason="needs vLLM (make test-vllm)")
    from chai_attention.integrations.vllm.model_state import ModelState

    model = ModelState.__new__(ModelState)
    model.config = SimpleNamespace(
        compilation_config=SimpleNamespace(cudagraph_mode=mode),
        parallel_config=SimpleNamespace(enable_dbo=microbatches),
    )
    assert model.has_graphs == wanted
