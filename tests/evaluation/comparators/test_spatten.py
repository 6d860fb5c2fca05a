"""SpAtten against its definition, position by position in plain loops."""

from math import ceil

import pytest
import torch

from chai_attention.errors import EvaluationError, UnsupportedModelError
from chai_attention.evaluation.comparators import spatten
from chai_attention.evaluation.comparators.spatten import SpAtten, keep_count, most_important
from chai_attention.evaluation.comparators.spatten_schedule import Schedule, schedule
from chai_attention.integrations.transformers.intervene import replaced_attention
from chai_attention.runtime.shape import describe
from comparator_cases import (
    FAMILIES,
    assert_causal,
    assert_padding_changes_nothing,
    batch,
    logits,
)
from tiny_models import tiny_model

NAMES = tuple(spatten.VARIANTS)
HARD = Schedule(tokens=(1.0, 0.6, 0.35), heads=(1.0, 0.7, 0.4))


def use(monkeypatch, plan):
    monkeypatch.setattr(spatten, "schedule", lambda shape, tokens, save: plan)


class Loops:
    """The definition: every position with its own sets of tokens and heads."""

    def __init__(self, plan, kv_heads, mean):
        self.plan, self.kv_heads, self.mean = plan, kv_heads, mean

    def __call__(self, call):
        rows, heads, size, _ = call.query.shape
        group = heads // self.kv_heads
        if call.layer == 0:
            places = [(b, t) for b in range(rows) for t in range(size)]
            self.tokens = {(b, t): list(range(t + 1)) for b, t in places}
            self.heads = {place: list(range(self.kv_heads)) for place in places}
            self.given = torch.zeros(rows, size, size, dtype=torch.double)
            self.size = torch.zeros(rows, size, self.kv_heads, dtype=torch.double)
        given, sizes = self.given.clone(), self.size.clone()
        out = torch.zeros(rows, size, heads, call.value.shape[-1], dtype=torch.double)
        q, k, v = call.query.double(), call.key.double(), call.value.double()
        for b, t in self.tokens:
            self.drop(b, t, call.layer)
            seen = self.tokens[b, t]
            for head in range(heads):
                pair = head // group
                if pair not in self.heads[b, t]:
                    continue
                probs = torch.softmax(k[b, pair, seen] @ q[b, head, t] * call.scale, 0)
                out[b, t, head] = probs @ v[b, pair, seen]
                given[b, t, seen] += probs
                sizes[b, t, pair] += out[b, t, head].abs().sum()
        self.given, self.size = given, sizes
        return out.to(call.value.dtype)

    def drop(self, b, t, layer):
        share = self.plan.tokens[layer]
        if share < 1:

            def received(j):
                queries = t - j + 1 if self.mean else 1
                return self.given[b, j : t + 1, j].sum().item() / queries

            others = sorted((j for j in self.tokens[b, t] if j != t), key=lambda j: -received(j))
            count = max(1, ceil(share * (t + 1) - 1e-9))
            self.tokens[b, t] = sorted([t, *others[: count - 1]])
        count = max(1, ceil(self.plan.heads[layer] * self.kv_heads - 1e-9))
        order = sorted(self.heads[b, t], key=lambda head: -self.size[b, : t + 1, head].sum().item())
        self.heads[b, t] = order[:count]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["spatten", "spatten-mean"])
