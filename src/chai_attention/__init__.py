"""Clustered Head Attention: cheaper inference by sharing attention between heads that agree.

On a tiny random model; any causal language model that transformers loads goes the same way:

>>> import torch
>>> from transformers import LlamaConfig, LlamaForCausalLM
>>> from chai_attention import calibrate, enable
>>> sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
>>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).eval()
>>> windows = torch.randint(3, 64, (8, 48))  # or text, with the model's tokenizer
>>> profile = calibrate(model, None, windows, clusters=2, recipe="share")
>>> profile.clusters  # representatives per layer, of 4 heads
(2, 2)
>>> enable(model, profile)
>>> model.generate(windows[:2], max_new_tokens=4, min_new_tokens=4).shape
torch.Size([2, 52])

The method: Agarwal et al., "CHAI: Clustered Head Attention for Efficient LLM Inference", ICML 2024,
https://arxiv.org/abs/2403.08058.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chai_attention.calibration import calibrate
    from chai_attention.errors import (
        CacheError,
        CalibrationError,
        ChaiError,
        ProfileError,
        UnsupportedModelError,
    )
    from chai_attention.integrations.transformers import ClusteredCache, disable, enable, enabled
    from chai_attention.membership import Membership
    from chai_attention.profile import ClusterProfile

__all__ = [
    "CacheError",
    "CalibrationError",
    "ChaiError",
    "ClusterProfile",
    "ClusteredCache",
    "Membership",
    "ProfileError",
    "UnsupportedModelError",
    "calibrate",
    "disable",
    "enable",
    "enabled",
]

_HOMES = {
    "calibration": ("calibrate",),
    "errors": (
        "CacheError",
        "CalibrationError",
        "ChaiError",
        "ProfileError",
        "UnsupportedModelError",
    ),
    "integrations.transformers": ("ClusteredCache", "disable", "enable", "enabled"),
    "membership": ("Membership",),
    "profile": ("ClusterProfile",),
}


def __getattr__(name: str) -> Any:
    """Import torch and transformers only when something that needs them is used."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"chai_attention.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
