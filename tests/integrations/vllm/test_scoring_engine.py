"""The process that scores: how requests share steps, and what is said when it fails."""

import importlib.util
import os
import time
from pathlib import Path

import pytest

from chai_attention.errors import EvaluationError
from chai_attention.integrations.vllm.scoring import ScoringEngine, batches, reason_of
from vllm_job import ENVIRONMENT

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM")
OPTIONS = {
    "dtype": "float32", "max_model_len": 64, "max_num_seqs": 2, "max_num_batched_tokens": 64,
    "enforce_eager": True, "skip_tokenizer_init": True,
}  # fmt: skip


def test_requests_are_dealt_to_steps_whole_and_the_longest_first():
    found = list(batches([5, 100, 9, 40, 8, 60, 1], rows=3, budget=64))
    assert found == [[1], [5], [3, 2, 4], [0, 6]]
    assert list(batches([], 3, 64)) == []


WORKER = (
    "(Worker_TP1 pid=7) ERROR 11-28 [multiproc_executor.py:900] WorkerProc failed to start.\n"
    "(Worker_TP1 pid=7) ERROR 11-28 [multiproc_executor.py:900] Traceback (most recent call last)\n"
    "(Worker_TP1 pid=7) ERROR 11-28 [x.py:900] torch.OutOfMemoryError: CUDA out of memory. Tried\n"
    "RuntimeError: Engine core initialization failed. See root cause above.\n"
)


@pytest.mark.parametrize(
    ("said", "log", "reason"),
    [
        ("ValueError: No available memory\nfor blocks", "", "ValueError: No available memory"),
        ("Exception: WorkerProc initialization failed due to an exception in a background process. "
         "See stack trace for root cause.", WORKER,
         "OutOfMemoryError: CUDA out of memory. Tried"),
        ("its process ended (signal 9)", WORKER, "OutOfMemoryError: CUDA out of memory. Tried"),
        ("its process ended (signal 9)", "INFO all is well", "its process ended (signal 9)"),
        ("ValidationError: 1 validation error for ModelConfig\n  Value error, This model is not "
         "known. [type=value_error, input_value=1]\n    For further information", "",
         "This model is not known."),
    ],
)  # fmt: skip
def test_the_reason_is_one_line(said, log, reason):
    assert reason_of(said, log) == reason


@pytest.fixture
def fast(monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is here")
def test_a_missing_vllm_is_one_line():
    with pytest.raises(
        EvaluationError, match=r"failed to start .*No module named 'vllm'"
    ) as raised:
        ScoringEngine({**OPTIONS, "model": "none"}, 2, "mha, none")
    assert "\n" not in str(raised.value)
    log = str(raised.value).rpartition("its log: ")[2]
    assert "Traceback" in Path(log).read_text()
    os.unlink(log)


@needs_vllm
def test_an_engine_that_cannot_start_says_why_in_one_line(fast, monkeypatch, tiny):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "100000")
    with pytest.raises(EvaluationError, match=r"memory.*more GPUs.*its log: ") as raised:
        ScoringEngine({**OPTIONS, "model": str(tiny)}, 2, "mha, tiny")
    assert "\n" not in str(raised.value)
    os.unlink(str(raised.value).rpartition("its log: ")[2])


@needs_vllm
def test_an_engine_scores_writes_and_leaves_no_process_behind(fast, tiny):
    asked = [(list(range(3, 3 + size)), 2) for size in (20, 9, 40)]
    done = []
    with ScoringEngine({**OPTIONS, "model": str(tiny)}, 2, "mha, tiny") as engine:
        scored = engine.score(asked, done.append)
        written = engine.write(asked)
        again = engine.score(
            [(tokens + new, 2) for (tokens, _), (new, _) in zip(asked, written, strict=True)]
        )
        process = engine._process.pid
    assert done == [2, 3]
    assert [type(flag) for _, flag in scored] == [bool] * 3
    assert all(value < 0 for value, _ in scored)
    assert [len(tokens) for tokens, _ in written] == [2] * 3
    # what was written is the likeliest, and as likely as it was when it was written
    assert [flag for _, flag in again] == [True] * 3
    assert [value for value, _ in again] == pytest.approx([value for _, value in written], rel=1e-4)
    assert not engine.log.exists()
    with pytest.raises(ProcessLookupError):
        os.killpg(process, 0)


def test_a_process_ends_with_the_one_that_asks(tmp_path):
    """Nobody is left waiting for vLLM when the command line is killed."""
    import subprocess
    import sys

    code = (
        "import sys; from chai_attention.integrations.vllm import scoring, plugin\n"
        "scoring.engine = lambda asked: None\n"
        "scoring.main()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    child.stdin.write('{"llm": {}}\n')
    child.stdin.flush()
    assert child.stdout.readline() == '{"ready": true}\n'
    child.stdin.close()
    end = time.monotonic() + 60
    while child.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    assert child.returncode == 0
    child.stdout.close()
