"""A table of `chai eval` by vLLM, beside the one by transformers."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("vllm", reason="`make test-vllm` installs vLLM")
pytest.importorskip("lm_eval", reason="needs the extra eval")

from chai_attention.calibration.recall import recall_cases
from chai_attention.calibration.texts import windows_of
from chai_attention.errors import EvaluationError
from chai_attention.evaluation import served as module
from chai_attention.evaluation.comparators.mha import Mha
from chai_attention.evaluation.evaluate import Evaluation, evaluate
from chai_attention.evaluation.profiled import Profiled
from chai_attention.evaluation.served import Served, longest_text
from chai_attention.evaluation.tasks import TaskSource
from chai_attention.runtime.skeleton import load_skeleton
from eval_methods import arc_rows
from vllm_job import ENVIRONMENT
from vllm_profiles import PROFILES

PROFILE = PROFILES["streaming"]
ROWS = 4


@pytest.fixture(scope="module")
def tokenizer(tiny):
    found = AutoTokenizer.from_pretrained(tiny)
    found.eos_token = found.convert_ids_to_tokens(0)
    return found


@pytest.fixture(scope="module")
def model(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def sources(model, tokenizer):
    documents = [
        f"Passage {n}. " + "Some text, again and again, to read on. " * 30 for n in range(9)
    ]
    windows = windows_of(documents, tokenizer, 3, 440, 0)
    cases = recall_cases(tokenizer, windows, 3, 440, seed=0)
    prompt = cases[0].prompt[None]
    count = len(cases[0].answer)
    written = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=count,
        min_new_tokens=count, pad_token_id=0,
    )  # fmt: skip
    cases[0] = replace(cases[0], answer=written[0, -count:])  # this one the full model knows
    words = tuple({"text": f"the cat {n} sat on the cat"} for n in range(4))
    texts = tuple({"text": text} for text in documents)
    return [
        TaskSource("arc_easy", tuple(arc_rows(5)), "a"),
        TaskSource("last_word", words, "b"),
        TaskSource("perplexity-100", texts, "c"),
        TaskSource("recall-1-440", None, "d", tuple(cases)),
    ]


def test_the_table_is_that_of_transformers_and_engines_are_never_mixed(
    model, tokenizer, sources, tiny, tmp_path, monkeypatch
):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    PROFILE.save(tmp_path / "profile.json")
    skeleton, _ = load_skeleton(str(tiny), torch.float32)
    started = []

    class Counted(module.ScoringEngine):
        def __init__(self, *args):
            started.append(self)
            super().__init__(*args)

    monkeypatch.setattr(module, "ScoringEngine", Counted)

    def run(engine, out):
        what = Evaluation("tiny", ["profile"], sources, tmp_path / out, limit=5, batch_size=ROWS)
        served, prepare = None, lambda names: {"mha": Mha(), "profile": Profiled(PROFILE)}
        if engine == "vllm":
            named = (str(tmp_path / "profile.json"), PROFILE)
            served = Served(str(tiny), skeleton, named, 1, ROWS, longest_text(sources))
            served.check()
            prepare = served.comparators
        return evaluate(skeleton if served else model, tokenizer, what, prepare, served=served)

    wanted, found = run("transformers", "t"), run("vllm", "v")
    assert len(started) == 2  # one for each row
    assert all(engine._process.poll() is not None for engine in started)
    assert (wanted["run"]["engine"], found["run"]["engine"]) == ("transformers", "vllm")
    assert "on cpu by vllm" in (tmp_path / "v" / "table.md").read_text()
    for row in ("mha", "profile"):
        for source in sources:
            a, b = (
                json.loads((tmp_path / out / row / f"{source.name}.json").read_text())
                for out in "tv"
            )
            assert b["kv_share"] == pytest.approx(a["kv_share"])
            assert b["metrics"] == pytest.approx(a["metrics"], rel=1e-4)
            for ours, theirs in zip(b["items"], a["items"], strict=True):
                assert ours.pop("loglikelihoods") == pytest.approx(
                    theirs.pop("loglikelihoods"), rel=1e-5, abs=1e-4
                )
                assert ours.pop("nll") == pytest.approx(theirs.pop("nll"), rel=1e-5, abs=1e-4)
                assert ours == theirs
    recalled = [row["tasks"]["recall-1-440"]["acc"] for row in found["rows"]]
    assert recalled == [pytest.approx(1 / 3), 0.0]
    # a second run measures nothing, and a folder belongs to one engine
    assert run("vllm", "v") == found
    assert len(started) == 2
    for engine, out in (("vllm", "t"), ("transformers", "v")):
        with pytest.raises(EvaluationError, match=r"measured with another .*engine"):
            run(engine, out)
