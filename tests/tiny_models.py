"""Tiny random models of every supported family, and the definition run inside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import transformers as tf
from torch import Tensor
from transformers.masking_utils import sdpa_mask

SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "vocab_size": 97}
ATTENTION = {"num_attention_heads": 6, "num_key_value_heads": 6}
GROUPED = {"num_attention_heads": 6, "num_key_value_heads": 2}
ONE = {"num_attention_heads": 6, "num_key_value_heads": 1}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
COMMON = {**SIZES, "intermediate_size": 40, "max_position_embeddings": 256, **TOKENS}
SLIDING = ["sliding_attention", "full_attention", "full_attention"]

CONFIGS: dict[str, Callable[[], tf.PreTrainedConfig]] = {
    "llama": lambda: tf.LlamaConfig(**COMMON, **ATTENTION),
    "llama-grouped": lambda: tf.LlamaConfig(**COMMON, **GROUPED),
    "mistral": lambda: tf.MistralConfig(**COMMON, **GROUPED, sliding_window=None),
    "qwen2": lambda: tf.Qwen2Config(**COMMON, **GROUPED),
    "qwen3": lambda: tf.Qwen3Config(**COMMON, **GROUPED, head_dim=16),
    "phi": lambda: tf.PhiConfig(**COMMON, **ATTENTION),
    "phi3": lambda: tf.Phi3Config(**COMMON, **GROUPED),
    "opt": lambda: tf.OPTConfig(
        **{**SIZES, **TOKENS}, num_attention_heads=6, ffn_dim=40, word_embed_proj_dim=48,
        max_position_embeddings=256,
    ),
    "gpt2": lambda: tf.GPT2Config(
        n_embd=48, n_layer=3, n_head=6, vocab_size=97, n_positions=256, **TOKENS
    ),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**COMMON, num_attention_heads=6),
    "olmo2": lambda: tf.Olmo2Config(**COMMON, **ATTENTION),
    "stablelm": lambda: tf.StableLmConfig(**COMMON, **ATTENTION),
    "gemma2": lambda: tf.Gemma2Config(
        **COMMON, **GROUPED, head_dim=16, sliding_window=8, layer_types=SLIDING,
        query_pre_attn_scalar=20, attn_logit_softcapping=3.0,
    ),
    "gemma3": lambda: tf.Gemma3TextConfig(
        **COMMON, **GROUPED, head_dim=16, sliding_window=8, layer_types=SLIDING
    ),
    "cohere": lambda: tf.CohereConfig(**COMMON, **ATTENTION),  # Command R
    "cohere-norms": lambda: tf.CohereConfig(**COMMON, **GROUPED, use_qk_norm=True),  # Command R+
    "gemma": lambda: tf.GemmaConfig(**COMMON, **ATTENTION, head_dim=16),
    "gemma-one": lambda: tf.GemmaConfig(**COMMON, **ONE, head_dim=16),
    "olmo": lambda: tf.OlmoConfig(**COMMON, **ATTENTION, clip_qkv=1.5),
    "olmo3": lambda: tf.Olmo3Config(**COMMON, **ATTENTION, sliding_window=8, layer_types=SLIDING),
    "granite": lambda: tf.GraniteConfig(**COMMON, **GROUPED, attention_multiplier=0.2),
    "starcoder2": lambda: tf.Starcoder2Config(**COMMON, **GROUPED, sliding_window=None),
}  # fmt: skip


def tiny_model(family: str) -> tf.PreTrainedModel:
    """A random model with weights large enough for the heads to differ."""
    torch.manual_seed(1)
    config = CONFIGS[family]()
    config.initializer_range = 0.2
    return tf.AutoModelForCausalLM.from_config(config).eval()


@contextmanager
def by_definition(
    model: tf.PreTrainedModel,
    representatives: Callable[[int, Tensor, Tensor, Tensor, Tensor, float], Tensor],
    recent: int = 0,
    sinks: int = 0,
    offsets: Sequence[Tensor] | None = None,
    streaming: Callable[[int, Tensor], Tensor] | None = None,
) -> Iterator[None]:
    """Run ``model`` with clustered attention straight from the definition, in float64.

    ``representatives(layer, query, key, value, valid, scale)`` gives, for every query position,
    the head each head uses: ``[B, Q, H]``. With ``recent``, keys at most so far away and the first
    ``sinks`` real ones are seen with each head's own scores, and ``offsets[layer][h, r]`` is
    added to all others, which those heads do not see that ``streaming(layer, valid)``,
    ``[B, Q, H]`` bool, says. Only whole sequences, without a cache.
    """

    def shared(scores, rep, valid, offset, forgets):
        """Replace each head's scores, ``[B, H, Q, S]``, by its representative's."""
        rep = rep.transpose(1, 2)  # [B, H, Q]
        taken = scores.gather(1, rep[..., None].expand_as(scores))
        if not recent:
            return taken
        heads, size = scores.shape[1], scores.shape[-1]
        own = torch.arange(heads)[None, :, None]
        shift = torch.zeros(rep.shape) if offset is None else offset[own, rep]
        taken = taken + torch.where(rep == own, 0.0, shift)[..., None]
        if forgets is not None:
            taken = taken.masked_fill(forgets.transpose(1, 2)[..., None], -torch.inf)
        distance = torch.arange(size)[:, None] - torch.arange(size)
        first = valid & (valid.cumsum(1) <= sinks)
        return torch.where((distance < recent) | first[:, None, None], scores, taken)

    def attend(module, query, key, value, mask, scaling=None, softcap=None, **kwargs):
        group = query.shape[1] // key.shape[1]
        q = query.double()
        k, v = (x.double().repeat_interleave(group, dim=1) for x in (key, value))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        scores = q @ k.mT * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        valid = mask.diagonal(dim1=-2, dim2=-1)[:, 0]  # [B, S]
        sliding = kwargs.get("sliding_window") is not None
        if not sliding:
            layer = module.layer_idx
            rep = representatives(layer, query, key, value, valid, scale)
            offset = None if offsets is None else offsets[layer]
            forgets = None if streaming is None else streaming(layer, valid)
            scores = shared(scores, rep, valid, offset, forgets)
        probs = torch.softmax(scores.masked_fill(~mask, -torch.inf), -1).nan_to_num(0)
        return (probs @ v).transpose(1, 2).to(query.dtype).contiguous(), None

    def whole_mask(*args, **kwargs):
        return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})

    before = model.config._attn_implementation
    tf.AttentionInterface.register("definition", attend)
    tf.AttentionMaskInterface.register("definition", whole_mask)
    model.set_attn_implementation("definition")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        del tf.AttentionInterface._global_mapping["definition"]
        del tf.AttentionMaskInterface._global_mapping["definition"]
