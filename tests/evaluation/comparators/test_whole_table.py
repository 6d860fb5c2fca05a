"""All comparators that are here in one table, by lm-eval, on the items of the paper's tasks."""

import pytest

pytest.importorskip("lm_eval", reason="needs the extra eval")

from chai_attention.evaluation.comparators import registry
from chai_attention.evaluation.evaluate import Evaluation, evaluate
from chai_attention.evaluation.tasks import PAPER, task_names, task_sources
from comparator_cases import text
from eval_methods import eval_model
from tiny_tokenizer import tiny_tokenizer


@pytest.mark.parametrize("family", ["opt", pytest.param("llama", marks=pytest.mark.exhaustive)])
def test_both_architectures_run_the_whole_table(shared, tmp_path, family):
    model = eval_model(family)
    names = registry.available(None, model)[0]

    def prepare(wanted):
        return registry.comparators(wanted, model=model, tokens=text(), save=0.2)

    what = Evaluation(
        "tiny",
        names,
        task_sources(task_names("paper"), shared / "data" / "eval"),
        tmp_path,
        limit=2,
    )
    table = evaluate(model, tiny_tokenizer(), what, prepare)
    assert [row["comparator"] for row in table["rows"]] == list(names)
    others = table["rows"][1:]
    for row in others:
        changes = [abs(row["tasks"][task]["nll_diff"]) for task in PAPER]
        assert max(changes) > 0, row["comparator"]
