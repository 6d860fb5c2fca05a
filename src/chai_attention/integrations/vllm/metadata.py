"""The metadata builder: from vLLM's description of a batch to a `Step`."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

from chai_attention.integrations.vllm.near_layer import NearLayer
from chai_attention.integrations.vllm.request_table import RequestTable
from chai_attention.integrations.vllm.step import NearTables, Step
from chai_attention.integrations.vllm.step_rows import Rows

_STASH = "_chai_step"


class StepBuffers:
    """Tensors that CUDA graphs read, filled before each replay; shared by a model's layers.

    Args:
        rows: most requests of a step, with those that pad a graph.
        device: of the cache.
    """

    def __init__(self, rows: int, device: torch.device):
        self.pages = torch.zeros(rows, dtype=torch.int32, device=device)


class ChaiMetadataBuilder(AttentionMetadataBuilder[Step]):
    """Builds a `Step`; the layers of all page sizes share one."""

    # decode runs in full CUDA graphs, prefill and mixed batches between graphs
    _cudagraph_support: ClassVar[AttentionCGSupport] = (
        AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    )

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1)
        context = vllm_config.compilation_config.static_forward_context
        self._layers = [context[name] for name in layer_names]
        served = self._layers[0].impl.served
        self._buffers: StepBuffers = served.buffers(device)
        self._decides = served.needs_probe  # else nobody asks how long prompts are
        self._requests = RequestTable.of_caller() if self._decides else None
        self._near: NearLayer | None = served.near
        self._prepared: Tensor | None = None

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Step:
        """Describe a batch; all builders of a step return the same object."""
        self._prepare()
        step = self._step_of(common_attn_metadata, is_capture=False)
        if self._decides and step.fresh:
            for layer in self._layers:
                layer.impl.begin(step)
        return step

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Step:
        """Describe a dummy batch of decodes whose graph is captured."""
        self._prepare()
        return self._step_of(common_attn_metadata, is_capture=True)

    def _step_of(self, common: CommonAttentionMetadata, is_capture: bool) -> Step:
        """The one step that all layers share."""
        step: Step | None = getattr(common, _STASH, None)
        if step is None or step.is_capture != is_capture:
            step = self._step(common, is_capture)
            setattr(common, _STASH, step)
            if self._near is not None:
                self._near.step = step  # `NearMetadataBuilder` is asked behind all others
        return step

    def _prepare(self) -> None:
        """Let layers make their tables for a new cache, which no graph may do."""
        cache = self._layers[0].kv_cache
        if self._prepared is not cache:
            for layer in self._layers:
                layer.impl.prepare(layer.kv_cache)
            self._prepared = cache

    def _step(self, common: CommonAttentionMetadata, is_capture: bool) -> Step:
        requests, tokens = common.num_reqs, common.num_actual_tokens
        rows = Rows(
            common.query_start_loc_cpu[: requests + 1].numpy(),
            self._host_lengths(common)[:requests].numpy(),
            partial(self._requests.prompt, req_idx=common.req_idx)
            if self._requests is not None and self._decides and not is_capture
            else None,
        )
        # rows without tokens pad a graph of decodes
        uniform = common.max_query_len == 1
        decodes = min(requests, tokens) if uniform else rows.leading_decodes()
        table = common.block_table_tensor[:requests]
        lengths = common.seq_lens[:requests]
        pages = self._buffers.pages[:requests]
        token_pages = pages
        if self._decides:
            pages.copy_(table[:, 0])
            # each token's request; found on the device, where padding may make more tokens
            if not uniform or tokens != requests:
                row = _rows_of_tokens(common.query_start_loc, requests, tokens)
                token_pages = pages[row]
        return Step(
            rows=rows,
            tokens=tokens,
            decodes=decodes,
            query_starts=common.query_start_loc[: requests + 1],
            lengths=lengths,
            block_table=table,
            slot_mapping=common.slot_mapping[:tokens],
            pages=pages,
            token_pages=token_pages,
            most_queries=common.max_query_len,
            most_keys=common.max_seq_len,
            is_capture=is_capture,
        )

    def _host_lengths(self, common: CommonAttentionMetadata) -> Tensor:
        """Tokens of each request, on the host; exact but for requests that only decode."""
        bound = common.seq_lens_cpu_upper_bound
        if bound is None or common.seq_lens.device.type == "cpu":
            return common.seq_lens.cpu()
        return bound


class NearMetadataBuilder(AttentionMetadataBuilder[Step]):
    """Adds the near pages to the `Step` that the other layers' builder has made."""

    _cudagraph_support = ChaiMetadataBuilder._cudagraph_support

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1)
        context = vllm_config.compilation_config.static_forward_context
        self._layer: NearLayer = context[layer_names[0]]

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Step:
        """Complete the step that is being described."""
        step, self._layer.step = self._layer.step, None
        tokens = common_attn_metadata.num_actual_tokens
        if step is None or step.tokens != tokens:
            raise RuntimeError(
                "near pages were described before the layers that need them; please report this, "
                "with the version of vLLM"
            )
        step.near = NearTables(
            common_attn_metadata.block_table_tensor[: common_attn_metadata.num_reqs],
            common_attn_metadata.slot_mapping[:tokens],
        )
        return step

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Step:
        """The same for a graph that is captured."""
        return self.build(0, common_attn_metadata)


def _rows_of_tokens(query_starts: Tensor, requests: int, tokens: int) -> Tensor:
    """``[T]`` int64: the request of each token."""
    token = torch.arange(tokens, dtype=query_starts.dtype, device=query_starts.device)
    row = torch.searchsorted(query_starts[1 : requests + 1], token, right=True)
    return row.clamp_max(requests - 1)
