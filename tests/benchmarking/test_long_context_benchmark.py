"""The benchmark of long contexts, with a small model on the CPU."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from chai_attention.benchmarking import ceilings
from chai_attention.errors import ChaiError

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "long_context.py"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("long_context", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(ceilings, "CPU_BYTES", 2**16)
    monkeypatch.setattr(ceilings, "CPU_MATRIX", 16)

    def run(out, *arguments):
        monkeypatch.setattr(sys, "argv", ["", "--tiny", "--seconds", "0", "--out", str(out)])
        sys.argv += arguments
        module.main()
        return json.loads(out.read_text())

    return run


def test_every_part_is_measured(script, tmp_path):
    found = script(tmp_path / "long.json", "--lengths", "40,64", "--kernels", "33")
    assert [row["part"] for row in found["rows"]] == [
        "model", *["calibration"] * 4, *["evaluation"] * 5, *["kernels"] * 2,
    ]  # fmt: skip
    assert all(row["seconds"] >= 0 and "missing" not in row for row in found["rows"])
    assert found["left_out"] == []
    again = script(tmp_path / "long.json", "--lengths", "40,64", "--kernels", "33")
    assert again["rows"][:-1] == found["rows"][1:]  # only the model is made again
    with pytest.raises(ChaiError, match="measured with another kernels"):
        script(tmp_path / "long.json", "--lengths", "40,64", "--kernels", "34")
    for kind in ("decode", "prefill"):
        (row,) = found[f"{kind}:1x33, dense, exact 16+2"]["results"]
        assert row["kind"] == kind


def test_what_the_time_does_not_allow_is_named(script, tmp_path):
    found = script(tmp_path / "long.json", "--only", "kernels", "--limit", "-1")
    assert found["rows"] == []
    assert {row["part"] for row in found["left_out"]} == {"kernels"}
