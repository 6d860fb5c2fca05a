"""Text to recall from beside other text: what is asked, what it weighs, what profiles remember."""

from dataclasses import replace

import pytest
import torch

from chai_attention.calibration import calibrate
from chai_attention.calibration.costs import ExactWindow, collect_costs
from chai_attention.calibration.evidence import RECALL_COSTS, EvidenceStore
from chai_attention.calibration.evidence_file import EvidenceFile
from chai_attention.calibration.recall import recall_sequences
from chai_attention.calibration.recall_source import recall_of, split_recall, use_recall
from chai_attention.calibration.settings import DEFAULT_RECALL, Settings
from chai_attention.calibration.sources import parse_sources
from chai_attention.errors import CalibrationError
from chai_attention.runtime.shape import describe
from eval_methods import eval_model
from tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
RECENT = 8


@pytest.fixture(scope="module")
def model():
    return eval_model("llama")


@pytest.fixture(scope="module")
def windows():
    return torch.randint(4, 90, (4, 400), generator=torch.Generator().manual_seed(3))


def settings_of(model, **options):
    return Settings(recent=RECENT, save=0.2, context=400, **options).resolve(describe(model))


def profile_of(model, windows, **options):
    return calibrate(
        model, TOKENIZER, windows, recent=RECENT, save=0.2, context=400, measure=False, **options
    )


@pytest.mark.parametrize(
    ("items", "others", "weight"),
    [
        (["a.txt"], ["a.txt"], None),
        (["a.txt", "recall"], ["a.txt"], DEFAULT_RECALL),
        (["recall:0.5", "a.txt:2", "b.txt:1"], ["a.txt:2", "b.txt:1"], 0.5),
        (["self", "recall:0"], ["self"], 0.0),
        (["recalls.txt"], ["recalls.txt"], None),
    ],
)
def test_recall_is_taken_out_of_the_sources_with_a_weight_of_its_own(items, others, weight):
    assert split_recall(items) == (others, weight)


@pytest.mark.parametrize(
    ("items", "match"),
    [
        (["recall"], "hides facts in other text: name that too"),
        (["a.txt", "recall", "recall:2"], "recall is there twice"),
        (["a.txt", "recall:-1"], "a number of at least 0"),
        (["a.txt", "recall:much"], "a number of at least 0"),
        (["a.txt", "recall:nan"], "a number of at least 0"),
    ],
)
def test_recall_without_other_text_or_with_another_weight_is_refused(items, match):
    with pytest.raises(CalibrationError, match=match):
        split_recall(items)


def test_commands_that_learn_nothing_from_it_refuse_it():
    with pytest.raises(CalibrationError, match="leave it out here"):
        parse_sources(["a.txt", "recall:1"])


def test_costs_of_recalling_are_added_by_weight(model, windows):
    settings = settings_of(model, recall=0.5)
    store = EvidenceStore(model, windows)
    plain = store.get_all(settings, [RECENT])[RECENT]
    recall = recall_of(TOKENIZER, windows, 0)
    store.use_recall(recall)
    assert store.missing(settings, [RECENT]) == [RECALL_COSTS]
    both = store.get_all(settings, [RECENT])[RECENT]
    exact = ExactWindow(RECENT, settings.sinks, plain.offsets)
    (alone,) = collect_costs(
        model, recall.tokens, "gradient", exact=[exact], counted=recall.counted
    )
    torch.testing.assert_close(both.streaming, plain.streaming + 0.5 * alone.streaming)
    assert (alone.streaming > 0).all()
    assert torch.equal(both.grams, plain.grams)
    twice = store.get_all(settings_of(model, recall=1.0), [RECENT])[RECENT]
    torch.testing.assert_close(twice.streaming, plain.streaming + alone.streaming)
    shared = Settings(recipe="share", recent=RECENT, save=0.02).resolve(describe(model))
    assert torch.equal(store.get(shared).costs, plain.costs)


