"""The lm-eval model "chai" against lm-eval's own, and against single unpadded sequences."""

import json
import random
from functools import partial
from importlib.metadata import EntryPoint

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs the extra eval")

import lm_eval
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from chai_attention.errors import EvaluationError
from chai_attention.evaluation.scores import mean_of
from chai_attention.evaluation.tasks import task_names, task_sources
from chai_attention.integrations.lm_eval import __main__ as command_line
from chai_attention.integrations.lm_eval import model as lm_eval_model
from chai_attention.integrations.lm_eval import register, tasks
from chai_attention.integrations.lm_eval.items import CONTINUATION
from chai_attention.integrations.lm_eval.model import ChaiLM
from chai_attention.integrations.lm_eval.scoring import score_task
from chai_attention.integrations.lm_eval.tasks import load_task
from chai_attention.integrations.transformers import enabled, loading, logits
from chai_attention.profile import ClusterProfile
from eval_methods import Clustered, Evicting, GivenCache, OwnCache, arc_rows, eval_model
from tiny_tokenizer import tiny_tokenizer

TASKS = ("piqa", "hellaswag", "arc_challenge", "arc_easy", "boolq")


def requests(seed=0, count=23):
    """(texts, context, answer) in tokens: some shorter than a window, some sharing contexts."""
    drawn = random.Random(seed)
    found = []
    for number in range(count):
        context = [drawn.randrange(4, 97) for _ in range(drawn.choice([1, 2, 3, 9, 30, 31]))]
        for size in (1, 1, drawn.choice([2, 7])):
            answer = [drawn.randrange(4, 97) for _ in range(size)]
            found.append(((number, len(found)), context, answer))
    return found


def rows_of(shared, name, count):
    lines = (shared / "data" / "eval" / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[:count]]


def chai_lm(model, **options):
    return ChaiLM(model, tokenizer=tiny_tokenizer(), **{"batch_size": 4, **options})


@torch.no_grad()
def one_by_one(model, found):
    """Log-likelihoods from single sequences in one call each, without any padding."""
    values = []
    for _, context, answer in found:
        logits = model(torch.tensor([context + answer[:-1]])).logits[0, -len(answer) :]
        chosen = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])
        values.append(chosen.sum().item())
    return values


@pytest.fixture(scope="module")
def both(shared):
    """lm-eval's own model and ours, loaded from the same folder."""
    folder = str(shared / "models" / "mha-lm")
    options = {"pretrained": folder, "device": "cpu", "batch_size": 3, "dtype": "float32"}
    register()
    return HFLM(**options), get_model("chai")(**options)


@pytest.mark.parametrize("name", TASKS)
def test_real_items_of_a_real_model_score_as_lm_evals_own_model_to_the_last_digit(
    shared, both, name
):
    hf, chai = both
    task = load_task(name, rows_of(shared, name, 2))
    want = lm_eval.evaluate(hf, {"tasks": {name: task}}, bootstrap_iters=0)
    got = score_task(chai, load_task(name, rows_of(shared, name, 2)))
    for item, sample in zip(got.items, want["samples"][name], strict=True):
        assert item.loglikelihoods == tuple(value for value, _ in sample["filtered_resps"])
        assert item.acc == sample["acc"]
        assert item.acc_norm == sample.get("acc_norm")
        assert item.gold == sample["target"]
    assert got.metrics["acc"] == want["results"][name]["acc,none"]


def test_lambada_from_a_file_scores_as_lm_evals_own_model(tmp_path, both):
    hf, chai = both
    texts = ["The cat sat on the mat and then it left the mat", "He said no, and again he said no"]
    lines = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "lambada.jsonl").write_text("\n".join(lines))
    (source,) = task_sources(task_names("lambada"), tmp_path)
    want = lm_eval.evaluate(
        hf, {"tasks": {source.name: load_task(source.name, source.rows)}}, bootstrap_iters=0
    )
    got = score_task(chai, load_task(source.name, source.rows))
    assert got.kind == CONTINUATION
    for item, sample in zip(got.items, want["samples"]["lambada_openai"], strict=True):
        assert item.loglikelihoods == (sample["filtered_resps"][0][0],)
        assert item.nll == -item.loglikelihoods[0] > 0
        assert item.acc == sample["acc"]
    results = want["results"]["lambada_openai"]
    assert got.metrics == {name: results[f"{name},none"] for name in ("acc", "perplexity")}


def test_means_and_errors_are_lm_evals():
    task = load_task("arc_easy", arc_rows(9))
    lm = chai_lm(eval_model("llama"))
    found = lm_eval.evaluate(lm, {"tasks": {"arc_easy": task}}, bootstrap_iters=1)
    results = found["results"]["arc_easy"]
    scored = score_task(lm, task)
    for metric in ("acc", "acc_norm"):
        mean = mean_of([getattr(item, metric) for item in scored.items])
        assert mean.mean == pytest.approx(results[f"{metric},none"], abs=1e-12)
        assert mean.error == pytest.approx(results[f"{metric}_stderr,none"], abs=1e-12)
    gold = [-item.loglikelihoods[item.gold] for item in scored.items]
    assert [item.nll for item in scored.items] == gold


