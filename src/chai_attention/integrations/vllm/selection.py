"""Which backend class a model gets: ours, or vLLM's own on a CPU where nobody asked for ours.

vLLM takes ``Backend`` from this module when it makes a model's first attention layer.
"""

from __future__ import annotations

from typing import Any

from chai_attention.errors import UnsupportedModelError
from chai_attention.integrations.vllm.plugin import installed_version, version_problem

STOCK_CPU = "vllm.v1.attention.backends.cpu_attn"


def __getattr__(name: str) -> Any:
    """Return the class for the model that vLLM is making."""
    if name != "Backend":
        raise AttributeError(name)
    from vllm.config import get_current_vllm_config
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    config = get_current_vllm_config()
    asked = config.attention_config.backend == AttentionBackendEnum.CUSTOM
    if not asked and "chai" not in (config.additional_config or {}):
        from importlib import import_module

        return import_module(STOCK_CPU).CPUAttentionBackend
    problem = version_problem(installed_version())
    if problem is not None:
        raise UnsupportedModelError(problem)
    from chai_attention.integrations.vllm.backend import ChaiBackend

    return ChaiBackend
