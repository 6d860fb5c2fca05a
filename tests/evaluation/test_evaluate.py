"""Whole evaluations of tiny models: the paper's table, resuming, damage, determinism."""

import json
import shutil

import pytest

pytest.importorskip("lm_eval", reason="needs the extra eval")

from chai_attention.errors import EvaluationError
from chai_attention.evaluation.evaluate import Evaluation, evaluate
from chai_attention.evaluation.scorer import weights_digest
from chai_attention.evaluation.tasks import PAPER, TaskSource, task_names, task_sources
from chai_attention.results import verified
from eval_methods import MADE, Clustered, arc_rows, eval_model, files
from tiny_tokenizer import tiny_tokenizer

TEXT = tuple({"text": f"{n} " + "some words, again and again. " * 40} for n in range(3))


@pytest.fixture(scope="module")
def sources():
    arc, rest = (tuple(arc_rows(count)) for count in (5, 3))
    words = tuple({"text": f"the cat {n} sat on the cat"} for n in range(4))
    return [
        TaskSource("arc_easy", arc, "a"),
        TaskSource("arc_challenge", rest, "b"),
        TaskSource("last_word", words, "c"),
        TaskSource("perplexity", TEXT, "d"),
    ]


@pytest.fixture(scope="module")
def model():
    return eval_model("llama")


class Prepared:
    """Makes comparators and remembers which."""

    def __init__(self, made=MADE):
        self.asked = []
        self._made = made

    def __call__(self, names):
        self.asked.append(tuple(names))
        return {name: self._made[name](name) for name in names if name in self._made}


def run(model, sources, out, prepare=None, names=tuple(MADE), **options):
    what = Evaluation("tiny", names, sources, out, **options)
    redone = []
    made = prepare or Prepared()
    table = evaluate(
        model, tiny_tokenizer(), what, made, on_redo=lambda path, why: redone.append(path.name)
    )
    return table, redone


@pytest.fixture(scope="module")
def whole(model, sources, tmp_path_factory):
    """The folder of a run to its end, for tests that look at it alone."""
    out = tmp_path_factory.mktemp("whole")
    run(model, sources, out)
    return out


@pytest.fixture
def done(whole, tmp_path):
    """A folder that such a run has written, for tests that go on in it."""
    return shutil.copytree(whole, tmp_path / "done")


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_the_papers_table_for_both_architectures(shared, tmp_path, family):
    sources = task_sources(task_names("paper"), shared / "data" / "eval")
    tiny = eval_model(family)
    table, _ = run(tiny, sources, tmp_path, limit=2)
    assert table["average_of"] == list(PAPER)
    assert [row["comparator"] for row in table["rows"]] == ["mha", "own", "clustered"]
    for row in table["rows"]:
        assert [row["tasks"][task]["items"] for task in PAPER] == [2] * 5
        accuracies = [row["tasks"][task]["acc"] for task in PAPER]
        assert row["average"]["acc"] == pytest.approx(sum(accuracies) / 5)
    mha, own, clustered = table["rows"]
    for task in PAPER:
        assert own["tasks"][task]["nll"] == pytest.approx(mha["tasks"][task]["nll"], rel=1e-4)
        assert clustered["tasks"][task]["nll_diff"] != 0
        assert mha["tasks"][task]["nll_diff"] == mha["tasks"][task]["acc_diff_se"] == 0
    assert tiny.config._attn_implementation != "chai"


def test_the_table_is_what_the_files_say(model, sources, tmp_path):
    table, _ = run(model, sources, tmp_path)
    body = verified(json.loads((tmp_path / "results.json").read_text()), 1)
    assert {"schema_version": 1, **body} == table
    row = table["rows"][2]
    ours, theirs = (
        json.loads((tmp_path / name / "arc_easy.json").read_text())["items"]
        for name in ("clustered", "mha")
    )
    differences = [a["nll"] - b["nll"] for a, b in zip(ours, theirs, strict=True)]
    mean = sum(differences) / 5
    error = (sum((d - mean) ** 2 for d in differences) / 4 / 5) ** 0.5
    cell = row["tasks"]["arc_easy"]
    assert (cell["nll_diff"], cell["nll_diff_se"]) == pytest.approx((mean, error))
    assert cell["kv_share"] == pytest.approx(0.5 + 1 / cell["kv_length"])
    assert row["tasks"]["perplexity"]["acc"] is None
    assert row["tasks"]["last_word"]["acc"] is not None
    text = (tmp_path / "table.md").read_text()
    assert f"{cell['nll']:.4f} ±{cell['nll_se']:.4f} ({mean:+.4f} ±{error:.4f})" in text
    assert f"{row['tasks']['perplexity']['perplexity']:.3f}" in text


