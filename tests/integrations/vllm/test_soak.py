"""`chai serve` as a command, with a real OpenAI client: the short version of the soak script."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from chai_attention.profile import ClusterProfile

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "serving_soak.py"


def test_answers_do_not_depend_on_what_else_goes_on(tiny, tmp_path) -> None:
    for package in ("vllm", "openai"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the package {package}, which `make test-vllm` installs")
    ClusterProfile((3, 8, 5), window=8).save(tmp_path / "profile.json")
    command = [
        sys.executable, SCRIPT, "--work", tmp_path, "--model", tiny,
        "--profile", tmp_path / "profile.json", "--out", tmp_path / "report.json",
        "--requests", "80", "--at-once", "16", "--pages", "20", "--longest", "400",
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["equal"] == report["requests"] - report["left_early"]
    assert report["left_early"] > 5
    assert report["preemptions"] > 0
    assert not any(report["in_use_after"].values())
