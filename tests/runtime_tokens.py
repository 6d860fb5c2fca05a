"""What the Transformers runtime generates."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from chai_attention.integrations.transformers import enabled
from chai_attention.ops.fp8 import as_stored
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


@torch.no_grad()
def narrow_losses(
    folder: Path, profile: ClusterProfile, prompts: list[list[int]], ids: list[list[list[int]]]
) -> list[float]:
    """By how many nats each of the tokens ``ids`` is less likely than the likeliest at its place.

    In the Transformers runtime with K and V rounded to 8 bits before anything reads them. Where a
    number is near the middle of two 8-bit ones, the last bit of float32 decides which; so tokens
    may differ where two are almost equally likely.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    losses: list[float] = []
    with rounded(model), enabled(model, profile):
        for prompt, [new] in zip(prompts, ids, strict=True):
            logits = model(torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1]
            chosen = logits.gather(1, torch.tensor(new)[:, None])[:, 0]
            losses += (logits.amax(1) - chosen).tolist()
    return losses


@contextmanager
def rounded(model: LlamaForCausalLM) -> Iterator[None]:
    """K behind the rotary embedding and V behind its projection, as 8-bit pages hold them."""
    rotate = modeling_llama.apply_rotary_pos_emb

    def rotate_and_round(*args, **kwargs):
        query, key = rotate(*args, **kwargs)
        return query, as_stored(key)

    hooks = [
        layer.self_attn.v_proj.register_forward_hook(lambda module, args, out: as_stored(out))
        for layer in model.model.layers
    ]
    modeling_llama.apply_rotary_pos_emb = rotate_and_round
    try:
        yield
    finally:
        modeling_llama.apply_rotary_pos_emb = rotate
        for hook in hooks:
            hook.remove()
