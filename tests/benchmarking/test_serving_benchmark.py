"""The serving benchmark's kinds of profiles, and the ideals it is compared with; no vLLM needed."""

import sys
from pathlib import Path

import pytest

from chai_attention.integrations.vllm.shares import layer_shards
from chai_attention.profile import ClusterProfile
from chai_attention.runtime.shape import ModelShape

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from serving import utilization
from serving_ideal import Ideal
from serving_kinds import KINDS, SHAPES, TINY, stock_of
from serving_loads import FULL, LOADS, requests_of, scale_of

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
