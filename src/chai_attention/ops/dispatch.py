"""The operations of clustered attention, and the choice of the backend that runs them.

Every operation checks its arguments and calls one method of an `AttentionBackend`: CUDA's
(`triton.backend`, Triton's kernels and, on Hopper GPUs, more), the CPU's (`cpu`) or the reference
(`reference_backend`). On CUDA none of them reads anything on the host.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

from chai_attention.errors import AttentionInputError
from chai_attention.membership import Membership
from chai_attention.ops import checks
from chai_attention.ops.backend import AttentionBackend
from chai_attention.ops.call import AttentionCall, DenseKV, PackedKV, PackedQueries, PagedKV, Probe
from chai_attention.ops.choice import is_plain
from chai_attention.ops.cpu import CpuBackend
from chai_attention.ops.local import LocalKeys
from chai_attention.ops.reference_backend import ReferenceBackend, TorchBackend
from chai_attention.ops.rolling_buffer import RollingBuffer
from chai_attention.ops.windowed import WindowTables

logger = logging.getLogger("chai_attention")

CPU, REFERENCE, TORCH = CpuBackend(), ReferenceBackend(), TorchBackend()


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

    Arguments, results and meaning are those of `ops.reference.clustered_attention`. The CPU runs
    blocked matrix products or torch's fused attention, whichever is faster there (`choice`), CUDA
    the Triton kernels; where no head is clustered, torch's own attention runs if it is faster. What
    has no kernel (head sizes above 256 or float64 on CUDA, CUDA without Triton, other devices) runs
    the readable reference, with a warning that says what that costs. The logger "chai_attention"
    says at level DEBUG what runs.

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
    kv = DenseKV(key, value, lengths, valid)
    call = AttentionCall(membership, scale, softcap, return_lse=return_lse)
    checks.check_dense(query, kv, membership)
    backend = choose(query.device, query, kv, call)
    logger.debug(
        "attention by %s: query %s, key %s", backend.name, tuple(query.shape), tuple(key.shape)
    )
    return backend.attend(query, kv, call)


def windowed_attention(
    query: Tensor, kv: DenseKV, local: LocalKeys, tables: WindowTables, call: AttentionCall
) -> Tensor:
    """Clustered attention of the last Q tokens with an exact recent window (`windowed`).

    `reference.recent_attention` is the definition.

    Args:
        query: ``[B, H, Q, D]``, all heads in their natural order.
        kv: K and V that the cache holds, of all S tokens; neither lengths nor padding count.
        local: K and V of the local keys, of all K/V heads.
        tables: of these S tokens and Q queries, their padding included.
        call: of a membership of B rows.

    Returns:
        ``[B, Q, H, Dv]`` in the dtype of V.
    """
    return backend_of(query.device).attend_window(query, kv, local, tables, call)


def decode_recent(query: Tensor, kv: DenseKV, ring: RollingBuffer, call: AttentionCall) -> Tensor:
    """Attend with one query per sequence and an exact recent window over fixed memory.

    Args:
        query: ``[B, H, 1, D]``, all heads in their natural order.
        kv: K and V that the cache holds, the new tokens' included; sinks are the first keys that
            are not padding.
        ring: K and V of the other heads; holds the new tokens' already.
        call: of a membership of B rows, or of one for all.

    Returns:
        ``[B, 1, H, Dv]``.
    """
    return backend_of(query.device).decode_recent(query, kv, ring, call)


def paged_decode(
    query: Tensor, pages: PagedKV, call: AttentionCall, out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Attend with one query per sequence to K and V in pages.

    Args:
        query: ``[B, k, D]`` of the representatives in slot order, or ``[B, H, D]`` of all heads
            in theirs, of which the representatives' are read in place.
        pages: K and V.
        call: how.
        out: ``[B, H, Dv]`` to write to.

    Returns:
        ``out [B, H, Dv]`` and ``lse [B, k]`` float32 (natural logarithm) or None.

    Raises:
        AttentionInputError: shapes or options that do not fit together; on CUDA, a dtype or head
            size without a kernel, or strided head dimensions.
    """
    checks.check_paged_decode(query, pages, call, out)
    if out is None:
        out = call.new_output(query, pages.value)
    return out, backend_of(query.device).paged_decode(query, pages, call, out)


