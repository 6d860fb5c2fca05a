"""The promise about recall: what is asked, how sure it is, and that the search keeps to it."""

import math

import pytest
import torch

from chai_attention.calibration import calibrate, finish
from chai_attention.calibration import recall_check as module
from chai_attention.calibration.recall import RecallCase
from chai_attention.calibration.recall_check import RecallCheck, RecallTask, recall_check
from chai_attention.errors import CalibrationError
from eval_methods import eval_model
from tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def quiet(done, total):
    pass


def answers(*right):
    correct = torch.tensor(right, dtype=torch.bool)
    return correct, (~correct).float()


def check_of(monkeypatch, *scores, tasks=1):
    """A check whose answers are given, one after the other."""
    given = list(scores)
    monkeypatch.setattr(module, "recall_score", lambda model, cases, **options: given.pop(0))
    case = RecallCase(torch.ones(3).long(), torch.ones(1).long())
    return RecallCheck([RecallTask(1, 40 * (n + 1), [case] * 4) for n in range(tasks)])


def test_the_fall_is_the_mean_over_tasks_with_a_paired_binomial_error(monkeypatch):
    check = check_of(
        monkeypatch,
        answers(1, 1, 1, 0),
        answers(1, 1, 0, 0),
        answers(1, 0, 0, 1),  # two lost, one gained
        answers(1, 1, 0, 0),  # as before
        tasks=2,
    )
    check.begin(None, quiet)
    found = check.measure(None, quiet)
    assert found.fall == pytest.approx((1 / 4 + 0) / 2)
    variance = (3 - 1 / 4) / 16 / 4 + 1 / 64
    assert found.standard_error == pytest.approx(math.sqrt(variance))
    assert found.tasks[0] == {
        "facts": 1, "length": 40, "cases": 4, "full": 3, "clustered": 2, "nll_rise": 0.25,
    }  # fmt: skip


def test_few_cases_without_a_change_are_not_taken_as_certain(monkeypatch):
    check = check_of(monkeypatch, answers(1, 1, 1, 1), answers(1, 1, 1, 1))
    check.begin(None, quiet)
    found = check.measure(None, quiet)
    assert (found.fall, found.standard_error) == (0, 0.25)
    assert not found.within(0.05)
    assert found.within(0.42)


def test_what_the_full_model_cannot_recall_is_left_out_and_said(monkeypatch):
    check = check_of(
        monkeypatch, answers(0, 0, 0, 0), answers(1, 1, 1, 0), answers(1, 1, 1, 0), tasks=2
    )
    check.begin(None, quiet)
    assert [task.length for task in check.tasks] == [80]
    assert check.note == (
        "the full model recalls 0 of 4 (1 fact, 40 tokens): too few to promise anything"
    )
    assert check.measure(None, quiet).fall == 0


def test_questions_are_of_both_lengths_where_there_is_room():
    texts = [torch.randint(4, 90, (3, 900)), torch.randint(4, 90, (3, 1800))]
    check = recall_check(TOKENIZER, texts, 0)
    assert [(task.facts, task.length) for task in check.tasks] == [
        (1, 900), (4, 900), (1, 1800), (4, 1800),
    ]  # fmt: skip
    assert [len(task.cases) for task in check.tasks] == [48, 48, 16, 16]
    again = recall_check(TOKENIZER, texts, 0)
    assert check.tasks[3].cases[5].digest == again.tasks[3].cases[5].digest
    assert check.note is None
    short = recall_check(TOKENIZER, [text[:, :60] for text in texts[:1]], 0)
    assert not short.tasks
    assert "60 tokens are too few" in short.note
    assert recall_check(None, texts, 0).note == "recall needs the model's tokenizer"


@pytest.fixture(scope="module")
def model():
    return eval_model("llama")


WINDOWS = torch.randint(4, 90, (8, 500), generator=torch.Generator().manual_seed(3))


def calibrated(model, **options):
    return calibrate(
        model, TOKENIZER, WINDOWS[:4], held_out=WINDOWS[4:], recent=8, context=500, recall=0.0,
        **options,
    )  # fmt: skip


def losing(lost):
    """A stand-in for `recall_score`: how many of 48 answers are lost, by streaming heads."""

    def score(model, cases, **options):
        correct = torch.ones(len(cases), dtype=torch.bool)
        correct[: lost(getattr(model.config, "_streaming", 0))] = False
        return correct, (~correct).float()

    return score


def test_the_search_goes_down_until_recall_holds(model, monkeypatch):
    free = calibrated(model, max_loss=9.0, max_recall_loss=1.0)

    def count(profile):
        return sum(map(len, profile.streaming)) + sum(6 - k for k in profile.clusters)

    plain = finish.enabled

    def told(model, profile):
        model.config._streaming = count(profile)
        return plain(model, profile)

    monkeypatch.setattr(finish, "enabled", told)
    monkeypatch.setattr(module, "recall_score", losing(lambda heads: 8 * (heads > 6)))
    model.config._streaming = 0
    try:
        kept = calibrated(model, max_loss=9.0)
        monkeypatch.setattr(module, "recall_score", losing(lambda heads: 8 * (heads > 0)))
        model.config._streaming = 0
        with pytest.raises(CalibrationError, match="max_recall_loss 5"):
            calibrated(model, max_loss=9.0)
    finally:
        del model.config._streaming
    assert count(kept) <= 6 < count(free)
    assert kept.promise["max_recall_loss"] == 0.05
    assert kept.promise["recall"]["fall"] == 0
    assert kept.promise["recall"]["tasks"][0]["clustered"] == 48


def test_a_model_that_recalls_nothing_keeps_its_savings_and_the_profile_says_why(model):
    kept = calibrated(model, max_loss=0.5)
    assert "the full model recalls 0 of 16 (1 fact, 500 tokens)" in kept.promise["recall"]["note"]
    assert "fall" not in kept.promise["recall"]
    assert "max_recall_loss" not in kept.promise
    assert "recall" in calibrated(model, save=0.2).promise
    assert "recall" not in calibrate(
        model, TOKENIZER, WINDOWS[:4], held_out=WINDOWS[4:], recipe="share", recent=8, save=0.02
    ).promise  # fmt: skip
