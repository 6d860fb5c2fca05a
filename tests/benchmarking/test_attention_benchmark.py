"""The attention benchmark: it measures what it says, and nothing that is wrong."""

import json
import sys
import types

import pytest
import torch

from chai_attention.benchmarking import attention as bench
from chai_attention.benchmarking import baselines as others
from chai_attention.benchmarking import ceilings, clustered, timing
from chai_attention.benchmarking.attention import AttentionRequest, bench_attention
from chai_attention.benchmarking.baselines import Baseline, baselines
from chai_attention.benchmarking.cases import AttentionShape, BenchmarkError, Case
from chai_attention.benchmarking.ceilings import Ceilings, Work, attention_work
from chai_attention.benchmarking.clustered import (
    Inputs,
    Layout,
    clustered_call,
    even_membership,
    random_inputs,
    rounded_inputs,
)
from chai_attention.benchmarking.correctness import Accuracy, WrongResultError, accuracy
from op_calls import dispatched

SHAPE = AttentionShape("tiny", 8, 8, 16)
CASES = (Case("decode", 2, 33), Case("prefill", 2, 21))


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Ceilings of a small machine, and few repeats."""
    monkeypatch.setattr(ceilings, "CPU_BYTES", 2**16)
    monkeypatch.setattr(ceilings, "CPU_MATRIX", 16)
    monkeypatch.setattr(timing, "LEAST_REPEATS", 2)


def request_of(**options):
    given = {
        "shape": SHAPE, "cases": CASES, "clusters": (2, 8), "dtypes": (torch.float32,),
        "device": "cpu", "seconds": 0.0, **options,
    }  # fmt: skip
    return AttentionRequest(**given)


def run(**options):
    return bench_attention(request_of(**options), lambda *done: None)


def test_report():
    seen = []
    report = bench_attention(
        request_of(dtypes=(torch.float32, torch.bfloat16)), lambda *done: seen.append(done)
    )
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert set(report["ceilings"]) == {"float32", "bfloat16"}
    rows = report["results"]
    assert [(r["dtype"], r["kind"], r["clusters"]) for r in rows] == [
        (dtype, kind, k)
        for dtype in ("float32", "bfloat16")
        for kind in ("decode", "prefill")
        for k in (2, 8)
    ]
    for row in rows:
        every = {
            r["baseline"]: r["us"]
            for r in report["baselines"]
            if (r["kind"], r["dtype"]) == (row["kind"], row["dtype"])
        }
        assert len(every) == 4
        assert row["baseline_us"] == min(every.values()) == every[row["baseline"]]
        assert row["speedup"] == row["baseline_us"] / row["us"]
        assert row["of_ideal"] == row["ideal_us"] / row["us"]
        assert row["error"] <= row["allowed_error"]
    assert {r["baseline"] for r in report["baselines"]} == {
        "unfused", "SDPA flash", "SDPA math", "own code, k = H",
    }  # fmt: skip
    assert seen[0][1:] == (0, 6)
    assert seen[-1][1:] == (6, 6)


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_a_wrong_result_ends_it(monkeypatch, kind):
    right = clustered.attention

    def wrong(query, *args, **options):
        out, lse = right(query, *args, **options)
        return (out + 0.1 if (query.shape[2] == 1) == (kind == "decode") else out), lse

    monkeypatch.setattr(clustered, "attention", wrong)
    with pytest.raises(WrongResultError, match=f"2 clusters, {kind}.*nothing is reported"):
        run()


def test_nan_is_wrong(monkeypatch):
    right = clustered.attention

    def wrong(*args, **options):
        out, lse = right(*args, **options)
        out[-1, -1, -1, -1] = torch.nan
        return out, lse

    monkeypatch.setattr(clustered, "attention", wrong)
    with pytest.raises(WrongResultError, match="off by nan"):
        run()


def test_a_profile_gives_memberships():
    rep = (0, 0, 0, 0, 0, 0, 6, 6)
    member = bench._membership(request_of(representatives={2: rep}), 2, 3)
    assert member.representatives.tolist() == [list(rep)] * 3
    assert bench._membership(request_of(), 2, 3).batch == 3


LAYOUTS = [
    Layout(), Layout(recent=8, sinks=2), Layout(16), Layout(16, 8, 2), Layout(16, narrow=True),
    Layout(16, 8, 2, narrow=True),
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    "case", [Case("decode", 2, 65), Case("decode", 2, 5), Case("prefill", 2, 33)]
)
@pytest.mark.parametrize(
    ("kv_heads", "clusters", "streaming"), [(8, 3, 0), (8, 8, 0), (4, 2, 0), (8, 3, 2), (4, 2, 4)]
)
def test_every_layout_is_right_and_checked(layout, case, kv_heads, clusters, streaming):
    if streaming and not layout.recent:
        pytest.skip("streaming heads see a window only")
    inputs = random_inputs(case, AttentionShape("", 8, kv_heads, 16), torch.float32, "cpu")
    if layout.narrow:
        whole, inputs = inputs, rounded_inputs(inputs)
    member = clustered.with_streaming(8, clusters, 2, kv_heads, streaming)
    window = Layout() if member.is_identity else layout
    out = clustered_call(inputs, member, layout)()
    assert out.shape == (2, case.queries, 8, 16)
    assert accuracy(out, inputs, member, window).is_correct
    if layout.narrow:  # rounding would be seen
        assert not accuracy(out, whole, member, window).is_correct
    for row in (0, 1):  # the first and the last sequence are both looked at
        bad = out.clone()
        bad[row, -1, 3] += 0.01
        assert not accuracy(bad, inputs, member, window).is_correct


def test_a_ring_remembers_what_decode_needs():
    layout = Layout(recent=8, sinks=3)
    for size in (2, 8, 30):
        shape = AttentionShape("", 8, 8, 16)
        inputs = random_inputs(Case("decode", 2, size), shape, torch.float32, "cpu")
        member = even_membership(8, 3, 2)
        local = clustered.rolling_buffer(inputs.key, inputs.value, member, layout)
        index = member.key_heads[:, :, None, None].expand(-1, -1, size, 16)
        value = member.value_heads[:, :, None, None].expand(-1, -1, size, 16)
        out = dispatched.decode_recent(
            inputs.query, inputs.key.gather(1, index), inputs.value.gather(1, value), member,
            local, lengths=torch.tensor([size, size]), scale=inputs.scale,
        )  # fmt: skip
        assert accuracy(out, inputs, member, layout).is_correct


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(BenchmarkError, match="--paged needs CUDA"):
        run(layout=Layout(page=16))
    with pytest.raises(BenchmarkError, match="--cache-dtype needs --paged"):
        run(layout=Layout(narrow=True))
    on_gpu = {"device": "cuda", "cases": CASES}
    with pytest.raises(BenchmarkError, match="multiple of 16 tokens, not 24"):
        request_of(layout=Layout(24), **on_gpu).check()
    request_of(layout=Layout(24), device="cuda", cases=CASES[:1]).check()
    request_of(layout=Layout(16, 8, 2), streaming=2, **on_gpu).check()


# ---- baselines


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("item", baselines("cpu"), ids=lambda item: item.name)
def test_baselines_are_attention(item, case, kv_heads):
    inputs = random_inputs(case, AttentionShape("", 8, kv_heads, 16), torch.float32, "cpu")
    plain = even_membership(8, 8, 2, kv_heads)
    try:
        out = item.prepare(inputs)()
    except RuntimeError:
        assert item.name == "SDPA flash"  # some releases have no grouped queries there
        return
    assert accuracy(out, inputs, plain, Layout()).is_correct


def library(monkeypatch, name, **functions):
    module = types.ModuleType(name)
    module.__spec__ = types.SimpleNamespace(name=name)
    for key, function in functions.items():
        setattr(module, key, function)
    monkeypatch.setitem(sys.modules, name, module)


def plain_attention(query, key, value, causal):
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=causal, enable_gqa=True
    )
    return out.transpose(1, 2)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_flash_attention_3_and_4_are_called_token_major(monkeypatch, case):
    """Stand-ins with the libraries' signatures; one release returns the log-sum-exp, too."""

    def function(q, k, v, *, softmax_scale, causal):
        return plain_attention(q, k, v, causal), None

    def with_cache(q, k_cache, v_cache, *, cache_seqlens, softmax_scale, causal):
        assert cache_seqlens.tolist() == [k_cache.shape[1]] * len(q)
        return plain_attention(q, k_cache, v_cache, causal)

    library(
        monkeypatch, "flash_attn_interface", flash_attn_func=function,
        flash_attn_with_kvcache=with_cache,
    )  # fmt: skip
    library(monkeypatch, "flash_attn")
    library(monkeypatch, "flash_attn.cute", flash_attn_func=function)
    inputs = random_inputs(case, AttentionShape("", 8, 4, 16), torch.float32, "cpu")
    plain = even_membership(8, 8, 2, 4)
    for prepare in (others._flash3, others._flash4):
        assert accuracy(prepare(inputs)(), inputs, plain, Layout()).is_correct


