"""Whichever code attends on the CPU, results stay the same."""

import pytest
import torch

from chai_attention.integrations.transformers import enabled
from chai_attention.ops import cpu_attention
from chai_attention.profile import ClusterProfile
from tiny_models import tiny_model

REP = ((0, 1, 2, 3, 4, 5), (0, 0, 0, 3, 3, 3), (0, 1, 1, 0, 4, 4))
PROFILES = {
    "online": ClusterProfile((6, 2, 3), window=5),
    "static": ClusterProfile((6, 2, 3), "static", representatives=REP),
    "recent": ClusterProfile((6, 2, 3), window=5, recent=4, sinks=2),
}


@torch.no_grad()
def steps(model, profile, padded):
    """Logits of a prompt and of nine tokens behind it, and the cache."""
    ids = torch.randint(3, 97, (2, 30), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :7] = 0
    with enabled(model, profile):
        out = model(ids[:, :21], attention_mask=mask[:, :21], use_cache=True)
        logits, cache = [out.logits], out.past_key_values
        for at in range(21, 30):
            out = model(
                ids[:, at : at + 1], attention_mask=mask[:, : at + 1], past_key_values=cache
            )
            logits.append(out.logits)
    return torch.cat(logits, 1).float().masked_fill(~mask[..., None].bool(), 0.0), cache


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("family", ["llama", "llama-grouped", "gemma2"])
def test_both_agree(family, name, padded):
    model = tiny_model(family)
    exact, _ = steps(model, PROFILES[name], padded)
    model = model.to(torch.bfloat16)
    found = {}
    for code in ("blocked", "torch"):
        with cpu_attention(code):
            found[code], cache = steps(model, PROFILES[name], padded)
        values = cache.layers[1].values  # [B, G, S, D]
        assert values.stride(1) > values.stride(2), "by heads"
    low = (found["blocked"] - exact).abs().max()
    assert (found["torch"] - exact).abs().max() < 2 * low + 0.02 * exact.abs().max()