def test_other_facts_are_collected_anew_and_the_same_are_not(model, windows):
    settings = settings_of(model)
    store = EvidenceStore(model, windows)
    for seed, missing in ((0, [RECALL_COSTS]), (0, []), (1, [RECALL_COSTS])):
        use_recall(store, TOKENIZER, replace(settings, seed=seed), required=False)
        if not seed:
            store.get_all(settings, [RECENT])
            missing = []
        assert store.missing(settings, [RECENT]) == missing


def test_windows_to_recall_from_are_spread_over_the_text_and_a_quarter_of_its(model):
    windows = torch.arange(4, 20)[:, None].expand(16, 400).contiguous()  # a row is one token
    rows = recall_of(TOKENIZER, windows, 0).tokens
    assert [int(row.mode().values) for row in rows] == [4, 8, 12, 16]
    assert len(recall_of(TOKENIZER, windows[:1], 0).tokens) == 1


def test_the_default_learns_from_recall_and_says_so_and_other_recipes_do_not(model, windows):
    found = profile_of(model, windows)
    assert found.provenance["recall"] == DEFAULT_RECALL
    assert found.provenance["recall_samples"] == 1
    assert found == profile_of(model, windows)  # deterministic
    assert found != profile_of(model, windows, seed=1)
    assert "recall" not in profile_of(model, windows, recall=0.0).provenance
    shared = calibrate(
        model, TOKENIZER, windows, recipe="share", recent=RECENT, save=0.02, measure=False
    )
    assert "recall" not in shared.provenance


def test_text_without_room_for_facts_is_used_without_unless_recall_was_asked_for(model, windows):
    found = profile_of(model, windows[:, :80])
    assert found.provenance["recall"].startswith("left out: 80 tokens are too few")
    with pytest.raises(CalibrationError, match="80 tokens are too few"):
        profile_of(model, windows[:, :80], recall=1.0)


def test_windows_of_tokens_without_a_tokenizer_hide_no_facts(model, windows):
    options = {"recent": RECENT, "save": 0.2, "context": 400, "measure": False}
    found = calibrate(model, None, windows, **options)
    assert found.provenance["recall"] == "left out: text to recall from needs the model's tokenizer"
    with pytest.raises(CalibrationError, match="ready sequences of tokens"):
        calibrate(model, None, "some text", **options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"recall": -1.0}, "recall is a weight of at least 0"),
        ({"recall": float("nan")}, "recall is a weight of at least 0"),
        ({"recipe": "paper", "recall": 1.0}, "for gradient costs"),
        ({"save": 0.2, "max_recall_loss": 0.05}, "goes with max_loss"),
        ({"max_loss": 0.01, "max_recall_loss": 0.0}, "max_recall_loss is a share"),
        ({"max_loss": 0.01, "max_recall_loss": 1.5}, "max_recall_loss is a share"),
    ],
)
def test_settings_of_recall_that_cannot_be_are_refused(model, options, match):
    with pytest.raises(CalibrationError, match=match):
        Settings(**options).resolve(describe(model))


def test_an_interrupted_pass_over_recall_goes_on_to_the_bit(model, windows, tmp_path, monkeypatch):
    monkeypatch.setattr("chai_attention.calibration.evidence_file.EVERY", 0.0)
    settings = settings_of(model)
    recall = recall_sequences(TOKENIZER, windows, 4, 400)

    def collected(file, steps=None):
        store = EvidenceStore(model, windows, 2, file)
        store.use_recall(recall)
        return store.get_all(settings, [RECENT], steps)[RECENT]

    whole = collected(None)
    path = tmp_path / "evidence"

    class Interrupting:
        def begin(self, what):
            def report(done, total):
                if what == RECALL_COSTS and done == 2:
                    raise KeyboardInterrupt

            return report

    with pytest.raises(KeyboardInterrupt):
        collected(EvidenceFile(path, {}), Interrupting())
    runs = []
    hook = model.base_model.register_forward_hook(lambda *a: runs.append(1))
    try:
        again = collected(EvidenceFile(path, {}))
    finally:
        hook.remove()
    assert len(runs) == 3  # a look at the loss, and the last two windows
    assert torch.equal(again.streaming, whole.streaming)
    assert torch.equal(again.costs, whole.costs)