@pytest.mark.parametrize("case", [Case("decode", 2, 33), Case("decode", 2, 32), CASES[1]], ids=str)
def test_flashinfer_gets_pages_and_ragged_tensors(monkeypatch, case):
    """A stand-in that attends by what `plan` was told."""

    class Decode:
        def __init__(self, room, layout, use_tensor_cores):
            assert layout == "NHD"

        def plan(self, indptr, indices, last, heads, groups, dim, page, **options):
            self.pages = (indptr, indices, last, page)

        def run(self, query, caches):
            indptr, indices, last, page = self.pages
            rows = []
            for b in range(len(query)):
                used = indices[indptr[b] : indptr[b + 1]].long()
                size = (len(used) - 1) * page + int(last[b])
                k, v = (x[used].flatten(0, 1)[None, :size] for x in caches)
                rows.append(plain_attention(query[b : b + 1, None], k, v, False)[:, 0])
            return torch.cat(rows)

    class Prefill:
        def __init__(self, room, layout):
            assert layout == "NHD"

        def plan(self, queries, keys, heads, groups, dim, *, causal, **options):
            assert causal
            self.starts = queries.tolist(), keys.tolist()

        def run(self, query, key, value):
            q, k = self.starts
            return torch.cat(
                [
                    plain_attention(
                        query[None, q[b] : q[b + 1]], key[None, k[b] : k[b + 1]],
                        value[None, k[b] : k[b + 1]], True,
                    )[0]
                    for b in range(len(q) - 1)
                ]
            )  # fmt: skip

    library(
        monkeypatch, "flashinfer", BatchDecodeWithPagedKVCacheWrapper=Decode,
        BatchPrefillWithRaggedKVCacheWrapper=Prefill,
    )  # fmt: skip
    monkeypatch.setattr(others, "WORKSPACE", 16)
    inputs = random_inputs(case, AttentionShape("", 8, 4, 16), torch.float32, "cpu")
    out = others._flashinfer(inputs)()
    assert accuracy(out, inputs, even_membership(8, 8, 2, 4), Layout()).is_correct


