"""The task recall: its lengths, its text, and whole evaluations of it."""

import json

import pytest
import torch
import transformers as tf

pytest.importorskip("lm_eval", reason="needs the extra eval")

from chai_attention.calibration.recall_words import CALIBRATION
from chai_attention.errors import CalibrationError, EvaluationError
from chai_attention.evaluation.evaluate import Evaluation, evaluate
from chai_attention.evaluation.recall_tasks import (
    parse_lengths,
    recall_lengths,
    recall_sources,
    recall_text,
)
from chai_attention.evaluation.tasks import RECALL, facts_and_length, task_names, task_sources
from chai_attention.reports.drawing import panel_svg
from chai_attention.reports.result_files import load_sections
from eval_methods import MADE, arc_rows, files
from tiny_models import CONFIGS
from tiny_tokenizer import tiny_tokenizer

LENGTHS = (1024, 1500)
FILLER = ["A hill is seen from the road. " * 40]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(5)
    config = CONFIGS["llama"]()
    config.max_position_embeddings = 2048
    return tf.AutoModelForCausalLM.from_config(config).eval()


def sources(model, lengths=LENGTHS, cases=3, seed=0, filler=FILLER):
    return recall_sources(model, tiny_tokenizer(), filler, lengths, cases, seed)


def test_lengths_double_up_to_the_context():
    assert recall_lengths(2048) == (1024, 2048)
    assert recall_lengths(8191) == (1024, 2048, 4096)
    assert recall_lengths(512) == (512,)
    assert recall_lengths(131_072) == recall_lengths(None)
    assert recall_lengths(None) == (1024, 2048, 4096, 8192, 16_384, 32_768)


def test_lengths_are_read_in_thousands():
    assert parse_lengths("1k, 3000,2K,1024") == (1024, 3000, 2048)
    for text in ("", "0", "1.5k", "1k,,2k", "long", "-1", "1e3"):
        with pytest.raises(EvaluationError, match="--recall-lengths"):
            parse_lengths(text)


def test_one_and_four_facts_at_every_length(model):
    found = sources(model)
    assert [facts_and_length(one.name) for one in found] == [
        (1, 1024), (4, 1024), (1, 1500), (4, 1500)
    ]  # fmt: skip
    for one in found:
        _, length = facts_and_length(one.name)
        assert [len(case.prompt) + len(case.answer) for case in one.cases] == [length] * 3
        for case in one.cases:
            text = tiny_tokenizer().decode(case.prompt)
            assert not any(name in text for name in CALIBRATION.names)
            assert tiny_tokenizer().decode(case.answer).strip() in text
    assert facts_and_length("piqa") is None


def test_the_seed_decides_the_cases_and_more_cases_keep_the_first(model):
    first, again, other = (sources(model, seed=seed) for seed in (0, 0, 1))
    assert [one.digest for one in first] == [one.digest for one in again]
    assert all(a.digest != b.digest for a, b in zip(first, other, strict=True))
    more = sources(model, cases=5)
    for a, b in zip(first, more, strict=True):
        assert [case.digest for case in a.cases] == [case.digest for case in b.cases[:3]]


def test_impossible_lengths_are_refused_before_anything_is_measured(model):
    with pytest.raises(EvaluationError, match="reads 2,048 tokens"):
        sources(model, lengths=(4096,))
    with pytest.raises(CalibrationError, match="too few for text"):
        sources(model, lengths=(64,))


def test_text_comes_from_the_option_or_the_folder_or_python(tmp_path):
    (tmp_path / "recall.jsonl").write_text('{"text": "of the folder"}\n')
    (tmp_path / "text.txt").write_text("of the option")
    assert recall_text(tmp_path) == ["of the folder"]
    assert recall_text(tmp_path, str(tmp_path / "text.txt")) == ["of the option"]
    built_in = recall_text(tmp_path / "none")
    assert built_in == recall_text()
    assert sum(map(len, built_in)) > 100_000


class Prepared:
    def __init__(self):
        self.asked = []

    def __call__(self, names):
        self.asked.append(tuple(names))
        return {name: MADE[name](name) for name in names}


def run(model, out, prepare, limit=None):
    (arc,) = task_sources(["arc_easy"], out.parent / "items")
    what = Evaluation("tiny", tuple(MADE), [arc, *sources(model)], out, limit=limit)
    return evaluate(model, tiny_tokenizer(), what, prepare)


def test_recall_stands_beside_other_tasks_and_a_second_run_measures_nothing(model, tmp_path):
    (tmp_path / "items").mkdir()
    lines = [json.dumps(row) for row in arc_rows(4)]
    (tmp_path / "items" / "arc_easy.jsonl").write_text("\n".join(lines))
    prepare = Prepared()
    table = run(model, tmp_path / "out", prepare)
    before = files(tmp_path / "out")
    assert run(model, tmp_path / "out", prepare) == table
    assert len(prepare.asked) == 1
    assert files(tmp_path / "out") == before
    mha, own, clustered = table["rows"]
    assert clustered["kv_length"] == clustered["tasks"]["arc_easy"]["kv_length"] < 1000
    for facts, length in ((1, 1024), (4, 1024), (1, 1500), (4, 1500)):
        cell = clustered["tasks"][f"recall-{facts}-{length}"]
        assert (cell["kind"], cell["items"], cell["kv_length"]) == ("recall", 3, length)
        assert cell["kv_share"] == pytest.approx(0.5 + 1 / length)
        assert cell["nll_diff"] != 0
        assert own["tasks"][f"recall-{facts}-{length}"]["nll"] == pytest.approx(
            mha["tasks"][f"recall-{facts}-{length}"]["nll"], rel=1e-4
        )
        items = json.loads((tmp_path / "out" / "clustered" / f"recall-{facts}-{length}.json")
                           .read_text())["items"]  # fmt: skip
        assert cell["nll"] == pytest.approx(sum(item["nll"] for item in items) / 3)
    text = (tmp_path / "out" / "table.md").read_text()
    assert "**recall from 1,500 tokens**" in text
    assert "4 facts: exact, % (3)" in text
    assert f"{cell['nll']:.4f} ±{cell['nll_se']:.4f} ({cell['nll_diff']:+.4f}" in text
    assert "recall-" not in text
    (section,) = load_sections([tmp_path / "out" / "results.json"])
    recall, kept = section.charts
    assert [panel.title for panel in recall.panels] == ["1 fact in the text", "4 facts in the text"]
    assert "clustered: " in panel_svg(recall.panels[1])[0]
    assert kept.panels[0].title == "accuracy, average of arc_easy"


def test_a_limit_takes_the_first_cases(model, tmp_path):
    (tmp_path / "items").mkdir()
    (tmp_path / "items" / "arc_easy.jsonl").write_text(json.dumps(arc_rows(1)[0]))
    table = run(model, tmp_path / "out", Prepared(), limit=2)
    assert table["rows"][0]["tasks"]["recall-1-1024"]["items"] == 2


def test_recall_is_a_name_of_its_own():
    assert task_names("recall,piqa") == (RECALL, "piqa")
    assert [one.name for one in task_sources(task_names("recall,piqa"))] == ["piqa"]