def test_it_is_its_definition(family, name, monkeypatch):
    model = tiny_model(family)
    use(monkeypatch, HARD)
    loops = Loops(HARD, describe(model).kv_heads, name == "spatten-mean")
    tokens = batch(2, 15)
    with SpAtten(name).attached(model):
        found = logits(model, tokens)
    with replaced_attention(model, loops):
        wanted = logits(model, tokens)
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)
    assert (found - logits(model, tokens)).abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_sequences_taken_one_by_one_give_the_same(family, monkeypatch):
    model = tiny_model(family)
    use(monkeypatch, HARD)
    with SpAtten().attached(model):
        whole = logits(model, batch())
        monkeypatch.setattr(spatten, "MAPS", 1)
        torch.testing.assert_close(logits(model, batch()), whole, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_is_the_model_itself(family, monkeypatch):
    model = tiny_model(family)
    use(monkeypatch, Schedule((1.0,) * 3, (1.0,) * 3))
    with SpAtten().attached(model):
        found = logits(model, batch())
    assert torch.equal(found, logits(model, batch()))


def test_pruning_no_more_than_there_is_changes_nothing_but_rounding(monkeypatch):
    model = tiny_model("llama-grouped")
    almost = Schedule((1.0, 1 - 1e-9, 1 - 1e-9), (1.0, 0.9, 0.6))  # all tokens, 2 of 2 heads
    use(monkeypatch, almost)
    with SpAtten().attached(model):
        found = logits(model, batch())
    torch.testing.assert_close(found, logits(model, batch()), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_later_and_no_padding_matters(family, name, monkeypatch):
    model = tiny_model(family)
    use(monkeypatch, HARD if name != "spatten-heads" else Schedule((1.0,) * 3, HARD.heads))
    assert_causal(model, SpAtten(name))
    assert_padding_changes_nothing(model, SpAtten(name))


def test_what_is_kept():
    importance = torch.tensor([[[3.0, 1, 2, 2, 9]]])
    left = torch.tensor([[[True, True, True, True, False]]])
    kept = most_important(importance, left, torch.tensor([[2]]))
    assert kept[0, 0].tolist() == [True, False, True, False, False]  # the first of equals
    everything = most_important(importance, left, torch.tensor([[5]]))
    assert torch.equal(everything, left)  # what has gone stays gone
    context = torch.tensor([0, 1, 2, 3, 10, 20])
    assert keep_count(0.3, context).tolist() == [1, 1, 1, 1, 3, 6]


@pytest.mark.parametrize("family", ["llama", "llama-grouped"])
@pytest.mark.parametrize("tokens", [True, False])
def test_schedules_fall_with_depth_and_save_what_is_asked(family, tokens):
    shape = describe(tiny_model(family))
    default = schedule(shape, tokens)
    assert default.tokens == ((1.0, 0.75, 0.5) if tokens else (1.0,) * 3)
    assert default.heads == pytest.approx((1.0, 0.9, 0.8))
    for save in (0.05, 0.2, 0.3):
        plan = schedule(shape, tokens, save)
        assert plan.tokens[0] == plan.heads[0] == 1
        for shares in (plan.tokens, plan.heads):
            assert list(shares) == sorted(shares, reverse=True)
        saved = 1 - plan.kv_share(10**6, shape.kv_heads)
        assert save - 1e-4 <= saved < save + 2 / (3 * shape.kv_heads)
    with pytest.raises(EvaluationError, match="at most"):
        schedule(shape, tokens, 0.9)
    with pytest.raises(EvaluationError, match="share"):
        schedule(shape, tokens, 1.5)


def test_the_share_of_bytes_counts_tokens_and_heads():
    plan = Schedule((1.0, 0.6, 0.35), (1.0, 0.7, 0.4))
    # of 10 tokens and 6 heads: 60, then 6 tokens of 5 heads, then 4 of 3
    assert plan.kv_share(10, 6) == pytest.approx((60 + 30 + 12) / 180)


def test_what_it_cannot_do_is_told():
    model = tiny_model("llama")
    with SpAtten().attached(model), torch.no_grad():
        cache = model(batch(), use_cache=True).past_key_values
        with pytest.raises(UnsupportedModelError, match="whole sequences"):
            model(batch()[:, :3], past_key_values=cache)
    with (
        pytest.raises(UnsupportedModelError, match="sliding"),
        SpAtten().attached(tiny_model("gemma2")),
    ):
        pass


def test_it_runs_in_bfloat16(monkeypatch):
    model = tiny_model("opt").to(torch.bfloat16)
    use(monkeypatch, HARD)
    with SpAtten().attached(model):
        found = logits(model, batch())
    assert found.dtype == torch.bfloat16
    assert found.isfinite().all()
