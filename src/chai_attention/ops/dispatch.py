"""Chooses the implementation of clustered attention for the tensors at hand."""

from __future__ import annotations

import logging
import warnings
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from chai_attention.errors import AttentionInputError
from chai_attention.membership import Membership
from chai_attention.ops import blocked, choice, dense, fused, reference, reference_blocks

logger = logging.getLogger("chai_attention")

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    membership: Membership,
    *,
    scale: float,
    lengths: Tensor | None = None,
    valid: Tensor | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Causal clustered attention by the fastest implementation for the tensors' device.

    Arguments, results and meaning are those of `ops.reference.attention`. The CPU runs blocked
    matrix products or torch's fused attention, whichever is faster there (`choice`), CUDA the
    Triton kernels; where no head is clustered, torch's own attention runs if it is faster. What has
    no kernel (head sizes above 256 or float64 on CUDA, CUDA without Triton, other devices) runs the
    readable reference, with a warning that says what that costs. The logger "chai_attention" says
    at level DEBUG what runs.

    >>> import torch
    >>> from chai_attention import Membership
    >>> from chai_attention.ops import attention
    >>> membership = Membership.from_representatives(torch.tensor([0, 0, 2, 2]))
    >>> query = torch.randn(1, 2, 3, 8)  # [B, k, Q, D]: representatives, here heads 0 and 2
    >>> key = torch.randn(1, 2, 10, 8)  # [B, kept, S, D]: the same
    >>> value = torch.randn(1, 4, 10, 8)  # [B, H, S, D]: all heads, in cluster order
    >>> out, lse = attention(query, key, value, membership, scale=8**-0.5, return_lse=True)
    >>> out.shape, lse.shape  # [B, Q, H, D] in the order of heads, [B, k, Q]
    (torch.Size([1, 3, 4, 8]), torch.Size([1, 2, 3]))

    Raises:
        AttentionInputError: tensors that do not fit together, dtypes that differ or are none of
            float64, float32, bfloat16 and float16, or, on CUDA, heads whose numbers are not
            consecutive in memory.
    """
    check(query, key, value, membership, lengths, valid)
    plain = membership.is_identity and lengths is None and softcap is None and not return_lse
    found = choose(query.device.type, query, key, value, plain=plain)
    logger.debug(
        "attention by %s: query %s, key %s",
        found.module.__name__,
        tuple(query.shape),
        tuple(key.shape),
    )
    if found.missing is not None:
        _warn_slow(found.missing, membership.heads, query, key)
        if lengths is not None:  # unused capacity may hold anything, NaN too
            spare = torch.arange(value.shape[2], device=value.device) >= lengths[:, None]
            value = value.masked_fill(spare[:, None, :, None], 0.0)
    module = reference_blocks if found.module is reference else found.module
    return module.attention(
        query,
        key,
        value,
        membership,
        scale=scale,
        lengths=lengths,
        valid=valid,
        softcap=softcap,
        return_lse=return_lse,
    )


class Choice(NamedTuple):
    """What runs.

    Attributes:
        module: has a function ``attention``.
        missing: why it has to be the reference; None if it is one of the fast ones.
    """

    module: ModuleType
    missing: str | None = None


def choose(device: str, query: Tensor, key: Tensor, value: Tensor, *, plain: bool) -> Choice:
    """Choose an implementation.

    Args:
        device: type of device that it will run on.
        query: as in `attention`; so are ``key`` and ``value``.
        key: K.
        value: V.
        plain: whether it is attention without clusters, spare capacity, softcap or log-sum-exp.

    Raises:
        AttentionInputError: a layout that kernels cannot read.
    """
    if device == "cpu":
        kind = choice.kind_of(query, key.shape[2], clustered=not plain)
        if choice.chosen(kind) == choice.BLOCKED:
            return Choice(blocked)
        return Choice(dense if plain else fused)
    if device != "cuda":
        return Choice(reference, f"there is no kernel for device {device!r}")
    # without clusters torch's prefill is faster than ours; decode is not
    if plain and query.shape[2] > 1:
        return Choice(dense)
    kernels = _triton()
    if isinstance(kernels, str):
        return Choice(
            reference,
            f"Triton, which the kernels for CUDA need, cannot be imported ({kernels}; pip install "
            "triton, on Windows triton-windows)",
        )
    if query.dtype == torch.float64:
        return Choice(reference, "there is no kernel for float64 on CUDA")
    size, most = max(query.shape[3], value.shape[3]), _largest_head()
    if size > most:
        return Choice(reference, f"head size {size} is more than the {most} of the kernels")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.stride(-1) != 1:
            raise AttentionInputError(
                f"the numbers of a head of {name} are not consecutive in memory (strides "
                f"{tuple(tensor.stride())}), which the kernels need: call .contiguous()"
            )
    return Choice(kernels)


def check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    membership: Membership,
    lengths: Tensor | None,
    valid: Tensor | None,
) -> None:
    """Refuse what no implementation takes; kernels would read memory that is not theirs.

    Raises:
        AttentionInputError: says what does not fit.
    """
    if not (query.dtype == key.dtype == value.dtype) or query.dtype not in DTYPES:
        dtypes = ", ".join(str(x.dtype).removeprefix("torch.") for x in (query, key, value))
        raise AttentionInputError(
            f"query, key and value need one dtype, float32, bfloat16, float16 or float64, "
            f"not {dtypes}"
        )
    if not query.ndim == key.ndim == value.ndim == 4:
        raise AttentionInputError("query, key and value need four dimensions: [B, heads, S, D]")
    batch, size = query.shape[0], key.shape[2]
    wanted = {
        "query": (query, (batch, membership.clusters, query.shape[2], query.shape[3])),
        "key": (key, (batch, membership.kept_keys, size, query.shape[3])),
        "value": (value, (batch, membership.kv_heads, size, value.shape[3])),
        "representatives": (membership.representatives, (batch, membership.heads)),
        "lengths": (lengths, (batch,)),
        "valid": (valid, (batch, size)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise AttentionInputError(
                f"{name} has shape {list(tensor.shape)}, needed is {list(shape)}"
            )
        if tensor.device != query.device:
            raise AttentionInputError(
                f"{name} is on {tensor.device} and query on {query.device}: move it there first"
            )


@cache
def _triton() -> ModuleType | str:
    """The kernels, or why they cannot be loaded."""
    try:
        from chai_attention.ops import triton
    except (ImportError, OSError) as error:
        return str(error)
    return triton


@cache
def _largest_head() -> int:
    """The largest head size of the kernels."""
    from chai_attention.ops.triton.checks import MAX_HEAD_DIM

    return MAX_HEAD_DIM


_warned: set[str] = set()


def _warn_slow(missing: str, heads: int, query: Tensor, key: Tensor) -> None:
    """Say once what the reference costs in place of ``missing``."""
    if missing in _warned:
        return
    _warned.add(missing)
    most = reference_blocks.queries_at_once(query.shape[0], heads, key.shape[2])
    held = 4 * query.shape[0] * heads * min(query.shape[2], most) * key.shape[2] / 1e9
    warnings.warn(
        f"chai-attention runs its reference, because {missing}. It saves K cache but no time: it "
        f"holds the probabilities of all heads, {held:.2g} GB for this call, and "
        "copies V; use the CPU, or CUDA with what is missing, for speed",
        stacklevel=3,
    )
