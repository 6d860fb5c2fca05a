"""The metadata builders: from vLLM's description of a batch to `ChaiMetadata`."""

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

from chai_attention.integrations.vllm.flash import takes_flash
from chai_attention.integrations.vllm.kv_cache import LocalLayer
from chai_attention.integrations.vllm.memberships import RequestTable
from chai_attention.integrations.vllm.metadata import ChaiMetadata, LocalTables
from chai_attention.integrations.vllm.model_state import ModelState
from chai_attention.integrations.vllm.request_spans import RequestSpans

_STASH = "_chai_metadata"


class ChaiMetadataBuilder(AttentionMetadataBuilder[ChaiMetadata]):
    """Describes a step once; the layers of all page sizes share the `ChaiMetadata`."""

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
        model: ModelState = self._layers[0].impl.model_state
        self._first_pages = model.first_pages(device)
        self._decides = model.needs_probe  # else no layer needs the lengths of prompts
        self._requests = RequestTable.of_caller() if self._decides else None
        self._local = model.local
        self._flash = model.flash
        self._page: int = kv_cache_spec.block_size
        self._prepared: Tensor | None = None

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> ChaiMetadata:
        """Describe a batch; all builders of a step return the same object."""
        self._prepare()
        step = self._shared(common_attn_metadata, is_capture=False)
        if self._decides and step.new:
            for layer in self._layers:
                layer.impl.begin(step)
        return step

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> ChaiMetadata:
        """Describe a dummy batch of decodes whose graph is captured."""
        self._prepare()
        return self._shared(common_attn_metadata, is_capture=True)

    def _prepare(self) -> None:
        """Let layers make their tables for a new cache, which no graph may do."""
        cache = self._layers[0].kv_cache
        if self._prepared is not cache:
            for layer in self._layers:
                layer.impl.prepare(layer.kv_cache)
            self._prepared = cache

    def _shared(self, common: CommonAttentionMetadata, is_capture: bool) -> ChaiMetadata:
        """The one description that all layers share."""
        step: ChaiMetadata | None = getattr(common, _STASH, None)
        if step is None or step.is_capture != is_capture:
            step = self._describe(common, is_capture)
            if self._flash is not None and takes_flash(step):
                self._flash.describe(step, self._page)
            setattr(common, _STASH, step)
            if self._local is not None:
                self._local.step = step  # vLLM asks `LocalMetadataBuilder` after all others
        return step

    def _describe(self, common: CommonAttentionMetadata, is_capture: bool) -> ChaiMetadata:
        count, tokens = common.num_reqs, common.num_actual_tokens
        requests = RequestSpans(
            common.query_start_loc_cpu[: count + 1].numpy(),
            _host_seq_lens(common)[:count].numpy(),
            None
            if self._requests is None or is_capture
            else partial(self._requests.prompt_len, req_idx=common.req_idx),
        )
        # requests without tokens pad a graph of decodes
        uniform = common.max_query_len == 1
        table = common.block_table_tensor[:count]
        first_pages = token_pages = self._first_pages[:count]
        if self._decides:
            first_pages.copy_(table[:, 0])
            # each token's request; found on the device, where padding may make more tokens
            if not uniform or tokens != count:
                token_pages = first_pages[_request_of_tokens(common.query_start_loc, count, tokens)]
        return ChaiMetadata(
            requests=requests,
            num_actual_tokens=tokens,
            num_decodes=min(count, tokens) if uniform else requests.leading_decodes(),
            query_start_loc=common.query_start_loc[: count + 1],
            seq_lens=common.seq_lens[:count],
            block_table=table,
            slot_mapping=common.slot_mapping[:tokens],
            first_pages=first_pages,
            token_pages=token_pages,
            max_query_len=common.max_query_len,
            max_seq_len=common.max_seq_len,
            is_capture=is_capture,
        )


class LocalMetadataBuilder(AttentionMetadataBuilder[ChaiMetadata]):
    """Adds the local pages to the `ChaiMetadata` that the other layers' builder has made."""

    _cudagraph_support = ChaiMetadataBuilder._cudagraph_support

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1)
        context = vllm_config.compilation_config.static_forward_context
        self._layer: LocalLayer = context[layer_names[0]]

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> ChaiMetadata:
        """Complete the step that is being described."""
        step, self._layer.step = self._layer.step, None
        tokens = common_attn_metadata.num_actual_tokens
        if step is None or step.num_actual_tokens != tokens:
            raise RuntimeError(
                "local pages were described before the layers that need them; please report this, "
                "with the version of vLLM"
            )
        step.local = LocalTables(
            common_attn_metadata.block_table_tensor[: common_attn_metadata.num_reqs],
            common_attn_metadata.slot_mapping[:tokens],
        )
        return step

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> ChaiMetadata:
        """The same for a graph that is captured."""
        return self.build(0, common_attn_metadata)


def _host_seq_lens(common: CommonAttentionMetadata) -> Tensor:
    """Tokens of each request, on the host; exact but for requests that only decode."""
    bound = common.seq_lens_cpu_upper_bound
    if bound is None or common.seq_lens.device.type == "cpu":
        return common.seq_lens.cpu()
    return bound


def _request_of_tokens(query_start_loc: Tensor, requests: int, tokens: int) -> Tensor:
    """``[T]`` int64: the request of each token."""
    token = torch.arange(tokens, dtype=query_start_loc.dtype, device=query_start_loc.device)
    request = torch.searchsorted(query_start_loc[1 : requests + 1], token, right=True)
    return request.clamp_max(requests - 1)
