"""The serving benchmark's kinds of profiles, and the ideals it is compared with; no vLLM needed."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from chai_attention.integrations.vllm.shares import layer_shards
from chai_attention.profile import ClusterProfile
from chai_attention.runtime.shape import ModelShape

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import serving_rates
from parts import Parts
from serving import utilization
from serving_ideal import H100, Ideal, Rates
from serving_kinds import KINDS, SHAPES, TINY, stock_of
from serving_loads import FULL, LOADS, requests_of, scale_of
from serving_table import table

CLUSTERED = [name for name, kind in KINDS.items() if kind.own is not None]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("shapes", [SHAPES, TINY], ids=["full", "tiny"])
@pytest.mark.parametrize("name", CLUSTERED)
def test_profiles_of_kinds_fit_their_models_and_keep_what_ideals_count(name, shapes, ranks) -> None:
    kind = KINDS[name]
    shape = shapes[kind.model]
    model = ModelShape(
        "llama" if shape.learned is None else "opt", shape.layers, shape.heads, shape.kv_heads,
        shape.head_dim, (True,) * shape.layers, shape.hidden,
    )  # fmt: skip
    profile = ClusterProfile.from_json(kind.profile(shape, ranks))
    profile.check(model)
    wanted = [Ideal(shape, kind, ranks).kept(*layer) for layer in kind.layers(shape, ranks)]
    for layers in (layer_shards(model, profile, ranks, rank) for rank in range(ranks)):
        assert [(layer.kept * ranks, layer.kept_values * ranks) for layer in layers] == wanted


def test_ideals_are_those_of_the_bytes() -> None:
    def ideal(name: str) -> Ideal:
        return Ideal(SHAPES[KINDS[name].model], KINDS[name])

    full = ideal("stock").cache_bytes(8192)
    assert full == 8192 * 524_288
    # 28 of 64 heads, and 36 more in the window and the sinks
    assert ideal("default").cache_bytes(8192) == full * 28 / 64 + 132 * 524_288 * 36 / 64
    assert ideal("grouped streaming").cache_bytes(100) == ideal("grouped stock").cache_bytes(100)
    assert full / ideal("published").cache_bytes(8192) == pytest.approx(1 / (1 - 0.1914), rel=1e-3)
    # the schedule that is published for LLaMA-33B, and its shares of OPT-66B
    for name in ("33b", "66b"):
        kept, full = (ideal(f"{name} {kind}").cache_bytes(8) for kind in ("published", "stock"))
        assert kept / full == pytest.approx(1 - 0.265, abs=5e-4)
    for name in CLUSTERED:
        other = ideal(stock_of(name))
        assert ideal(name).step([8192] * 14) < other.step([8192] * 14)
        assert ideal(name).prompt(8192) < other.prompt(8192)


def test_engines_leave_room_for_kernels_that_are_loaded_between_steps() -> None:
    # as an H100 tells before the engine's CUDA context is there
    total, free = int(79.65 * 2**30), int(79.1 * 2**30)
    context = 530 * 2**20
    assert free - context - utilization(free, total) * total >= 1000 * 2**20


@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.parametrize("tiny", [False, True])
def test_requests_fit_their_model(model: str, tiny: bool) -> None:
    shape, scale = (TINY if tiny else SHAPES)[model], scale_of(model, tiny)
    assert scale.longest <= (shape.learned or scale.longest)
    assert max(case.length for case in scale.cases) <= scale.longest
    for load in scale.loads:
        system = scale.system if load == "shared prompt" else 0
        assert max(map(sum, requests_of(load, scale))) + system <= scale.longest


@pytest.mark.parametrize("name", LOADS)
def test_ideal_loads_gain_by_capacity_and_by_prefixes(name: str) -> None:
    requests = requests_of(name, FULL)[:60]
    stock, ours = (Ideal(SHAPES["llama-7b"], KINDS[kind]) for kind in ("stock", "default"))
    room = 40_000 * 524_288
    times = [one.load(requests, room, 640, 8192) for one in (stock, ours)]
    assert times[1] < times[0]
    assert stock.load(requests, room / 5, 640, 8192) > times[0]
    longer = [(prompt + 1000, output) for prompt, output in requests]
    alone = stock.load(longer, room, 640, 8192)
    assert times[0] * 0.9 < stock.load(longer, room, 640, 8192, shared=1000) < alone


H200 = Rates(4.3e12, 6.75e14)
BLOCK = 8 * 2**20  # bytes of a page of 16 tokens of LLaMA-7B
ROOM = 15_777 * BLOCK  # of the K,V cache of an H200


def test_what_mixed_loads_could_gain_depends_on_the_card_and_steps_do_not() -> None:
    def gains(rates: Rates) -> list[float]:
        stock, ours = (
            Ideal(SHAPES["llama-7b"], KINDS[kind], rates=rates) for kind in ("stock", "default")
        )
        requests = requests_of("long prompts", FULL)
        loads = (one.load(requests, ROOM, 640, 8192) for one in (stock, ours))
        steps = (one.step([8192] * 14) for one in (stock, ours))
        prompts = (one.prompt(8192) for one in (stock, ours))
        return [a / b for a, b in (loads, steps, prompts)]

    (load, *others), (other_load, *same) = gains(H100), gains(H200)
    assert same == pytest.approx(others)
    # memory that is faster, with products that are nearly as fast: there is less to gain by bytes
    assert other_load < load - 0.01
    # at twice the rates everything takes half the time
    assert gains(Rates(*(2 * rate for rate in H100))) == pytest.approx([load, *others])


def _write_results(folder: Path, kind: str, **parts: object) -> None:
    """A result file of `serving.py` with one load."""
    results = Parts(folder / f"serving-{kind}.json", {"tiny": False, "options": {}})
    capacity = {"blocks": ROOM // BLOCK, "block_bytes": BLOCK, "requests": 30.8}
    loads = {"long prompts": {"output_tokens_s": 700.0}}
    for part, value in {
        "kind": kind, "capacity": capacity, "cases": {}, "throughput": loads, **parts,
    }.items():  # fmt: skip
        results.add(part, value)


@pytest.mark.parametrize("rates", [None, H200], ids=["a file without", "measured"])
def test_tables_take_the_rates_of_the_baselines_file_for_both_sides(tmp_path, rates) -> None:
    _write_results(tmp_path, "stock", **({} if rates is None else {"rates": rates._asdict()}))
    _write_results(tmp_path, "default", rates=Rates(1e12, 1e15)._asdict())  # of another card
    requests = requests_of("long prompts", FULL)
    stock, ours = (
        Ideal(SHAPES["llama-7b"], KINDS[kind], rates=rates or H100).load(requests, ROOM, 640, 8192)
        for kind in ("stock", "default")
    )
    text = table(tmp_path)
    assert f"700 (**1.000x**, ideal {stock / ours:.2f}x)" in text
    first = (
        "Ideals at 3.00 TB/s and 600 TFLOP/s, about an H100's, as the baseline's file has none:"
        if rates is None
        else "Ideals at 4.30 TB/s and 675 TFLOP/s, measured in the baseline's engine:"
    )
    assert text.splitlines()[0] == first


def test_a_table_without_a_baseline_says_that_its_rates_are_assumed(tmp_path) -> None:
    _write_results(tmp_path, "default", rates=H200._asdict())
    assert "3.00 TB/s and 600 TFLOP/s, about an H100's" in table(tmp_path).splitlines()[0]


@pytest.mark.parametrize("shared", [False, True], ids=["a cache a layer", "views of one buffer"])
def test_rates_are_those_of_what_the_engine_holds(monkeypatch, shared) -> None:
    passes = []

    def pass_us(calls, device):
        for call in calls:
            call()
        passes.append([(call.func, [part.shape for part in call.args]) for call in calls])
        return 1.0

    monkeypatch.setattr(serving_rates, "pass_us", pass_us)
    monkeypatch.setattr(serving_rates, "READ_S", 0)
    monkeypatch.setattr(serving_rates, "MULTIPLY_S", 0)
    monkeypatch.setattr(serving_rates, "CHUNK", 1000)
    monkeypatch.setattr(serving_rates, "TOKENS", 64)
    monkeypatch.setattr(serving_rates, "ROWS", 80)
    model = torch.nn.ModuleDict({
        "norm": torch.nn.LayerNorm(32), "small": torch.nn.Linear(32, 32),
        "up": torch.nn.Linear(32, 96), "down": torch.nn.Linear(96, 32),
    }).to(torch.bfloat16)  # fmt: skip
    if shared:
        caches = list(torch.zeros(5, 2, 4, 16, dtype=torch.bfloat16).permute(1, 0, 2, 3))
    else:
        caches = [torch.zeros(n, 2, 4, 8, dtype=torch.uint8).transpose(0, 1) for n in (3, 20)]
    before = [cache.clone() for cache in caches]
    runner = SimpleNamespace(kv_caches=caches)
    worker = SimpleNamespace(model_runner=runner, get_model=lambda: model)
    found = serving_rates.measure_rates(worker)
    # a pass takes a microsecond: 1,280 bytes of cache, 2 x 96 x 32 numbers of the large weights
    assert found["bytes_s"] == pytest.approx(2 * 96 * 32 * 2 * 1e6)
    assert found["operations_s"] == pytest.approx(8 * 2 * 64 * 80 * 32 * 1e6)
    (sums, rows, products) = passes[1::2]  # behind one of each that does not count
    assert [shapes for _, shapes in sums] == [[(320,)]]
    assert [shapes for _, shapes in rows] == [[(1, 32), (96, 32)], [(1, 96), (32, 96)]]
    assert [shapes for _, shapes in products] == [[(64, 32), (32, 80)]] * 8
    assert all(map(torch.equal, caches, before))
    assert Rates(**found)
