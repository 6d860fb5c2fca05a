"""What tells the weights of one model from those of another."""

from __future__ import annotations

from transformers import PreTrainedModel

from chai_attention.integrations.transformers.devices import held_weight
from chai_attention.results import digest


def weights_digest(model: PreTrainedModel, samples: int = 256) -> str:
    """Return a short digest of a model's config and of evenly spaced entries of its weights."""
    config = {k: v for k, v in model.config.to_dict().items() if not k.startswith("_")}
    parts: list[object] = [repr(sorted(config.items(), key=lambda kv: kv[0]))]
    for name, weight in model.named_parameters():
        held = held_weight(model, name) if weight.is_meta else weight
        flat = held.detach().flatten()
        taken = flat[:: max(1, len(flat) // samples)].float().cpu().numpy().tobytes()
        parts += [f"{name} {tuple(weight.shape)}", taken]
    return digest(*parts)
