"""The benchmark of large models, on tiny ones of the same families."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import large_models
from chai_attention.benchmarking import ceilings, runners
from chai_attention.benchmarking.presets import PRESETS
from chai_attention.errors import ChaiError, LoadError
from chai_attention.profile import ClusterProfile
from chai_attention.runtime.shape import describe
from large_models_kinds import KINDS, default_like, profile_of, published_like
from large_models_table import table


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(ceilings, "CPU_BYTES", 2**16)
    monkeypatch.setattr(ceilings, "CPU_MATRIX", 16)
    monkeypatch.setattr(runners, "LEAST_PROMPTS", 1)
    monkeypatch.setattr(large_models, "START", large_models.time.perf_counter())


def run(folder, *arguments):
    large_models.main(["--out", str(folder), "--tiny", *arguments])
    return {
        name: json.loads((folder / f"large-{name}.json").read_text())
        for name in large_models.MODELS
        if (folder / f"large-{name}.json").is_file()
    }


def test_all_parts_of_both_models(tmp_path, capsys):
    found = run(tmp_path)
    assert list(found) == ["llama-33b", "opt-66b"]
    for result in found.values():
        for kind in KINDS:
            row = result[f"speed {kind}"]
            assert row["ttft_us"] > 0
            assert row["tpot_us"] > 0
            assert len(row["checks"]) == (2 if kind in ("published", "default recipe") else 0)
        assert result["speed published"]["kv_bytes"] < result["speed published"]["full_kv_bytes"]
        passes = result["evidence"]["passes"]
        assert list(passes) == ["attention maps", "gradient costs"]
        assert all(seen["windows"] == seen["of"] == 6 for seen in passes.values())
    text = (tmp_path / "large-models.md").read_text()
    assert text.strip() == capsys.readouterr().out[-len(text) - 1 :].strip()
    assert text.count("| default recipe |") == 2
    assert "6 of 6 x 48" in text

    before = (tmp_path / "large-opt-66b.json").read_text()
    run(tmp_path)  # all is there
    assert (tmp_path / "large-opt-66b.json").read_text() == before
    with pytest.raises(ChaiError, match="measured with another prompt"):
        run(tmp_path, "--prompt", "30")


def test_a_part_that_ran_out_of_time_says_how_far_it_came_and_is_done_anew(tmp_path):
    options = ("--model", "llama-33b", "--part", "evidence", "--batch-size", "2")
    stopped = run(tmp_path, *options, "--limit", "0", "--least", "-1")["llama-33b"]["evidence"]
    assert stopped["stopped"]
    assert stopped["passes"]["attention maps"]["windows"] == 2
    text = table([json.loads((tmp_path / "large-llama-33b.json").read_text())])
    assert "2 of 6 x 48 | stopped after" in text
    again = run(tmp_path, *options)["llama-33b"]["evidence"]
    assert "stopped" not in again
    assert again["passes"]["gradient costs"]["windows"] == 6


def test_without_time_no_part_begins(tmp_path):
    found = run(tmp_path, "--model", "opt-66b", "--total", "0")["opt-66b"]
    assert [part for part in found if part.startswith(("speed", "evidence"))] == []


def test_a_model_that_does_not_fit_is_named_and_the_other_measured(tmp_path, monkeypatch):
    build = large_models.build

    def full(name, options):
        if name == "llama-33b":
            raise LoadError("it does not fit")
        return build(name, options)

    monkeypatch.setattr(large_models, "build", full)
    found = run(tmp_path, "--part", "evidence")
    assert "evidence" not in found["llama-33b"]
    assert found["opt-66b"]["evidence"]["passes"]["gradient costs"]["windows"] == 6
    text = (tmp_path / "large-models.md").read_text()
    assert "llama-33b, tiny: it does not fit." in text


def test_a_part_that_fails_says_why_and_the_next_begins(tmp_path, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("no memory\nof several lines")

    with monkeypatch.context() as patch:
        patch.setattr(large_models, "measure_speed", full)
        found = run(tmp_path, "--model", "opt-66b")["opt-66b"]
    assert found["speed fused"]["missing"] == "no memory"
    assert "passes" in found["evidence"]
    assert "| fused | no memory |" in (tmp_path / "large-models.md").read_text()
    again = run(tmp_path, "--model", "opt-66b", "--part", "speed")["opt-66b"]
    assert "tpot_us" in again["speed fused"]


@pytest.mark.parametrize("name", large_models.MODELS)
def test_profiles_fit_the_models_and_save_what_they_are_to(name):
    shape = describe(PRESETS[name]())
    for kind in KINDS:
        profile_of(kind, shape).check(shape)
    published, default = published_like(shape), default_like(shape)
    if name == "llama-33b":
        assert published.clusters == ClusterProfile.published(name).clusters
    share = sum(published.clusters) / (shape.heads * shape.layers)
    assert share == pytest.approx(0.47, abs=0.01)
    assert default.clusters[0] == shape.heads // 4
    assert len(default.streaming_heads(0)) == round(3 / 8 * shape.heads)
    assert torch.tensor(default.representatives).shape == (shape.layers, shape.heads)