def test_the_registry_knows_chai_by_name_with_a_profile(tmp_path):
    model = eval_model("llama")
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    profile = ClusterProfile((2, 3, 2), window=5)
    profile.save(tmp_path / "profile.json")
    register()
    found = lm_eval.simple_evaluate(
        model="chai",
        model_args=f"pretrained={tmp_path / 'model'},profile={tmp_path / 'profile.json'}",
        tasks=[load_task("arc_easy", arc_rows(3))],
        task_manager=TaskManager(include_defaults=False),
        device="cpu",
        batch_size=5,
        bootstrap_iters=0,
    )
    got = [[v for v, _ in s["filtered_resps"]] for s in found["samples"]["arc_easy"]]
    with enabled(model, profile):
        want = score_task(chai_lm(model, batch_size=1), load_task("arc_easy", arc_rows(3)))
    plain = score_task(chai_lm(model, batch_size=1), load_task("arc_easy", arc_rows(3)))
    for row, item, other in zip(got, want.items, plain.items, strict=True):
        assert row == pytest.approx(item.loglikelihoods, abs=1e-3)
        assert row != pytest.approx(other.loglikelihoods, abs=1e-3)


LOCAL_TASK = """
task: local_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {items}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_choice: ["yes", "no"]
doc_to_target: 0
metric_list:
  - metric: acc
"""


