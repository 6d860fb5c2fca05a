"""What the Transformers runtime generates."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from chai_attention.integrations.transformers import enabled
from chai_attention.profile import ClusterProfile


def runtime_tokens(
    folder: Path,
    profile: ClusterProfile,
    prompts: list[list[int]],
    tokens: int,
    beams: int = 1,
) -> list[list[list[int]]]:
    """Tokens of the Transformers runtime, one prompt after the other: greedy, or all beams."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    with enabled(model, profile):
        for prompt in prompts:
            ids = torch.tensor([prompt])
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens,
                min_new_tokens=tokens, eos_token_id=None, pad_token_id=0, num_beams=beams,
                num_return_sequences=beams,
            )  # fmt: skip
            found.append(out[:, len(prompt) :].tolist())
    return found