def paged_prefill(
    queries: PackedQueries,
    pages: PagedKV,
    call: AttentionCall,
    out: Tensor | None = None,
    probe: Probe | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Causal clustered attention of packed queries to keys in pages, those of new tokens included.

    Query i of Q in sequence b stands at position ``seq_lens[b] - Q + i``.

    Args:
        queries: new tokens of all sequences.
        pages: K and V; pages hold a multiple of 16 tokens.
        call: how.
        out: ``[T, H, Dv]`` to write to; what stands behind the last sequence is left as it is.
        probe: tokens with full attention, which need a tensor of all heads; None for none.

    Returns:
        ``out [T, H, Dv]`` and ``lse [T, k]`` float32 (natural logarithm) or None.

    Raises:
        AttentionInputError: as of `paged_decode`.
    """
    checks.check_paged_prefill(queries, pages, call, probe)
    if out is None:
        out = call.new_output(queries.query, pages.value)
    backend = backend_of(queries.query.device)
    return out, backend.packed_prefill(queries, pages, call, out, probe)


def varlen_prefill(
    queries: PackedQueries,
    new: PackedKV,
    call: AttentionCall,
    out: Tensor | None = None,
    probe: Probe | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Causal clustered attention of packed sequences without context, to their own K and V.

    Arguments, results and errors are those of `paged_prefill`, but for ``new``: K and V.
    """
    checks.check_varlen_prefill(queries, new, call, probe)
    if out is None:
        out = call.new_output(queries.query, new.value)
    backend = backend_of(queries.query.device)
    return out, backend.packed_prefill(queries, new, call, out, probe)


def choose(
    device: torch.device, query: Tensor, kv: DenseKV, call: AttentionCall
) -> AttentionBackend:
    """Choose what runs `attention` on a device.

    Raises:
        AttentionInputError: a layout that kernels cannot read.
    """
    if device.type != "cuda":
        return (
            CPU
            if device.type == "cpu"
            else _reference(f"there is no kernel for device {device.type!r}")
        )
    # without clusters torch's prefill is faster than ours; decode is not
    if query.shape[2] > 1 and is_plain(kv, call):
        return TORCH
    kernels = _cuda(device)
    if kernels.missing is not None:
        return kernels
    if query.dtype == torch.float64:
        return _reference("there is no kernel for float64 on CUDA")
    size, most = max(query.shape[3], kv.value.shape[3]), _largest_head()
    if size > most:
        return _reference(f"head size {size} is more than the {most} of the kernels")
    for name, tensor in (("query", query), ("key", kv.key), ("value", kv.value)):
        if tensor.stride(-1) != 1:
            raise AttentionInputError(
                f"the numbers of a head of {name} are not consecutive in memory (strides "
                f"{tuple(tensor.stride())}), which the kernels need: call .contiguous()"
            )
    return kernels


def backend_of(device: torch.device) -> AttentionBackend:
    """Return the backend of a device.

    Raises:
        ImportError: CUDA without Triton.
    """
    if device.type != "cuda":
        return CPU if device.type == "cpu" else REFERENCE
    backend = _cuda(device)
    if backend.missing is not None:
        raise ImportError(backend.missing)
    return backend


@cache
def _cuda(device: torch.device) -> AttentionBackend:
    """The kernels, or the reference with the reason why they cannot be loaded."""
    try:
        from chai_attention.ops.triton.backend import of_device
    except (ImportError, OSError) as error:
        return ReferenceBackend(
            f"Triton, which the kernels for CUDA need, cannot be imported ({error}; pip install "
            "triton, on Windows triton-windows)"
        )
    return of_device(device)


@cache
def _reference(missing: str) -> ReferenceBackend:
    """The reference in place of what is missing."""
    return ReferenceBackend(missing)


@cache
def _largest_head() -> int:
    """The largest head size of the kernels."""
    from chai_attention.ops.triton.checks import MAX_HEAD_DIM

    return MAX_HEAD_DIM
