"""How FlashAttention 3 deals a step's work to processors, worked out once for all layers.

vLLM's own metadata builder does the same for its layers, which all have as many heads. Layers that
keep some of their heads may keep different numbers of them, and each number has a schedule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chai_attention.integrations.vllm.metadata import ChaiMetadata


class Schedule(NamedTuple):
    """What FlashAttention is told about a step.

    Attributes:
        metadata: int32, of its own make; None if it works that out in every layer.
        splits: parts of a context at most; 0 for what it thinks best.
    """

    metadata: Tensor | None = None
    splits: int = 0


class FlashSchedules:
    """Schedules of a model's layers on one rank.

    Args:
        config: the ``VllmConfig``.
        schedule: vLLM's ``get_scheduler_metadata``; None to leave it to every layer, as
            batch-invariant results need it.
        rows: most requests of a step, with those that pad a graph.
        dtype: of Q, K and V.
        head_dim: D.
        softcap: whether scores have one.
    """

    def __init__(
        self,
        config: Any,
        schedule: Callable[..., Tensor] | None,
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
        import vllm.envs as envs
        from vllm.v1.attention.backends.fa_utils import get_scheduler_metadata

        model = config.model_config
        schedule = None if envs.VLLM_BATCH_INVARIANT else get_scheduler_metadata
        return cls(config, schedule, rows, model.dtype, model.get_head_size(), softcap)

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
        if self._schedule is None:
            splits = 1
        elif is_replayed:
            # memory for partial outputs is a graph's own, so there has to be a bound
            splits = self._config.attention_config.flash_attn_max_num_splits_for_cuda_graph
        made: dict[tuple[int, int], Schedule] = {}
        for count in self._memory:
            metadata = self._make(step, page, *count, splits)
            if is_replayed and metadata is not None:
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
    ) -> Tensor | None:
        if self._schedule is None:
            return None
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
