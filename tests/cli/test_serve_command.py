"""``chai serve`` as a person runs it: the estimate, and what is handed to vLLM."""

import json
import os
import re

import pytest
from transformers import LlamaConfig

from chai_attention import hub
from chai_attention.integrations.vllm import serve


@pytest.fixture
def seven(folder):
    """LLaMA-7B's config; there are no weights."""
    LlamaConfig(architectures=["LlamaForCausalLM"], dtype="bfloat16").save_pretrained(
        folder / "seven"
    )
    return "seven"


def test_estimate_tells_capacity_and_gain_from_the_config_alone(chai, seven) -> None:
    code, out, _ = chai("serve", seven, "--profile", "llama-7b", "--estimate")
    assert code == 0
    full, kept = 2 * 32 * 32 * 128 * 2, 128 * 2 * (18 * 64 + 14 * 36)
    assert f"K,V bytes per token: {full:,}, with clusters {kept:,} (19.1% saved)" in out
    found = re.search(r"tokens that fit: ([\d,]+), with clusters ([\d,]+) \(1\.24x\)", out)
    assert found is not None
    tokens = [int(number.replace(",", "")) for number in found.groups()]
    room = float(re.search(r"about ([\d.]+) GB of 73.6 GB", out)[1])  # vLLM's 92% of 80 GB
    assert tokens[0] == pytest.approx(room * 1e9 / full, rel=2e-3)
    assert tokens[1] == pytest.approx(room * 1e9 / kept, rel=2e-3)
    rows = [line for line in out.splitlines() if "at most" in line]
    assert [row.split("│")[1].strip() for row in rows] == ["2,048", "8,192", "32,768"]
    gains = [float(re.search(r"at most ([\d.]+)x", row)[1]) for row in rows]
    weights = 6_738_415_616 * 2
    assert gains == [
        pytest.approx((weights + full * n) / (weights + kept * n), abs=6e-3)
        for n in (16 * 2048, 16 * 8192, 16 * 32768)
    ]


def test_estimate_for_a_program(chai, seven) -> None:
    code, out, _ = chai("serve", seven, "--profile", "llama-7b", "--estimate", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["requests"] == 1024  # what vLLM lets run on such a GPU
    assert found["token_bytes"] == [2 * 32 * 32 * 128 * 2, 128 * 2 * (18 * 64 + 14 * 36)]
    rows = found["contexts"]
    assert [row["context"] for row in rows] == [2048, 8192, 32768]
    for row in rows:
        assert row["tokens"][1] > 1.2 * row["tokens"][0]
        assert row["decode_gain_at_most"] > 1
    code, _, err = chai("serve", seven, "--profile", "llama-7b", "--json")
    assert code == 2
    assert "--json goes with --estimate" in err


def test_estimate_heeds_the_options_of_vllm(chai, seven) -> None:
    plain = chai("serve", seven, "--profile", "llama-7b", "--estimate")[1]
    options = ("--gpu-memory-utilization", "0.5", "--gpu-memory", "160")
    other = chai("serve", seven, "--profile", "llama-7b", "--estimate", *options)[1]
    assert "of 80.0 GB" in other
    assert other != plain


def test_estimate_of_so_many_requests_of_a_context(chai, seven, folder) -> None:
    rep = [head % 8 if head < 20 else head for head in range(32)]
    profile = {
        "clusters": [8] * 32, "membership": "static", "representatives": [rep] * 32,
        "streaming": [list(range(20, 32))] * 32, "recent": 128, "sinks": 4,
    }  # fmt: skip
    (folder / "default.json").write_text(json.dumps(profile))
    options = ("serve", seven, "--profile", "default.json", "--estimate", "--context", "8192")
    code, out, _ = chai(*options, "--requests", "20")
    assert code == 0
    assert "exact window of 128 + 4 tokens: 5 blocks" in out
    assert "pages of 64 tokens, and of 48 for the window, which leave 3.6% of their blocks" in out
    assert "20 requests of 8,192 tokens: do not fit (13 do), with clusters they fit" in out
    assert [
        row.split("│")[1].strip() for row in out.splitlines() if "at most " in row and "│" in row
    ] == ["8,192"]
    assert "ranks" not in out
    two = chai(*options, "-tp=2")[1]
    assert "saved on each of 2 ranks, 56.2% on one GPU: pages of one size keep 100.0%" in two
    assert "chai calibrate --tensor-parallel 2 chooses heads so that they keep nothing" in two
    code, out, _ = chai(*options, "--context", "300", "--json")
    found = json.loads(out)["contexts"]
    assert [row["context"] for row in found] == [300, 8192]
    assert [row["local_pages"] for row in found] == [5, 5]
    code, _, err = chai("serve", seven, "--profile", "default.json", "--context", "8192")
    assert code == 2
    assert "--context and --requests go with --estimate" in err


def test_estimate_of_a_profile_that_is_made_for_ranks_loses_nothing(chai, seven, folder) -> None:
    profile = {
        "clusters": [16] * 32, "membership": "static", "tensor_parallel": 4,
        "representatives": [[head // 2 * 2 for head in range(32)]] * 32,
    }  # fmt: skip
    (folder / "four.json").write_text(json.dumps(profile))
    options = ("serve", seven, "--profile", "four.json", "--estimate", "--tensor-parallel-size")
    line = "25.0% of the K,V bytes per token saved on each of {} ranks, as on one GPU"
    for ranks in (2, 4):
        assert f"{line.format(ranks)} (the profile is made for 4)" in chai(*options, str(ranks))[1]
    found = json.loads(chai(*options, "4", "--json")[1])
    assert (found["ranks"], found["lost_by_ranks"]) == (4, 0.0)
    assert found["savings"]["made_for"] == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--profile", "none.json"), "no profile 'none.json'"),
        (("--profile", "llama-33b"), "layers is 60 in the profile, 32 in the model"),
        (("--profile", "llama-7b", "--gpu-memory", "10"), "no room for K and V"),
        (("--profile", "llama-7b", "--max-num-seqs", "x"), "--max-num-seqs is a number"),
        (("--profile", "llama-7b", "--max-num-seqs"), "--max-num-seqs needs a value"),
        (("--profile", "llama-7b", "--kv-cache-dtype", "int4"), "a K,V cache of int4"),
        (("--profile", "llama-7b", "--dtype", "float64"), "--dtype is one of auto, float32"),
        (("--profile", "llama-7b", "--config", "."), "it is a folder, not a regular file"),
        (("--profile", ""), "the name of a profile is empty"),
    ],
)
def test_estimate_says_in_one_line_what_is_wrong(chai, seven, options, message) -> None:
    code, _, err = chai("serve", seven, "--estimate", *options)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_everything_else_goes_to_vllm(chai, seven, monkeypatch) -> None:
    monkeypatch.setattr(serve, "installed", lambda: ("vllm", "0.32.0"))
    run: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda file, command: run.append(command))
    code, _, _ = chai("serve", seven, "--profile", "llama-7b", "--port", "1", "-tp", "2")
    assert code == 0
    command = run[0]
    assert command[2:5] == ["vllm.entrypoints.cli.main", "serve", seven]
    assert command[command.index("--port") :][:2] == ["--port", "1"]
    assert command[command.index("-tp") :][:2] == ["-tp", "2"]