def test_lm_evals_command_line_takes_chai_with_a_profile(tmp_path, monkeypatch, capsys):
    model, profile = eval_model("llama"), ClusterProfile((2, 3, 2), window=5)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    profile.save(tmp_path / "profile.json")
    items = tmp_path / "items.jsonl"
    items.write_text("".join(json.dumps({"q": f"why is it {n}"}) + "\n" for n in range(3)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(LOCAL_TASK.format(items=items))
    arguments = [
        "lm_eval", "--model", "chai", "--device", "cpu", "--batch_size", 2, "--tasks",
        "local_choice", "--include_path", tmp_path / "tasks", "--log_samples", "--model_args",
        f"pretrained={tmp_path / 'model'},profile={tmp_path / 'profile.json'}",
        "--output_path", tmp_path / "out",
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", [str(argument) for argument in arguments])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command_line.main()
    assert "local_choice" in capsys.readouterr().out
    (samples,) = (tmp_path / "out").rglob("samples_local_choice_*.jsonl")
    with enabled(model, profile):
        for line in samples.read_text().splitlines():
            sample = json.loads(line)
            context = sample["arguments"]["gen_args_0"]["arg_0"]
            for (value, _), answer in zip(sample["filtered_resps"], (" yes", " no"), strict=True):
                lm = chai_lm(model)
                context_tokens, answer_tokens = lm._encode_pair(context, answer)
                (want,) = one_by_one(model, [(None, context_tokens, answer_tokens)])
                assert float(value) == pytest.approx(want, abs=1e-3)


def test_releases_with_plugins_find_the_same_class():
    value = "chai_attention.integrations.lm_eval.model:ChaiLM"
    point = EntryPoint("chai", value, "lm_eval.models")
    assert point.load() is get_model("chai") is ChaiLM


@pytest.mark.parametrize("family", ["llama", "llama-grouped", "opt"])
@pytest.mark.parametrize("window", [5, 32])
def test_an_online_membership_never_sees_padding_or_its_batch(family, window):
    model, found = eval_model(family), requests()
    method = Clustered(window=window)
    with enabled(model, method.profile):
        want = one_by_one(model, found)
    for batch_size, order in ((1, 1), (7, 1), (7, -1)):
        lm = chai_lm(model, batch_size=batch_size)
        with lm.using(method):
            got = [value for value, _ in lm.score_tokens(found[::order])][::order]
        assert got == pytest.approx(want, abs=1e-3)
    assert want != pytest.approx(one_by_one(model, found), abs=1e-3)


@pytest.mark.parametrize("family", ["llama", "llama-grouped", "opt", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("method", [OwnCache, GivenCache])
def test_two_calls_score_as_one_for_the_models_own_cache(family, method):
    model, found = eval_model(family), requests()
    lm = chai_lm(model, batch_size=5)
    want = lm.score_tokens(found)
    with lm.using(method("own")):
        got = lm.score_tokens(found)
    assert [value for value, _ in got] == pytest.approx([value for value, _ in want], abs=1e-3)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in want]


def test_the_cache_is_read_by_every_prediction_that_is_scored():
    model = eval_model("llama")
    calls = []

    class Watched(GivenCache):
        def new_cache(self, model):
            calls.append([])
            return super().new_cache(model)

    def watch(module, args, kwargs, out):
        calls[-1].append(args[0].shape[1])

    hook = model.register_forward_hook(watch, with_kwargs=True)
    lm = chai_lm(model)
    with lm.using(Watched("watched")):
        lm.score_tokens([((0,), [5] * 9, [6]), ((1,), [5] * 9, [7]), ((2,), [5], [6, 7, 8])])
    hook.remove()
    # one-token answers share their calls; a context of one token is all that fills the cache
    assert sorted(calls) == [[1, 2], [8, 1]]


@pytest.mark.parametrize("looks_ahead", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_answers_to_one_context_share_its_cache_and_never_see_each_other(looks_ahead, batch_size):
    model, rows = eval_model("llama"), []

    class Watched(Evicting):
        def looks_ahead(self, context):
            assert context == 8
            return looks_ahead

    answers = [[6, 7, 8], [9], [10], [6, 7, 9], [11] * 7]
    found = [((n,), [5, 7, 9] * 3, answer) for n, answer in enumerate(answers)]
    lm = chai_lm(model, batch_size=batch_size)
    with lm.using(Watched("watched")):
        alone = [lm.score_tokens([request])[0] for request in found]
        hook = model.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape))
        together = lm.score_tokens(found)
        hook.remove()
    assert [value for value, _ in together] == pytest.approx(
        [value for value, _ in alone], abs=1e-4
    )
    assert [greedy for _, greedy in together] == [greedy for _, greedy in alone]
    if batch_size == 16:
        longest = 6 + 1  # the context's last token, the answer but its last
        apart = [(1, 8), (1, 3), (1, 8), (1, 1), (1, 8), (1, longest)]
        assert rows == (apart if looks_ahead else [(3, 8), (3, longest)])


def test_long_contexts_are_cut_as_lm_eval_cuts_them():
    model = eval_model("llama")
    found = [((0,), [5 + i % 60 for i in range(700)], [6, 7, 8])]
    want = chai_lm(model).score_tokens(found)
    for method in (OwnCache("own"), Clustered()):
        lm = chai_lm(model)
        with lm.using(method):
            got = lm.score_tokens(found)
        assert lm.lengths[0,] == (700, 3)
        if method.needs_cache:
            assert got[0][0] == pytest.approx(want[0][0], abs=1e-3)
    with pytest.raises(EvaluationError, match="longer than the model's maximum"):
        chai_lm(model).score_tokens([((0,), [5], [6] * 600)])


def test_a_profile_needs_a_batch_size():
    model = eval_model("llama")
    with pytest.raises(EvaluationError, match="give a number"):
        chai_lm(model, profile=ClusterProfile((2, 2, 2)), batch_size="auto")


@pytest.mark.parametrize("name", ["smollm2-135m", "some/model.gguf"])
def test_gguf_files_are_loaded_as_for_calibration(monkeypatch, name):
    asked = []

    def load(*arguments):
        asked.append(arguments)
        return eval_model("llama"), tiny_tokenizer()

    monkeypatch.setattr(loading, "load_model", load)
    device = "cuda:0" if torch.cuda.is_available() else "auto"
    lm = ChaiLM(name, ClusterProfile((2, 2, 2)), device="cuda:0", dtype="float32", batch_size=2)
    assert asked == [(name, "float32", device)]
    assert lm.model.config._attn_implementation == "chai"
    assert lm.score_tokens([((0,), [5, 6], [7])])[0][0] < 0


def test_what_cannot_be_a_table_is_refused(monkeypatch):
    with pytest.raises(EvaluationError, match="cannot use items with columns"):
        load_task("piqa", [{"text": "no such columns"}])
    # the index of all of lm-eval's tasks takes 10 s
    monkeypatch.setattr(tasks, "TaskManager", partial(TaskManager, include_defaults=False))
    with pytest.raises(EvaluationError, match="lm-eval has no task"):
        load_task("no_such_task", [{"text": "a"}])


@pytest.mark.parametrize("method", [None, Clustered, OwnCache], ids=["full", "clustered", "cache"])
@pytest.mark.parametrize("size", [4, 33, 64])
def test_ends_of_windows_are_scored_as_lm_eval_scores_them(method, size, monkeypatch):
    """Batches by tokens, logits in blocks: what a long window takes, and what it gets."""
    model, start = eval_model("llama"), size // 2
    windows = torch.randint(4, 97, (5, size), generator=torch.Generator().manual_seed(size))
    lm, told = chai_lm(model), []
    lm.progress = lambda *done: told.append(done)
    asked = [((i,), row[:start], row[start:]) for i, row in enumerate(windows.tolist())]
    with lm.using(None if method is None else method()):
        want = [value for value, _ in lm.score_tokens(asked)]
        told.clear()
        for block in (logits.LOGITS, 97 * 7):
            monkeypatch.setattr(logits, "LOGITS", block)
            monkeypatch.setattr(lm_eval_model, "LOGITS", block)
            monkeypatch.setattr(logits, "MOST_TOKENS", 2 * size)
            assert lm.score_ends(windows, start) == pytest.approx(want, rel=1e-4)
    assert told[-1] == (5, 5)
