"""The runtime on a GPU against the runtime on the CPU."""

import pytest
import torch

from chai_attention.integrations.transformers import ClusteredCache, enabled
from chai_attention.profile import ClusterProfile
from tiny_models import tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


WINDOW = {
    "recent": 5,
    "sinks": 3,
    "offsets": torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(2)).tolist(),
}


@torch.no_grad()
@pytest.mark.parametrize("window", [{}, WINDOW], ids=["", "recent"])
@pytest.mark.parametrize(
    ("family", "clusters", "target"),
    [
        ("llama", (2, 6, 3), "scores"),
        ("llama-grouped", (4, 2, 6), "scores"),
        ("llama-grouped", (3, 6, 3), "k-bytes"),
        ("gemma2", (6, 3, 3), "k-bytes"),
    ],
)
def test_gpu_equals_cpu(family, clusters, target, window):
    model = tiny_model(family)
    profile = ClusterProfile(clusters=clusters, window=8, target=target, **window)
    ids = torch.randint(3, 97, (3, 40))
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)

    def run(device):
        model.to(device)
        cache = ClusteredCache(model, profile)
        parts = []
        for span in (slice(0, 20), slice(20, 21), slice(21, 38), slice(38, 39), slice(39, 40)):
            out = model(
                ids[:, span].to(device),
                attention_mask=mask[:, : span.stop].to(device),
                position_ids=positions[:, span].to(device),
                past_key_values=cache,
            )
            parts.append(out.logits.cpu())
        return torch.cat(parts, 1)[mask.bool()]

    with enabled(model, profile):
        want, got = run("cpu"), run("cuda")
    torch.testing.assert_close(got, want, atol=1e-4 * want.abs().max().item(), rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_generate_on_the_gpu(dtype):
    model = tiny_model("llama").to("cuda", dtype)
    profile = ClusterProfile(clusters=(2, 6, 3), window=8)
    ids = torch.randint(3, 97, (2, 20), device="cuda")
    with enabled(model, profile):
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
            return_dict_in_generate=True, eos_token_id=None,
        )  # fmt: skip
    assert out.sequences.shape == (2, 32)
    memory = out.past_key_values.memory()
    assert memory.key_bytes * 18 == memory.full_key_bytes * 11
