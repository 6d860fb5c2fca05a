"""The model benchmark on tiny models: checks first, then times, bytes and ideals."""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend

from chai_attention.benchmarking import ceilings, model_checks, plain_steps, runners
from chai_attention.benchmarking import model as bench
from chai_attention.benchmarking.cases import BenchmarkError, Case
from chai_attention.benchmarking.correctness import WrongResultError
from chai_attention.benchmarking.model import ModelRequest, bench_model, random_model
from chai_attention.benchmarking.model_work import model_work, weight_bytes
from chai_attention.benchmarking.runners import Runner
from chai_attention.benchmarking.static_runner import StaticRunner
from chai_attention.errors import ProfileError
from chai_attention.integrations.transformers import enabled
from chai_attention.integrations.transformers import layer as layer_module
from chai_attention.profile import ClusterProfile
from chai_attention.runtime.shape import describe
from tiny_models import CONFIGS, tiny_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROFILE = ClusterProfile((2, 6, 3), window=5)
STATIC = ClusterProfile(
    (2, 6, 3), membership="static",
    representatives=((0, 0, 2, 2, 2, 0), (0, 1, 2, 3, 4, 5), (0, 0, 0, 3, 4, 4)),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(ceilings, "CPU_BYTES", 2**16)
    monkeypatch.setattr(ceilings, "CPU_MATRIX", 16)
    monkeypatch.setattr(runners, "LEAST_PROMPTS", 1)


def run(family="llama", profile=PROFILE, **options):
    given = {"sizes": [(2, 20)], "new_tokens": 3, "seconds": 0.0, **options}
    request = ModelRequest("tiny", profile, "a profile", **given)
    return bench_model(tiny_model(family), request, lambda *done: None)


@pytest.mark.parametrize("family", ["llama", "llama-grouped", "opt", "gpt2", "gemma2"])
def test_families(family):
    profile = PROFILE
    if family == "gemma2":
        profile = ClusterProfile((6, 2, 3), window=5)  # its first layer has a sliding window
    report = run(family, profile)
    assert json.loads(json.dumps(report, allow_nan=False))["benchmark"] == "model"
    assert [row["run"] for row in report["results"]] == ["unfused", "fused", "k = H", "CHAI"]
    assert all(check["error"] <= check["allowed"] for check in report["checks"])
    for row in report["results"]:
        if family == "gemma2" and row["run"] == "fused":
            assert "no fused attention" in row["missing"]
            continue
        assert row["ttft_us"] > 0
        assert row["tpot_us"] > 0


@pytest.mark.parametrize("profile", [PROFILE, STATIC, replace(STATIC, recent=4, sinks=1)])
def test_gains_bytes_and_ideals(profile):
    unfused, fused, whole, chai = run(profile=profile)["results"]
    assert unfused["ttft_vs_fused"] is None
    assert fused["tpot_vs_unfused"] == unfused["tpot_us"] / fused["tpot_us"]
    for name in ("ttft", "tpot"):
        best = min(fused[f"{name}_us"], whole[f"{name}_us"])
        assert chai[f"{name}_vs_fused"] == best / chai[f"{name}_us"]
    assert whole["kv_bytes"] == whole["full_kv_bytes"]
    assert chai["ideal_tpot_vs_fused"] == fused["ideal_tpot_us"] / chai["ideal_tpot_us"]
    assert chai["ideal_tpot_vs_fused"] >= 1
    assert fused["kv_bytes"] == fused["full_kv_bytes"] == 2 * 2 * 3 * 48 * 24 * 4
    assert chai["kv_bytes"] < chai["full_kv_bytes"]
    assert chai["weight_bytes"] == fused["weight_bytes"]


def test_the_model_is_as_before():
    model = tiny_model("llama")
    before = model.config._attn_implementation
    request = ModelRequest("tiny", PROFILE, "", [(1, 9)], new_tokens=1, seconds=0.0)
    bench_model(model, request, lambda *done: None)
    assert model.config._attn_implementation == before


def test_wrong_attention_of_single_tokens_ends_it(monkeypatch):
    right = layer_module.attention

    def wrong(query, *args, **options):
        out, lse = right(query, *args, **options)
        return (-out if query.shape[2] == 1 else out), lse

    monkeypatch.setattr(layer_module, "attention", wrong)
    with pytest.raises(WrongResultError, match=r"wrong logits \(k = H.*nothing is reported"):
        run()


def test_wrong_clusters_in_decode_end_it(monkeypatch):
    right = layer_module.attention

    def wrong(query, key, value, member, **options):
        out, lse = right(query, key, value, member, **options)
        return (-out if query.shape[2] == 1 and not member.is_identity else out), lse

    monkeypatch.setattr(layer_module, "attention", wrong)
    with pytest.raises(WrongResultError, match="tokens one by one"):
        run()


def test_memberships_of_the_check_are_fixed():
    for profile, groups in ((PROFILE, 6), (ClusterProfile((3, 6, 3), target="k-bytes"), 2)):
        fixed = model_checks._fixed(profile, 6, groups)
        family = "llama" if groups == 6 else "llama-grouped"
        fixed.check(describe(tiny_model(family)))
        assert fixed.membership == "static"
        assert fixed.clusters == profile.clusters
    assert model_checks._fixed(STATIC, 6, 6) is STATIC


def test_what_does_not_fit_is_named(monkeypatch):
    monkeypatch.setattr(bench, "available", lambda device: 10)
    unfused, fused, _, chai = run()["results"]
    assert "its scores need" in unfused["missing"]
    assert fused["tpot_vs_unfused"] is None
    assert chai["ttft_vs_fused"] is not None

    def full(*args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(bench, "measure_speed", full)
    assert run()["results"][3]["missing"] == "out of memory"


def test_refusals():
    with pytest.raises(ProfileError, match="2 layers in the profile"):
        run(profile=ClusterProfile((2, 2)))
    with pytest.raises(
        BenchmarkError, match="reads at most 256 tokens; the longest case needs 304"
    ):
        run(sizes=[(1, 300)])


def test_random_models_are_reproducible():
    one, two = (random_model(CONFIGS["llama"](), torch.bfloat16, "cpu", 3) for _ in "ab")
    assert one.dtype == torch.bfloat16
    pairs = zip(one.parameters(), two.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_work_of_a_model_by_counting():
    model = tiny_model("llama")
    shape, weights = describe(model), weight_bytes(model)
    linear = 3 * (4 * 48 * 48 + 3 * 48 * 40)
    assert weights == (4 * (linear + 97 * 48), 4 * 97 * 48)
    decode = model_work(Case("decode", 2, 10), shape, weights, 4, None)
    assert decode.flops == 2 * 2 * (linear + 97 * 48) + 3 * 2 * 2 * 10 * 48 * 2
    clustered = model_work(Case("decode", 2, 10), shape, weights, 4, PROFILE)
    keys = (6 - 2) + (6 - 3)  # heads whose K is not read
    assert decode.bytes - clustered.bytes == 4 * 2 * 8 * keys * (10 + 1)
    prompt = model_work(Case("prefill", 1, 7), shape, weights, 4, None)
    assert prompt.flops == 2 * (7 * linear + 97 * 48) + 3 * 2 * 28 * 48 * 2


def test_the_work_of_sliding_windows_is_on_the_keys_that_they_see():
    """Layer 0 of 3 sees the last 8 keys of 6 query heads of 16 numbers that share 2 K/V heads."""
    shape = describe(tiny_model("gemma2"))
    decode = model_work(Case("decode", 2, 50), shape, (0, 0), 4, None)
    assert decode.flops == 2 * 2 * (8 + 50 + 50) * 6 * 16 * 2
    assert decode.bytes == 2 * 4 * 16 * (4 * (8 + 50 + 50) + 3 * 2 * 6)
    prompt = model_work(Case("prefill", 1, 50), shape, (0, 0), 4, None)
    pairs = sum(min(8, query + 1) for query in range(50)) + 2 * 50 * 51 // 2
    assert prompt.flops == 2 * pairs * 6 * 16 * 2
    assert prompt.bytes == 4 * 16 * 50 * 3 * (4 + 2 * 6)


def test_the_work_of_streaming_heads_is_local_k_and_v_only():
    shape = describe(tiny_model("llama"))
    profile = ClusterProfile(
        (3, 6, 0), membership="static", recent=4, sinks=1, streaming=((1, 4), (), tuple(range(6))),
        representatives=((0, 1, 2, 0, 4, 5), *[tuple(range(6))] * 2),
    )  # fmt: skip
    tokens, local = 50, 5
    full = model_work(Case("decode", 2, tokens), shape, (0, 0), 4, None)
    found = model_work(Case("decode", 2, tokens), shape, (0, 0), 4, profile)
    gone = (3 + 2) + (6 + 6)  # K and V heads of far keys that are not read
    queries = (6 - 3) + 6
    assert full.bytes - found.bytes == 4 * 2 * 8 * (gone * (tokens - local) + queries)
    far = (3 + 4) + (6 + 6) + 0  # heads with scores, and with a product with V
    # local: scores of the head that shares, scores and products of those that stream
    assert found.flops == 2 * 2 * 8 * (far * tokens + local * ((1 + 2 * 2) + 2 * 6))


@pytest.mark.parametrize("family", ["llama", "llama-grouped", "opt", "gpt2"])
def test_the_fused_baseline_is_the_fastest_backend_that_gives_the_models_logits(
    family, monkeypatch
):
    wrong = SDPBackend.EFFICIENT_ATTENTION if DEVICE == "cpu" else SDPBackend.OVERRIDEABLE
    monkeypatch.setattr(
        plain_steps, "BACKENDS",
        {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH, "none": wrong},
    )  # fmt: skip
    monkeypatch.setattr(bench, "make_runner", StaticRunner)
    model = tiny_model(family).to(DEVICE)
    request = ModelRequest("tiny", STATIC, "", [(2, 20)], new_tokens=3, seconds=0.0)
    ids = torch.randint(97, (2, 20), device=DEVICE)
    peaks = ceilings.Ceilings(1.0, 1.0)
    with torch.inference_mode():
        row = bench.measure_run(model, "fused", request, ids, peaks)
        assert {"masked", "math"} <= set(row["tpot_us_by_backend"]) <= {"masked", "math", "flash"}
        assert row["tpot_us"] == min(row["tpot_us_by_backend"].values())
        right = plain_steps.attending_to
        monkeypatch.setattr(plain_steps, "attending_to", lambda of, count: right(of, count - 3))
        row = bench.measure_run(model, "fused", request, ids, peaks)
    assert list(row["tpot_us_by_backend"]) == ["masked"]
    assert model.config._attn_implementation == tiny_model(family).config._attn_implementation


@pytest.mark.parametrize("kind", [Runner, StaticRunner])
@pytest.mark.parametrize("profile", [None, ClusterProfile((6, 6, 6)), STATIC])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_runners_read_prompts_and_tokens(kind, profile, implementation):
    model = tiny_model("llama").to(DEVICE)
    model.set_attn_implementation(implementation)
    ids = torch.randint(97, (2, 14), device=DEVICE)
    with enabled(model, profile) if profile else nullcontext(), torch.inference_mode():
        want = model(ids).logits
        runner = kind(model, profile, 14)
        for _ in range(2):  # a second prompt starts anew
            torch.testing.assert_close(
                runner.prefill(ids[:, :11]), want[:, 10], atol=1e-4, rtol=1e-3
            )
            for i in (11, 12, 13):
                got = runner.step(ids[:, i : i + 1])
                torch.testing.assert_close(got, want[:, i], atol=1e-4, rtol=1e-3)
        memory = runner.memory()
    assert int(memory.tokens) == 14
    heads = 3 * 12 if profile is not STATIC else 3 * 6 + 2 + 6 + 3
    if kind is StaticRunner:
        assert memory.key_bytes + memory.value_bytes == 2 * 14 * 8 * 4 * heads
