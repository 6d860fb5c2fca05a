"""`chai serve` as a command, with a real OpenAI client: the short version of the soak script."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from chai_attention.profile import ClusterProfile

pytestmark = pytest.mark.exhaustive
SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "serving_soak.py"
REQUESTS, AT_ONCE, PAGES = 40, 24, 18


EVERY = list(range(8))
PROFILES = {
    "online": ClusterProfile((3, 8, 5), window=8),
    "streaming": ClusterProfile(
        (2, 8, 4), "static", representatives=[[0, 1, 0, 1, 0, 5, 6, 7], EVERY, EVERY],
        streaming=[[5, 6, 7], [], [0, 1, 4, 5]], recent=40, sinks=4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", PROFILES)
def test_answers_do_not_depend_on_what_else_goes_on(kind, tiny, tmp_path) -> None:
    for package in ("vllm", "openai"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the package {package}, which `make test-vllm` installs")
    # prompts of 3 letters, which are tokens, of 6, and longer than the window; some of each leave
    PROFILES[kind].save(tmp_path / "profile.json")
    command = [
        sys.executable, SCRIPT, "--work", tmp_path, "--model", tiny,
        "--profile", tmp_path / "profile.json", "--out", tmp_path / "report.json",
        "--requests", REQUESTS, "--at-once", AT_ONCE, "--longest", 460,
        # with a window an answer needs more pages at a time; of both kinds there is one store
        "--pages", PAGES if kind == "online" else 2 * PAGES,
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    # not 0 where an answer was another than alone, a wrong body got no 4xx with its reason, or
    # pages stayed in use
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    report = json.loads((tmp_path / "report.json").read_text())
    staying = REQUESTS - report["left_early"] + AT_ONCE
    assert report["equal"] + len(report["different"]) == staying
    assert report["equal"] >= staying - 1  # but for two tokens that are almost equally likely
    assert report["left_early"] > 3
    assert report["wrong_bodies"] == (2 * REQUESTS + AT_ONCE) / 8
    assert report["preemptions_in_crowd"] > 0  # how many are among the mixed depends on the machine
    assert report["prefix_cache_hits"] > 0
    for used in (report["in_use_before"], report["in_use_after"]):
        assert not any(used.values())
