"""Answers read the finished cache and nothing else, against one forward with a mask."""

import pytest
import torch

from chai_attention.integrations.transformers.methods import cached_logits
from compressed_contexts import ANSWER, by_definition, sequence
from eval_methods import Evicting, left
from tiny_models import tiny_model


def compress(layer, query, key, value):
    return key, 2 * value, left(key.shape[2]).expand(1, key.shape[1], 1, -1)


@pytest.mark.parametrize("family", ["llama", "llama-grouped", "opt"])
@pytest.mark.parametrize("answer", [1, ANSWER, 12])
def test_every_answer_token_sees_the_compressed_context_only(family, answer):
    model, tokens, method = tiny_model(family), sequence(), Evicting("evicting")
    with method.attached(model):
        found = cached_logits(model, method, tokens[None], answer)[0]
    assert found.shape == (answer, 97)
    # the context's last token reads the cache too: it predicts the answer's first
    wanted = by_definition(model, tokens, compress, answer)
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)
    with torch.no_grad():
        plain = model(tokens[None]).logits[0, -answer:]
    assert (found - plain).abs().amax(1).min() > 1e-2
