"""Attention without clusters, by every library that is installed.

Where a baseline cannot run, the report says why. Each is a function from inputs to a call that
returns ``[B, Q, H, D]``; what it prepares outside of the call is not timed.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from chai_attention.benchmarking.clustered import Attend, Inputs
from chai_attention.membership import Membership
from chai_attention.ops import AttentionCall, DenseKV
from chai_attention.ops.blocked import blocked_attention

WORKSPACE = 2**27  # bytes that FlashInfer splits the context in


@dataclass(frozen=True)
class Baseline:
    """One way to attend without clusters.

    Attributes:
        name: in reports.
        fused: whether it holds no probabilities in memory; on a GPU the fastest of these is what
            clustered attention is compared with, on the CPU the fastest of all.
        prepare: makes the call for some inputs.
        module: that has to be installed.
    """

    name: str
    fused: bool
    prepare: Callable[[Inputs], Attend]
    module: str | None = None

    @property
    def missing(self) -> str | None:
        """Why it is not there, None if it is."""
        if self.module is None:
            return None
        try:
            found = importlib.util.find_spec(self.module) is not None
        except ImportError:  # the package around it is not there
            found = False
        return None if found else f"{self.module} is not installed"


def baselines(device: str) -> list[Baseline]:
    """Return all for a device, installed or not."""
    found = [Baseline("unfused", False, _unfused)]
    if device == "cuda":
        found += [
            Baseline("SDPA cuDNN", True, partial(_sdpa, SDPBackend.CUDNN_ATTENTION)),
            Baseline("SDPA flash", True, partial(_sdpa, SDPBackend.FLASH_ATTENTION)),
            Baseline("SDPA efficient", True, partial(_sdpa, SDPBackend.EFFICIENT_ATTENTION)),
            Baseline("FlashAttention 3", True, _flash3, "flash_attn_interface"),
            Baseline("FlashAttention 4", True, _flash4, "flash_attn.cute"),
            Baseline("FlashInfer", True, _flashinfer, "flashinfer"),
        ]
    else:
        found += [
            Baseline("SDPA flash", True, partial(_sdpa, SDPBackend.FLASH_ATTENTION)),
            Baseline("SDPA math", False, partial(_sdpa, SDPBackend.MATH)),
            Baseline("own code, k = H", True, _own),
        ]
    return found


def _unfused(inputs: Inputs) -> Attend:
    """Matrix product, softmax in float32, matrix product: what models call eager."""
    query, key, value = inputs
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) if group > 1 else x for x in (key, value))
    queries, size = query.shape[2], key.shape[2]
    mask = None
    if queries > 1:
        mask = torch.full((queries, size), -torch.inf, dtype=query.dtype, device=query.device)
        mask = mask.triu(size - queries + 1)

    def call() -> Tensor:
        scores = torch.matmul(query, key.mT) * inputs.scale
        if mask is not None:
            scores = scores + mask
        probs = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
        return torch.matmul(probs, value).transpose(1, 2)

    return call


def _sdpa(backend: SDPBackend, inputs: Inputs) -> Attend:
    query, key, value = inputs
    options: dict[str, Any] = {"is_causal": query.shape[2] > 1, "scale": inputs.scale}
    if query.shape[1] != key.shape[1]:
        options["enable_gqa"] = True

    def call() -> Tensor:
        # why a backend cannot run comes as a warning for each reason, then as an error
        with sdpa_kernel(backend), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = F.scaled_dot_product_attention(query, key, value, **options)
        return out.transpose(1, 2)

    return call


def _own(inputs: Inputs) -> Attend:
    """The library's CPU code with every head on its own."""
    member = Membership.identity(inputs.query.shape[1], inputs.key.shape[1], inputs.key.shape[0])

    def call() -> Tensor:
        call = AttentionCall(member, inputs.scale)
        return blocked_attention(inputs.query, DenseKV(inputs.key, inputs.value), call)[0]

    return call


def _token_major(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """``[B, S, heads, D]``, contiguous."""
    query, key, value = (x.transpose(1, 2).contiguous() for x in inputs)
    return query, key, value


def _flash3(inputs: Inputs) -> Attend:
    library: Any = importlib.import_module("flash_attn_interface")
    query, key, value = _token_major(inputs)
    if query.shape[1] == 1:  # splits the context, as decode needs it
        lengths = torch.full((key.shape[0],), key.shape[1], dtype=torch.int32, device=query.device)
        run = partial(library.flash_attn_with_kvcache, cache_seqlens=lengths)
    else:
        run = library.flash_attn_func
    options = {"softmax_scale": inputs.scale, "causal": query.shape[1] > 1}
    return lambda: _first(run(query, key, value, **options))


def _flash4(inputs: Inputs) -> Attend:
    library: Any = importlib.import_module("flash_attn.cute")
    query, key, value = _token_major(inputs)
    options = {"softmax_scale": inputs.scale, "causal": query.shape[1] > 1}
    return lambda: _first(library.flash_attn_func(query, key, value, **options))


def _flashinfer(inputs: Inputs) -> Attend:
    """Prefill over ragged K and V, decode over pages (it has no other for a batch)."""
    library: Any = importlib.import_module("flashinfer")
    query, key, value = _token_major(inputs)
    batch, queries, heads, dim = query.shape
    size, groups = key.shape[1], key.shape[2]
    device = query.device
    room = torch.empty(WORKSPACE, dtype=torch.uint8, device=device)
    options: dict[str, Any] = {
        "sm_scale": inputs.scale, "q_data_type": query.dtype, "kv_data_type": key.dtype,
    }  # fmt: skip

    def starts(step: int) -> Tensor:
        return torch.arange(batch + 1, dtype=torch.int32, device=device) * step

    if queries == 1:
        page = next(n for n in (16, 8, 4, 2, 1) if size % n == 0)
        pages = [x.view(-1, page, groups, dim) for x in (key, value)]
        wrapper = library.BatchDecodeWithPagedKVCacheWrapper(
            room, "NHD", use_tensor_cores=heads // groups > 2
        )
        indices = torch.arange(len(pages[0]), dtype=torch.int32, device=device)
        last = torch.full((batch,), page, dtype=torch.int32, device=device)
        wrapper.plan(starts(size // page), indices, last, heads, groups, dim, page, **options)
        return lambda: wrapper.run(query[:, 0], tuple(pages))[:, None]
    wrapper = library.BatchPrefillWithRaggedKVCacheWrapper(room, "NHD")
    wrapper.plan(starts(queries), starts(size), heads, groups, dim, causal=True, **options)
    flat = [x.flatten(0, 1) for x in (query, key, value)]
    return lambda: wrapper.run(*flat).view(batch, queries, heads, dim)


def _first(result: Any) -> Tensor:
    """The output, which some releases return together with the log-sum-exp."""
    out: Tensor = result[0] if isinstance(result, tuple) else result
    return out
