"""vLLM's FlashAttention for kept heads, in layers of grouped queries in which no head shares.

A head that keeps its far keys sees all its keys in far pages, so it attends as in any model.
FlashAttention reads K and V once for all query heads of a K/V head, where our kernels do so for
heads that share scores only. Streaming heads attend by our kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chai_attention.index_tables import table_of
from chai_attention.integrations.vllm.attend import StepAttention
from chai_attention.integrations.vllm.layers import LayerShard, Pages
from chai_attention.integrations.vllm.memberships import FixedMembership
from chai_attention.integrations.vllm.metadata import ChaiMetadata, SubBatch

VERSION = 3  # of FlashAttention, for Hopper GPUs: no other was tried in these layers
# Tokens of a step with prompts from which on it attends to all of them. Both kinds of heads are
# launched by themselves, which shorter steps wait for: 1 x 2,048 took 62.5 ms on an H200, vLLM's
# own 45.9. There it attends with the decodes alone
LEAST_TOKENS = 4096


@dataclass(frozen=True)
class HeadKinds:
    """The heads of a layer in which every K/V head keeps all far keys or none.

    Attributes:
        kept: query heads that keep them, ascending.
        streaming: the others.
        kv_heads: K/V heads of the first.
        streaming_kv_heads: those of the others, ascending.
    """

    kept: tuple[int, ...]
    streaming: tuple[int, ...]
    kv_heads: int
    streaming_kv_heads: tuple[int, ...]

    @classmethod
    def of(cls, layer: LayerShard) -> HeadKinds | None:
        """Tell the heads of a layer; None for one that keeps our kernels.

        In such a layer some heads share, all or none stream, pages hold more, or every query head
        has a K/V head of its own, with which our kernels are faster.
        """
        plan, group = layer.plan, layer.plan.heads // layer.plan.kv_heads
        streaming = layer.streaming
        kept = tuple(head for head in range(plan.heads) if head not in streaming)
        local, far = (tuple(dict.fromkeys(h // group for h in x)) for x in (streaming, kept))
        if (
            group == 1
            or not local
            or not far
            or set(local) & set(far)
            or plan.shares
            or not plan.has_recent_window
            or (layer.kept, layer.kept_values) != (len(far), len(far))
        ):
            return None
        return cls(kept, streaming, len(far), local)


def flash_kernels(
    device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int
) -> Callable[..., Any] | None:
    """Look for vLLM's FlashAttention 3; None where our kernels attend to pages of this kind.

    Args:
        device: of the cache.
        dtype: of Q, K and V. Pages of 8 bits are none of these: FlashAttention would round Q to 8
            bits too.
        head_dim: D.
        value_dim: Dv.
    """
    if device.type != "cuda" or torch.version.hip is not None or head_dim != value_dim:
        return None
    if dtype not in (torch.float16, torch.bfloat16) or head_dim % 8:
        return None
    from vllm.v1.attention.backends import fa_utils

    if fa_utils.get_flash_attn_version(head_size=head_dim) != VERSION:
        return None
    found: Callable[..., Any] = fa_utils.flash_attn_varlen_func
    return found


def takes_flash(step: ChaiMetadata) -> bool:
    """Whether kept heads of all requests of a step attend by FlashAttention."""
    return not step.prefills or step.num_actual_tokens >= LEAST_TOKENS


class _Heads:
    """Brings the heads of both kinds side by side: views where they stand so, else copies.

    Args:
        kinds: of the layer.
        device: of the cache.
    """

    def __init__(self, kinds: HeadKinds, device: torch.device):
        heads, number = (*kinds.kept, *kinds.streaming), len(kinds.kept)
        self._order = self._back = None
        spans = _span(kinds.kept), _span(kinds.streaming)
        if spans[0] is None or spans[1] is None:
            self._order = table_of(heads, device)
            self._back = table_of(tuple(heads.index(head) for head in range(len(heads))), device)
            spans = slice(number), slice(number, None)
        self._kept, self._streaming = spans
        self._groups = _span(kinds.streaming_kv_heads)
        self._group_table = table_of(kinds.streaming_kv_heads, device)

    def of_query(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Queries ``[T, H, D]`` of the kept and of the streaming heads."""
        if self._order is not None:
            query = query.index_select(1, self._order)
        return query[:, self._kept], query[:, self._streaming]

    def streaming_states(self, states: Tensor) -> Tensor:
        """K or V ``[T, G, D]`` of the K/V heads that stream."""
        if self._groups is not None:
            return states[:, self._groups]
        return states.index_select(1, self._group_table)

    def room(self, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where outputs go before `finish`, whole and those of both kinds."""
        room = out if self._order is None else torch.empty_like(out)
        return room, room[:, self._kept], room[:, self._streaming]

    def finish(self, room: Tensor, out: Tensor) -> None:
        """Bring all outputs to their heads."""
        if self._back is not None:
            torch.index_select(room, 1, self._back, out=out)


class Schedule(NamedTuple):
    """How FlashAttention runs a step.

    Attributes:
        metadata: int32, of its own make; None if it works that out in every layer.
        splits: parts of a context at most; 0 for what it thinks best.
    """

    metadata: Tensor | None = None
    splits: int = 0


class FlashSchedules:
    """How FlashAttention deals a step's work to processors: once for all of a rank's layers.

    vLLM's own metadata builder does the same for its layers, which all have as many heads. Here
    layers may keep different numbers of heads, and each number has a schedule.

    Args:
        config: the ``VllmConfig``.
        schedule: vLLM's ``get_scheduler_metadata``.
        rows: most requests of a step, with those that pad a graph.
        dtype: of Q, K and V.
        head_dim: D.
        softcap: whether scores have one.
    """

    def __init__(
        self,
        config: Any,
        schedule: Callable[..., Tensor],
        rows: int,
        dtype: torch.dtype,
        head_dim: int,
        softcap: bool,
    ):
        self._config = config
        self._schedule = schedule
        self._rows = rows
        self._dtype = dtype
        self._head_dim = head_dim
        self._softcap = softcap
        self._memory: dict[tuple[int, int], Tensor | None] = {}  # of schedules in CUDA graphs

    @classmethod
    def for_model(cls, config: Any, rows: int, softcap: bool) -> FlashSchedules:
        """Schedules by vLLM's FlashAttention, as its own builder would have them."""
        from vllm.v1.attention.backends.fa_utils import get_scheduler_metadata

        model = config.model_config
        return cls(
            config, get_scheduler_metadata, rows, model.dtype, model.get_head_size(), softcap
        )  # fmt: skip

    def add(self, heads: int, kv_heads: int) -> None:
        """Say that some layer keeps so many query heads and K/V heads."""
        self._memory.setdefault((heads, kv_heads), None)

    def describe(self, step: ChaiMetadata, page: int) -> None:
        """Make the schedules of a step, before any layer runs or a graph is replayed.

        Args:
            step: the step.
            page: tokens of a far page.
        """
        compilation = self._config.compilation_config
        # only steps of this kind are captured
        is_replayed = (
            compilation.cudagraph_mode.has_full_cudagraphs()
            and step.max_query_len == 1
            and step.num_actual_tokens <= (compilation.max_cudagraph_capture_size or 0)
        )
        splits = 0
        if is_replayed:
            # memory for partial outputs is a graph's own, so there has to be a bound
            splits = self._config.attention_config.flash_attn_max_num_splits_for_cuda_graph
        made: dict[tuple[int, int], Schedule] = {}
        for count in self._memory:
            metadata = self._make(step, page, *count, splits)
            if is_replayed:
                metadata = self._keep(count, metadata)
            made[count] = Schedule(metadata, splits)
        step.schedules = made

    @staticmethod
    def of(step: ChaiMetadata, heads: int, kv_heads: int) -> Schedule:
        """The schedule of a layer that keeps so many heads; none is made for steps of trials."""
        found: Schedule = step.schedules.get((heads, kv_heads), Schedule())
        return found

    def _make(
        self, step: ChaiMetadata, page: int, heads: int, kv_heads: int, splits: int
    ) -> Tensor:
        return self._schedule(
            batch_size=step.seq_lens.shape[0],
            max_seqlen_q=step.max_query_len,
            max_seqlen_k=step.max_seq_len,
            num_heads_q=heads,
            num_heads_kv=kv_heads,
            headdim=self._head_dim,
            cache_seqlens=step.seq_lens,
            qkv_dtype=self._dtype,
            cu_seqlens_q=step.query_start_loc,
            page_size=page,
            causal=True,
            has_softcap=self._softcap,
            num_splits=splits,
        )

    def _keep(self, count: tuple[int, int], metadata: Tensor) -> Tensor:
        """Bring a schedule to where the graphs read it."""
        memory = self._memory[count]
        if memory is None:
            # a counter, and four numbers for each request, of which there are multiples of four
            size = 1 + 4 * (-(-self._rows // 4) * 4)
            memory = self._memory[count] = metadata.new_zeros(size)
        used = metadata.shape[0]
        memory[:used] = metadata
        memory[used:] = 0  # what is left of a larger step would be taken for work
        return memory[:used]


class FlashStepAttention(StepAttention):
    """`StepAttention` of a layer of `HeadKinds`.

    Args:
        layer: the layer.
        kinds: its heads.
        attend: vLLM's ``flash_attn_varlen_func``.
        memberships: of the layer.
        rows: most requests of a step.
        scale: factor on the scores.
        softcap: as in `ops.reference.attention`.
        device: of the cache.
    """

    def __init__(
        self,
        layer: LayerShard,
        kinds: HeadKinds,
        attend: Callable[..., Any],
        memberships: FixedMembership,
        rows: int,
        scale: float,
        softcap: float | None,
        device: torch.device,
    ):
        super().__init__(layer.plan, memberships, scale, softcap)
        self.kinds = kinds
        self._flash = attend
        self._heads = _Heads(kinds, device)
        # a layer of their own, whose local pages are those of the whole one
        every = tuple(range(len(kinds.streaming)))
        plan = replace(
            layer.plan, heads=len(every), kv_heads=len(kinds.streaming_kv_heads), clusters=0,
            representatives=every, streaming=every, offsets=None,
        )  # fmt: skip
        own = FixedMembership(LayerShard(plan, 0, every), rows, device)
        self._local = StepAttention(plan, own, scale, softcap)

    def run(
        self,
        step: ChaiMetadata,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pages: Pages,
        out: Tensor,
    ) -> None:
        """As `StepAttention.run`; FlashAttention attends in one call where it `takes_flash`."""
        if step.is_warm_up or not takes_flash(step):
            super().run(step, query, key, value, pages, out)
            if not step.is_warm_up:  # which compiles the kernels of both ways
                return
        if step.prefills:  # decodes read pages only
            key, value = (self._heads.streaming_states(x) for x in (key, value))
        schedule = FlashSchedules.of(step, len(self.kinds.kept), self.kinds.kv_heads)

        def attend_local(query: Tensor, pages: Pages, out: Tensor) -> None:
            self._local.run(step, query, key, value, pages, out)

        def attend_far(query: Tensor, out: Tensor) -> None:
            self._far(step, schedule, query, pages, out)

        self._both(query, pages, out, attend_local, attend_far)

    def _decode(self, part: SubBatch, query: Tensor, pages: Pages, out: Tensor) -> None:
        """As `StepAttention._decode`, for decodes beside prompts that our kernels attend with."""

        def attend_local(query: Tensor, pages: Pages, out: Tensor) -> None:
            self._local._decode(part, query, pages, out)

        def attend_far(query: Tensor, out: Tensor) -> None:
            self._far(part, Schedule(), query, pages, out)

        self._both(query, pages, out, attend_local, attend_far)

    def _both(
        self,
        query: Tensor,
        pages: Pages,
        out: Tensor,
        attend_local: Callable[[Tensor, Pages, Tensor], None],
        attend_far: Callable[[Tensor, Tensor], None],
    ) -> None:
        """Attend with both kinds of heads; side by side in a CUDA graph."""
        kept, streaming = self._heads.of_query(query)
        room, out_kept, out_streaming = self._heads.room(out)
        own = Pages(pages.key[:, :, :0], pages.value[:, :, :0], pages.local_key, pages.local_value)
        if out.is_cuda and torch.cuda.is_current_stream_capturing():
            here, beside = torch.cuda.current_stream(), _side_stream(out.device)
            beside.wait_stream(here)
            # the long kernel first: the short one finds room beside it (16 x 8,192 on an H200:
            # 73 us a layer, and 76 the other way round)
            attend_far(kept, out_kept)
            with torch.cuda.stream(beside):
                attend_local(streaming, own, out_streaming)
            here.wait_stream(beside)
        else:
            attend_local(streaming, own, out_streaming)
            attend_far(kept, out_kept)
        self._heads.finish(room, out)

    def _far(
        self,
        requests: ChaiMetadata | SubBatch,
        schedule: Schedule,
        query: Tensor,
        pages: Pages,
        out: Tensor,
    ) -> None:
        """Attend with the kept heads of some requests, as vLLM does in any layer."""
        self._flash(
            q=query,
            k=pages.key,
            v=pages.value,
            out=out,
            cu_seqlens_q=requests.query_start_loc,
            max_seqlen_q=requests.max_query_len,
            seqused_k=requests.seq_lens,
            max_seqlen_k=requests.max_seq_len,
            softmax_scale=self.scale,
            causal=True,
            block_table=requests.block_table,
            softcap=self.softcap or 0.0,
            scheduler_metadata=schedule.metadata,
            num_splits=schedule.splits,
            fa_version=VERSION,
        )


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of streaming heads in CUDA graphs; of all layers, which come one by one."""
    return torch.cuda.Stream(device)


def _span(heads: tuple[int, ...]) -> slice | None:
    """Neighbouring heads as a slice; None if they are none."""
    first, stop = heads[0], heads[-1] + 1
    return slice(first, stop) if stop - first == len(heads) else None
