"""Scores of questions about texts are what greedy decoding and the definition say."""

import pytest
import torch

from chai_attention.calibration.recall import RecallCase
from chai_attention.calibration.recall_score import recall_score
from chai_attention.integrations.transformers import enabled
from eval_methods import Clustered, Evicting, OwnCache, eval_model


@pytest.fixture(scope="module")
def model():
    return eval_model("llama")


@torch.no_grad()
def greedy(model, prompt, count):
    tokens = prompt
    for _ in range(count):
        tokens = torch.cat([tokens, model(tokens[None]).logits[0, -1:].argmax(-1)])
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def cases(model):
    """Answers of 1 to 4 tokens, every other one what the model would write."""
    draw = torch.Generator().manual_seed(2)
    made = []
    for number in range(9):
        prompt = torch.randint(3, 97, (30 - number % 4,), generator=draw)
        answer = greedy(model, prompt, 1 + number % 4)
        if number % 2:
            answer[-1] = (answer[-1] + 5) % 90 + 3
        made.append(RecallCase(prompt, answer))
    return made


def defined(model, case):
    with torch.no_grad():
        logits = model(torch.cat([case.prompt, case.answer])[None]).logits[0]
    scores = logits.log_softmax(-1)[len(case.prompt) - 1 : -1]
    return float(-scores.gather(1, case.answer[:, None]).sum())


@pytest.mark.parametrize("batch_size", [1, 16])
def test_an_answer_is_right_if_greedy_decoding_writes_it(model, cases, batch_size):
    seen = []
    correct, nll = recall_score(
        model, cases, batch_size=batch_size, progress=lambda *at: seen.append(at)
    )
    assert correct.tolist() == [number % 2 == 0 for number in range(9)]
    expected = torch.tensor([defined(model, case) for case in cases])
    torch.testing.assert_close(nll, expected, atol=1e-4, rtol=1e-4)
    assert seen[-1] == (9, 9)


def test_a_cache_in_two_calls_is_the_model_itself(model, cases):
    correct, nll = recall_score(model, cases)
    again, cached = recall_score(model, cases, method=OwnCache())
    assert torch.equal(correct, again)
    torch.testing.assert_close(nll, cached, atol=1e-4, rtol=1e-4)
    evicting = Evicting()
    with evicting.attached(model):
        _, changed = recall_score(model, cases, method=evicting)
    assert (changed - nll).abs().min() > 1e-3


def test_enabled_models_and_training_mode_are_left_as_they_were(model, cases):
    _, plain = recall_score(model, cases)
    profile = Clustered().profile
    model.train()
    try:
        with enabled(model, profile):
            _, clustered = recall_score(model, cases)
            assert model.training
    finally:
        model.eval()
    with enabled(model, profile):
        expected = torch.tensor([defined(model, case) for case in cases])
    torch.testing.assert_close(clustered, expected, atol=1e-4, rtol=1e-4)
    assert (clustered - plain).abs().max() > 1e-3


def test_long_cases_share_no_batch_and_only_the_answers_logits_are_made(model, cases, monkeypatch):
    monkeypatch.setattr("chai_attention.calibration.recall_score.MOST_TOKENS", 64)
    shapes = []
    hook = model.lm_head.register_forward_hook(
        lambda module, args, out: shapes.append(tuple(out.shape[:2]))
    )
    try:
        recall_score(model, cases)
    finally:
        hook.remove()
    assert max(rows for rows, _ in shapes) == 2
    assert max(tokens for _, tokens in shapes) <= 4


def test_methods_that_keep_rows_apart_answer_in_batches(model, cases):
    class Apart(OwnCache):
        rows_apart = True

    rows = []
    hook = model.base_model.register_forward_hook(
        lambda module, args, out: rows.append(len(out.last_hidden_state))
    )
    try:
        _, nll = recall_score(model, cases, method=Apart())
    finally:
        hook.remove()
    torch.testing.assert_close(nll, recall_score(model, cases)[1], atol=1e-4, rtol=1e-4)
    assert max(rows) > 1