def test_windows_of_several_lengths_state_what_each_keeps(model, tmp_path):
    asked = [TaskSource(f"perplexity{end}", TEXT * 20, "d") for end in ("", "-64", "-128")]
    table, _ = run(model, asked[1:], tmp_path / "two")
    kept = [table["rows"][2]["tasks"][one.name]["kv_share"] for one in asked[1:]]
    assert kept == pytest.approx([0.5 + 1 / 64, 0.5 + 1 / 128])
    text = (tmp_path / "two" / "table.md").read_text()
    assert all(f"({share:.1%} kept)" in text for share in kept)
    with pytest.raises(EvaluationError, match="perplexity-9999 needs windows of 9999 tokens"):
        run(model, [TaskSource("perplexity-9999", TEXT * 20, "d")], tmp_path / "long")


def test_two_runs_write_the_same_files_and_a_third_does_nothing(model, sources, whole, tmp_path):
    first, again = Prepared(), Prepared()
    run(model, sources, tmp_path / "a", first)
    assert files(tmp_path / "a") == files(whole)
    run(model, sources, tmp_path / "a", again)
    assert (first.asked, again.asked) == ([("mha", "own", "clustered")], [])
    assert files(tmp_path / "a") == files(whole)


@pytest.mark.parametrize("forwards", [0, 3, 9, 14, 40])
def test_a_run_stopped_anywhere_goes_on_to_the_same_files(
    model, sources, whole, tmp_path, forwards
):
    left = [forwards]

    def stop(module, args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt

    hook = model.register_forward_pre_hook(stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(model, sources, tmp_path / "stopped")
    finally:
        hook.remove()
    assert model.config._attn_implementation != "chai"
    assert "results.json" not in files(tmp_path / "stopped")
    _, redone = run(model, sources, tmp_path / "stopped")
    assert not redone
    assert files(tmp_path / "stopped") == files(whole)


def test_damaged_and_foreign_files_are_measured_anew(model, sources, done):
    want = files(done)
    damaged = done / "own" / "arc_easy.json"
    damaged.write_bytes(damaged.read_bytes()[:-40])
    other = done / "clustered" / "last_word.json"
    other.write_bytes((done / "own" / "last_word.json").read_bytes())
    prepare = Prepared()
    _, redone = run(model, sources, done, prepare)
    assert sorted(redone) == ["arc_easy.json", "last_word.json"]
    assert prepare.asked == [("own", "clustered")]
    assert files(done) == want


def test_other_settings_are_measured_anew_and_mha_is_kept(model, sources, tmp_path):
    run(model, sources, tmp_path, asked={"save": 0.1})
    prepare = Prepared()
    run(model, sources, tmp_path, prepare, asked={"save": 0.2})
    assert prepare.asked == [("own", "clustered")]
    run(model, sources, tmp_path, prepare, asked={"save": 0.2}, limit=2)
    assert prepare.asked[1:] == [("mha", "own", "clustered")]


def test_another_seed_into_the_same_folder_destroys_nothing(model, sources, tmp_path):
    run(model, sources[2:3], tmp_path)
    before = files(tmp_path)
    for change in ({"seed": 1}, {"batch_size": 2}):
        prepare = Prepared()
        with pytest.raises(EvaluationError, match=f"another {next(iter(change))}: write to"):
            run(model, sources[2:3], tmp_path, prepare, **change)
        assert prepare.asked == []
        assert files(tmp_path) == before


def test_a_comparator_that_came_out_otherwise_is_measured_whole(model, sources, done):
    (done / "clustered" / "last_word.json").unlink()
    wider = Prepared({**MADE, "clustered": lambda name: Clustered(name, window=9)})
    _, redone = run(model, sources, done, wider)
    assert sorted(redone) == ["arc_challenge.json", "arc_easy.json", "perplexity.json"]
    found = json.loads((done / "clustered" / "arc_easy.json").read_text())
    assert found["settings"]["comparator"]["settings"] == {"window": 9}


def test_progress_counts_items_to_the_end(model, sources, tmp_path):
    seen = []
    what = Evaluation("tiny", ("own",), sources, tmp_path, limit=2)
    evaluate(
        model, tiny_tokenizer(), what, Prepared(), progress=lambda *report: seen.append(report)
    )
    done = [at for _, at, total in seen[1:]]
    assert done == sorted(done)
    assert seen[-1][1:] == (16, 16)
    assert {title for title, _, _ in seen} > {"mha: arc_easy", "own: perplexity"}


def test_impossible_requests_are_refused(model, sources, tmp_path):
    with pytest.raises(EvaluationError, match="no comparator other"):
        run(model, sources, tmp_path, names=("other",))
    with pytest.raises(EvaluationError, match="at least one task"):
        run(model, [], tmp_path)
    with pytest.raises(EvaluationError, match="limit"):
        run(model, sources, tmp_path, limit=0)


def test_models_are_told_apart_by_config_and_weights(model):
    digest = weights_digest(model)
    assert digest == weights_digest(eval_model("llama"))
    assert digest != weights_digest(eval_model("llama-grouped"))
    other = eval_model("llama")
    other.lm_head.weight.data[0, 0] += 1
    assert weights_digest(other) != digest