def test_what_is_not_there_cannot_run_or_is_wrong_is_named(monkeypatch):
    def fails(inputs):
        raise RuntimeError("no such head size\nand more")

    def lies(inputs: Inputs):
        return lambda: torch.zeros(inputs.query.transpose(1, 2).shape)

    made = [
        Baseline("absent", True, fails, "no_such_module.inside"),
        Baseline("failing", True, fails),
        Baseline("lying", True, lies),
    ]
    monkeypatch.setattr(bench, "baselines", lambda device: made)
    report = run(cases=CASES[:1])
    reasons = {row["baseline"]: row["missing"] for row in report["baselines"]}
    assert reasons["absent"] == "no_such_module.inside is not installed"
    assert reasons["failing"] == "cannot run: no such head size"
    assert reasons["lying"].startswith("wrong result, off by")
    assert all(row["speedup"] is None for row in report["results"])


def test_unfused_attention_that_would_not_fit_is_left_out(monkeypatch):
    monkeypatch.setattr(bench, "_require_room", lambda request: None)  # K and V do fit
    monkeypatch.setattr(bench, "available", lambda device: 1000)
    reasons = {r["baseline"]: r.get("missing") for r in run()["baselines"] if not r["fused"]}
    assert "GB" in reasons["unfused"]


@pytest.mark.parametrize(
    ("kind", "tokens", "scores"), [("decode", 131_072, True), ("prefill", 131_072, False)]
)
def test_long_cases_are_left_out_where_they_do_not_fit_not_begun(kind, tokens, scores, monkeypatch):
    """80 GB: all of 128k tokens fits but the scores of a prompt, 4.4 TB."""
    shape = AttentionShape("llama-7b", 32, 32, 128)
    request = AttentionRequest(
        shape, [Case(kind, 1, tokens)], [8], [torch.bfloat16], "cpu", seconds=0
    )
    monkeypatch.setattr(bench, "available", lambda device: 80 * 10**9)
    bench._require_room(request)
    monkeypatch.setattr(bench, "accuracy", lambda *args: Accuracy(0.0, 1.0))
    monkeypatch.setattr(bench, "time_calls", lambda *args: timing.Timing(1.0, 0.0, 1, 1.0))
    unfused = baselines("cpu")[0]
    states = torch.empty(1, 32, tokens, 128, dtype=torch.bfloat16, device="meta")
    inputs = Inputs(states if kind == "prefill" else states[:, :, :1], states, states)
    found = bench._baseline(unfused, [inputs], request)
    assert ("missing" not in found) == scores
    if not scores:
        assert "its scores need 4432 GB" in found["missing"]
    monkeypatch.setattr(bench, "available", lambda device: 3 * 10**9)
    with pytest.raises(BenchmarkError, match="more than there is"):
        bench._require_room(request)