def test_without_vllm(chai, monkeypatch) -> None:
    monkeypatch.setattr(serve, "installed", lambda: None)
    code, _, err = chai("serve", "model", "--profile", "llama-7b")
    assert code == 2
    assert "pip install 'chai-attention[vllm]'" in err


def test_a_short_option_with_an_h_in_it_does_not_ask_for_help(chai, seven, monkeypatch) -> None:
    monkeypatch.setattr(serve, "installed", lambda: ("vllm", "0.32.0"))
    run: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda file, command: run.append(command))
    code, out, _ = chai("serve", seven, "--profile", "llama-7b", "-sc.method", "ngram")
    assert (code, out) == (0, "")
    assert run[0][run[0].index("-sc.method") :][:2] == ["-sc.method", "ngram"]
    assert chai("serve", "-h")[0] == 0


@pytest.mark.parametrize("first", [("--max-num-seqs", "4"), ("-sc.method", "ngram")])
def test_an_option_of_vllm_before_the_model_is_not_taken_for_it(chai, seven, first) -> None:
    code, _, err = chai("serve", *first, seven, "--profile", "llama-7b")
    assert code == 2
    assert f"MODEL comes first, before {first[0]}" in err


def test_a_model_that_is_nowhere_is_told_before_vllm_starts(chai, monkeypatch) -> None:
    monkeypatch.setattr(serve, "installed", lambda: ("vllm", "0.32.0"))
    monkeypatch.setattr(hub, "_answer", lambda kind, name: (False, "none is public there"))
    code, _, err = chai("serve", "no/model", "--profile", "llama-7b")
    assert code == 2
    assert "no model 'no/model'" in err


@pytest.mark.parametrize("given", [("--model", "other"), ("--model=other",)])
def test_a_second_model_is_refused(chai, seven, monkeypatch, given) -> None:
    monkeypatch.setattr(serve, "installed", lambda: ("vllm", "0.32.0"))
    code, _, err = chai("serve", seven, "--profile", "llama-7b", *given)
    assert code == 2
    assert f"leave out --model: {seven} is the model" in err
