"""What tells the weights of one model from those of another."""

from __future__ import annotations

import hashlib

from transformers import PreTrainedModel

from chai_attention.integrations.transformers.devices import held_weight


def weights_digest(model: PreTrainedModel, samples: int = 256) -> str:
    """Return a short digest of a model's config and of evenly spaced entries of its weights."""
    config = {k: v for k, v in model.config.to_dict().items() if not k.startswith("_")}
    digest = hashlib.sha256(repr(sorted(config.items(), key=lambda kv: kv[0])).encode())
    for name, weight in model.named_parameters():
        held = held_weight(model, name) if weight.is_meta else weight
        flat = held.detach().flatten()
        taken = flat[:: max(1, len(flat) // samples)].float().cpu().numpy()
        digest.update(f"{name} {tuple(weight.shape)}".encode() + taken.tobytes())
    return digest.hexdigest()[:16]
