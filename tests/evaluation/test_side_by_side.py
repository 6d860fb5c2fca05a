"""Evaluations in several processes: the same files, and an end to all of them whatever happens."""

import multiprocessing
from functools import partial

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs the extra eval")

from chai_attention.errors import EvaluationError
from chai_attention.evaluation.evaluate import Evaluation, evaluate
from chai_attention.evaluation.side_by_side import Processes
from chai_attention.evaluation.tasks import TaskSource
from eval_methods import Clustered, Failing, OwnCache, Plain, arc_rows, files, load

SOURCES = [
    TaskSource("arc_easy", tuple(arc_rows(5)), "a"),
    TaskSource("last_word", tuple({"text": f"the cat {n} sat on the cat"} for n in range(4)), "b"),
]
LLAMA = partial(load, "llama")


@pytest.fixture(autouse=True)
def one_thread():
    """As many as each of two processes has, as sums may depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    assert not multiprocessing.active_children()


def run(out, methods, count=2, loading=LLAMA, progress=lambda *report: None):
    made = {method.name: method for method in methods}
    return evaluate(
        *LLAMA(), Evaluation("tiny", tuple(made), SOURCES, out), lambda names: made,
        processes=Processes(count, loading) if count > 1 else None, progress=progress,
    )  # fmt: skip


def test_processes_write_what_one_writes_also_after_an_interrupt(tmp_path):
    methods = [Plain(), OwnCache("own"), Clustered()]
    run(tmp_path / "one", methods, count=1)
    seen = []

    def stop(title, done, total):
        seen.append((title, done, total))
        if len(seen) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "two", methods, progress=stop)
    assert seen[:2] == [("preparing comparators", 0, 1), ("side by side", 0, 27)]
    # which processes were the first is for the machine to say
    assert all(title.startswith("done: ") for title, _, _ in seen[2:])
    assert 0 < seen[2][1] < seen[3][1] < 27
    # what was told as done when it was stopped was not written yet
    assert len(files(tmp_path / "two")) == 1
    assert run(tmp_path / "two", methods)["rows"][2]["comparator"] == "clustered"
    assert files(tmp_path / "two") == files(tmp_path / "one")


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        pytest.param("refuses", EvaluationError, "not this model", marks=pytest.mark.exhaustive),
        pytest.param("breaks", RuntimeError, "KeyError: 'broken'", marks=pytest.mark.exhaustive),
        ("dies", EvaluationError, "killed during bad: .*--jobs"),
    ],
)
def test_a_process_that_fails_ends_the_run_and_results_stay(tmp_path, how, error, message):
    run(tmp_path, [Plain()], count=1)
    kept = files(tmp_path)
    with pytest.raises(error, match=message):
        run(tmp_path, [Plain(), Failing("bad", how)])
    assert files(tmp_path) == kept


def test_another_model_is_refused(tmp_path):
    with pytest.raises(EvaluationError, match="not the model that is evaluated"):
        run(tmp_path, [Plain()], loading=partial(load, "llama-grouped"))
