"""DejaVu: the oracle against heads zeroed by hand, predictors against the oracle."""

from contextlib import ExitStack

import pytest
import torch

from chai_attention.errors import EvaluationError
from chai_attention.evaluation.comparators.dejavu import DejaVu, drops_per_layer, without_least
from chai_attention.evaluation.comparators.head_predictor import HeadPredictors, Importance
from chai_attention.integrations.transformers.intervene import edited_heads
from comparator_cases import (
    FAMILIES,
    assert_causal,
    assert_padding_changes_nothing,
    batch,
    logits,
    text,
)
from tiny_models import tiny_model

HEADS, SIZE = 6, 8


def projections(model):
    return [
        module
        for name, module in model.named_modules()
        if name.endswith(("self_attn.o_proj", "self_attn.out_proj"))
    ]


def zeroed_by_hand(model, tokens, drops):
    """Logits with the heads of smallest contribution zeroed, head by head and token by token."""

    def hook_of(drop):
        def hook(projection, args):
            flat = args[0].clone()
            for row in flat.flatten(0, 1):
                sizes = []
                for head in range(HEADS):
                    part = slice(head * SIZE, (head + 1) * SIZE)
                    sizes.append((projection.weight[:, part] @ row[part]).norm().item())
                for head in sorted(range(HEADS), key=lambda head: sizes[head])[:drop]:
                    row[head * SIZE : (head + 1) * SIZE] = 0
            return (flat,)

        return hook

    with ExitStack() as hooks:
        for projection, drop in zip(projections(model), drops, strict=True):
            hooks.callback(projection.register_forward_pre_hook(hook_of(drop)).remove)
        return logits(model, tokens)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("share", "drops"), [(0.1, [1, 0, 1]), (0.3, [2, 2, 1]), (0.5, [3] * 3)])
def test_the_oracle_zeroes_the_heads_that_contribute_least(family, share, drops):
    model = tiny_model(family)
    assert drops_per_layer(share, 3, HEADS) == drops
    oracle = DejaVu(share, None)
    with oracle.attached(model):
        found = logits(model, batch())
    wanted = zeroed_by_hand(model, batch(), drops)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert (found - logits(model, batch())).abs().max() > 1e-2


@pytest.mark.parametrize(("layers", "heads"), [(30, 9), (1, 4), (32, 32), (7, 5)])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_layers_share_the_heads_to_drop_evenly(layers, heads, share):
    drops = drops_per_layer(share, layers, heads)
    assert len(drops) == layers
    assert abs(sum(drops) - share * layers * heads) <= 0.5 + 1e-9
    assert max(drops) - min(drops) <= 1


def test_of_equally_important_heads_the_later_are_dropped():
    out = torch.ones(1, 1, 5, 2)
    kept = without_least(out, torch.tensor([[[2.0, 1, 1, 3, 1]]]), 2)
    assert kept[0, 0, :, 0].tolist() == [1, 1, 0, 1, 0]
    assert without_least(out, torch.zeros(1, 1, 5), 0) is out


@pytest.mark.parametrize("family", ["llama", "llama-grouped"])
def test_predictors_learn_what_the_input_decides(family):
    """Where a window is one token over and over, attention puts out that token's V."""
    model = tiny_model(family)
    predictors = HeadPredictors()
    predictors.fit(model, [torch.full((48,), token) for token in range(3, 97)])
    truth, expected, hits = Importance(model), {}, []

    def note(layer, out):
        wanted = truth(layer, out).argsort(-1)[..., :3]
        guess = expected[layer].argsort(-1)[..., :3]
        hits.append((wanted[..., None] == guess[..., None, :]).any(-1).float().mean())

    def see(layer, hidden):
        expected[layer] = predictors(layer, hidden)

    with edited_heads(model, note, see):
        logits(model, torch.arange(3, 97)[:, None].expand(-1, 20))
    assert len(hits) == 3
    assert min(hits) > 0.9  # chance is a half


@pytest.mark.parametrize("family", FAMILIES)
def test_predicted_heads_are_missed_less_than_others(family):
    """On text that the predictors have not seen, what they drop is worth less than the rest."""
    model = tiny_model(family)
    predictors = HeadPredictors()
    predictors.fit(model, text(60, 48))
    truth, expected, ratios = Importance(model), {}, []

    def note(layer, out):
        importance = truth(layer, out)
        order = expected[layer].argsort(-1)
        dropped, kept = (importance.gather(-1, part).mean() for part in order.split(3, -1))
        ratios.append(dropped / kept)

    def see(layer, hidden):
        expected[layer] = predictors(layer, hidden)

    with edited_heads(model, note, see):
        logits(model, batch(8, 40))
    assert max(ratios) < 1
    assert sum(ratios) / len(ratios) < 0.9


def test_one_set_of_predictors_serves_all_shares_and_is_reproducible(monkeypatch):
    monkeypatch.setattr("chai_attention.evaluation.comparators.head_predictor.EPOCHS", 2)
    model = tiny_model("llama")
    shared, again = HeadPredictors(7), HeadPredictors(7)
    ten, half = DejaVu(0.1, shared), DejaVu(0.5, shared)
    assert (ten.name, half.name) == ("dejavu-10", "dejavu-50")
    with pytest.raises(EvaluationError, match="prepare"), ten.attached(model):
        pass
    with torch.no_grad():  # as in an evaluation
        ten.prepare(model, text())
    before = shared._fitted
    half.prepare(model, text())
    assert shared._fitted is before
    again.fit(model, text())
    hidden = torch.randn(2, 5, 48)
    assert torch.equal(shared(1, hidden), again(1, hidden))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_chooses_by_itself(family, monkeypatch):
    monkeypatch.setattr("chai_attention.evaluation.comparators.head_predictor.EPOCHS", 2)
    model = tiny_model(family)
    predicted = DejaVu(0.3, HeadPredictors())
    predicted.prepare(model, text())
    for comparator in (predicted, DejaVu(0.3, None)):
        assert_causal(model, comparator)
        assert_padding_changes_nothing(model, comparator)


def test_it_runs_in_bfloat16_and_with_a_cache():
    model = tiny_model("llama-grouped").to(torch.bfloat16)
    comparator = DejaVu(0.3, None)
    with comparator.attached(model), torch.no_grad():
        whole = logits(model, batch())
        first = model(batch()[:, :15], use_cache=True)
        second = model(batch()[:, 15:], past_key_values=first.past_key_values)
    assert whole.dtype == torch.bfloat16
    parts = torch.cat([first.logits, second.logits], 1)
    # rounding may swap two heads of nearly equal importance here and there
    assert (whole - parts).abs().float().quantile(0.9) < 0.1


def test_a_share_is_a_share():
    with pytest.raises(EvaluationError, match="share"):
        DejaVu(0.0, None)
