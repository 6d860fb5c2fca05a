"""K and V in 8-bit floats: what is kept, and answers by the definition."""

import pytest
import torch

from chai_attention.evaluation.comparators.float8 import Float8
from chai_attention.evaluation.comparators.quantised import Quantised
from chai_attention.integrations.transformers.intervene import replaced_attention
from chai_attention.integrations.transformers.methods import cached_logits
from comparator_cases import logits, traces
from compressed_contexts import ANSWER, RECENT, STATIC, sequence
from tiny_models import tiny_model


def rounded(states):
    """To 4 significant bits, and to no less than 2**-9, the spacing of the smallest numbers."""
    exponent = torch.frexp(states).exponent
    spacing = torch.exp2(torch.clamp(exponent - 4, min=-9).float())
    return (states / spacing).round() * spacing


@torch.no_grad()
def by_rounding(model, tokens, rep=None):
    """Logits of the last tokens; every K and V is rounded before it is attended to."""

    def attend(call):
        heads, size = call.query.shape[1:3]
        group = heads // call.key.shape[1]
        head = torch.arange(heads) if rep is None else torch.tensor(rep[call.layer])
        key, value = (rounded(x).repeat_interleave(group, 1) for x in (call.key, call.value))
        causal = torch.ones(size, size, dtype=torch.bool).tril()
        scores = (call.query @ key.mT * call.scale)[:, head].masked_fill(~causal, -torch.inf)
        return (scores.softmax(-1) @ value).transpose(1, 2).contiguous()

    with replaced_attention(model, attend):
        return model(tokens[None]).logits[0, -ANSWER:]


@pytest.mark.parametrize("family", ["llama", "llama-grouped", "opt"])
def test_prompt_and_answer_read_rounded_k_and_v(family):
    model, tokens = tiny_model(family), sequence()
    before = traces(model)
    found = cached_logits(model, Float8(), tokens[None], ANSWER)[0]
    torch.testing.assert_close(found, by_rounding(model, tokens), atol=2e-4, rtol=1e-4)
    assert (found - logits(model, tokens[None])[0, -ANSWER:]).abs().max() > 1e-3
    assert traces(model) == before


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_with_clusters(family):
    model, tokens = tiny_model(family), sequence()
    method = Float8(STATIC)
    with method.attached(model):
        found = cached_logits(model, method, tokens[None], ANSWER)[0]
    wanted = by_rounding(model, tokens, STATIC.representatives)
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)


def test_shares_and_what_decides_late():
    model = tiny_model("llama")
    assert Float8().kv_share(model, 9) == 0.5
    static, recent = Float8(STATIC), Float8(RECENT)
    assert static.kv_share(model, 100) == pytest.approx((11 + 18) / 36 / 2)
    # K of 7 removed heads, 5 + 2 tokens of it, in 16 bits
    assert recent.kv_share(model, 70) == pytest.approx((11 + 18) / 36 / 2 + 7 * 7 / 70 / 36)
    # until 7 tokens have decided, all heads' K and V in 8 bits
    assert recent.kv_share(model, 6) == 0.5
    assert [recent.looks_ahead(context) for context in (6, 7)] == [True, False]
    assert not static.looks_ahead(1)
    assert not Quantised(8).looks_ahead(1)