# ---- ideals


def test_ideal_is_the_slower_of_moving_and_computing():
    machine = Ceilings(read_gb_s=1.0, matmul_tflop_s=0.001)
    assert Work(bytes=5e3, flops=0).ideal_us(machine) == pytest.approx(5)
    assert Work(bytes=0, flops=7e3).ideal_us(machine) == pytest.approx(7)


def test_work_by_counting():
    shape = AttentionShape("", 4, 4, 8)
    decode = attention_work(Case("decode", 3, 10), shape, 1, 1, 2)
    assert decode.bytes == 2 * 3 * 8 * (10 * (1 + 4) + 1 + 4)
    assert decode.flops == 2 * 3 * 10 * 8 * (1 + 4)
    prefill = attention_work(Case("prefill", 1, 10), shape, 1, 1, 2)
    assert prefill.flops == 2 * sum(range(1, 11)) * 8 * (1 + 4)
    local = attention_work(Case("decode", 3, 10), shape, 1, 1, 2, local=4)
    assert local.bytes - decode.bytes == 2 * 3 * 8 * 4 * 3
    narrow = attention_work(Case("decode", 3, 10), shape, 1, 1, 2, local=4, stored_size=1)
    pages = local.bytes - attention_work(Case("decode", 3, 0), shape, 1, 1, 2).bytes
    assert narrow == Work(local.bytes - pages / 2, local.flops)
    # of 4 heads 2 stream: K of one and V of two are held whole, of the others 4 local keys
    streams = attention_work(
        Case("decode", 3, 10), shape, 1, 1, 2, local=4, streaming=2, kept_values=2
    )
    assert streams.bytes == 2 * 3 * 8 * (10 * (1 + 2) + 4 * (3 + 2) + 1 + 4)
    assert streams.flops == 2 * 3 * 8 * (10 * (1 + 2) + 4 * 1 + 4 * 2 * 2)
    whole = attention_work(Case("decode", 3, 10), shape, 4, 4, 2, local=4)
    assert whole == attention_work(Case("decode", 3, 10), shape, 4, 4, 2)


def test_drift_is_of_the_worse_ceiling_in_either_direction():
    one = Ceilings(read_gb_s=10.0, matmul_tflop_s=1.0)
    assert ceilings.drift(one, one) == 1
    assert ceilings.drift(one, Ceilings(20.0, 0.9)) == 2
    assert ceilings.drift(one, Ceilings(11.0, 0.25)) == 4


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 4)])
def test_memberships_with_streaming_heads(heads, kv_heads):
    member = clustered.with_streaming(heads, 2, 3, kv_heads, 4)
    assert len(member.streaming) == 4
    assert (member.clusters, member.batch) == (2, 3)
    assert member.kept_values == kv_heads // 2


def test_streaming_heads_are_measured_and_refused():
    layout = Layout(recent=4, sinks=1)
    row = run(clusters=[2, 8], streaming=3, layout=layout)["results"][0]
    assert (row["streaming"], row["kept_values"], row["kept_keys"]) == (3, 5, 2)
    for changes, says in (
        ({"layout": Layout()}, "needs --recent"),
        ({"streaming": 7}, "too few for 2 clusters"),
        ({"shape": AttentionShape("", 8, 4, 16)}, "whole K/V heads"),
    ):
        with pytest.raises(BenchmarkError, match=says):
            run(**{"clusters": [2, 8], "streaming": 3, "layout": layout, **changes})


def test_even_memberships():
    for clusters in (1, 3, 8):
        rep = even_membership(8, clusters, 4).representatives
        for row in rep.tolist():
            sizes = [row.count(head) for head in set(row)]
            assert len(sizes) == clusters
            assert max(sizes) - min(sizes) <= 1


def test_long_calls_are_timed_fewer_times():
    assert timing.replays(1000.0) == (timing.WARM_REPLAYS, timing.LEAST_REPLAYS)
    assert timing.replays(300_000.0) == (1, timing.LEAST_LONG)
