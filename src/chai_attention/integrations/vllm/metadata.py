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

from chai_attention.integrations.vllm.request_table import RequestTable
from chai_attention.integrations.vllm.step import Row, Step, leading_decodes, rows_of
from chai_attention.integrations.vllm.window import RequestSlots

_STASH = "_chai_step"


class StepBuffers:
    """Tensors that CUDA graphs read, filled before each replay; shared by a model's layers.

    Args:
        rows: most requests of a step, with those that pad a graph.
        requests: most requests that run at a time.
        window: tokens that the rings of the recent window hold, 0 without a window.
        device: of the cache.
    """

    def __init__(self, rows: int, requests: int, window: int, device: torch.device):
        self.window = window
        self.pages, self.slots, self.token_slots = torch.zeros(
            3, rows, dtype=torch.int32, device=device
        )
        self.positions = torch.zeros(rows, dtype=torch.long, device=device)
        self.known = RequestSlots(requests)


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
        self._requests: RequestTable | None = None
        if self._decides or self._buffers.window:
            self._requests = RequestTable.of_caller()
        self._prepared: Tensor | None = None
        # verified drafts make lengths that the host knows only roughly
        self._drafts = vllm_config.speculative_config is not None

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Step:
        """Describe a batch; all builders of a step return the same object."""
        self._prepare()
        step = getattr(common_attn_metadata, _STASH, None)
        if step is None:
            step = self._step(common_attn_metadata, is_capture=False)
            setattr(common_attn_metadata, _STASH, step)
        for layer in self._layers:
            layer.impl.begin(step)
        return step

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Step:
        """Describe a dummy batch of decodes whose graph is captured."""
        self._prepare()
        step = getattr(common_attn_metadata, _STASH, None)
        if step is None or not step.is_capture:
            step = self._step(common_attn_metadata, is_capture=True)
            setattr(common_attn_metadata, _STASH, step)
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
        rows = rows_of(
            common.query_start_loc_cpu.tolist(),
            self._host_lengths(common)[:requests],
            partial(self._requests.prompt, req_idx=common.req_idx)
            if self._requests is not None and self._decides and not is_capture
            else None,
        )
        # rows without tokens pad a graph of decodes
        uniform = common.max_query_len == 1
        decodes = min(requests, tokens) if uniform else leading_decodes(rows)
        table = common.block_table_tensor[:requests]
        buffers, lengths = self._buffers, common.seq_lens[:requests]
        slot_mapping = common.slot_mapping[:tokens]
        pages = buffers.pages[:requests]
        pages.copy_(table[:, 0])
        uniform = uniform and tokens == requests
        # each token's request; found on the device, where padding may make more tokens
        row = None if uniform else _rows_of_tokens(common.query_start_loc, requests, tokens)
        token_pages = pages if row is None else pages[row]
        window: dict[str, Any] = {}
        if buffers.window:
            window = self._window(common, rows, table, row, is_capture)
        return Step(
            rows=rows,
            tokens=tokens,
            decodes=decodes,
            query_starts=common.query_start_loc[: requests + 1],
            lengths=lengths,
            block_table=table,
            slot_mapping=slot_mapping,
            pages=pages,
            token_pages=token_pages,
            most_queries=common.max_query_len,
            most_keys=common.max_seq_len,
            is_capture=is_capture,
            **window,
        )

    def _host_lengths(self, common: CommonAttentionMetadata) -> list[int]:
        """Tokens of each request, on the host; exact but for requests that only decode."""
        bound = common.seq_lens_cpu_upper_bound
        if bound is None or common.seq_lens.device.type == "cpu":
            return common.seq_lens.tolist()
        if self._drafts and common.max_query_len > 1 and self._buffers.window:
            return common.seq_lens.tolist()
        return bound.tolist()

    def _window(
        self,
        common: CommonAttentionMetadata,
        rows: list[Row],
        table: Tensor,
        row: Tensor | None,
        is_capture: bool,
    ) -> dict[str, Any]:
        """What only layers with a recent window need."""
        buffers, tokens = self._buffers, common.num_actual_tokens
        requests = table.shape[0]
        host = self._slots_of(common, rows, table, is_capture)
        host += [0] * (requests - len(host))  # rows that pad a graph
        slots = buffers.slots[:requests]
        new = torch.tensor(host, dtype=torch.int32)
        if slots.is_cuda:
            new = new.pin_memory()
        slots.copy_(new, non_blocking=True)
        lengths, there = common.seq_lens[:requests], common.slot_mapping[:tokens] >= 0
        if row is None:
            positions, token_slots = buffers.positions[:tokens], buffers.token_slots[:tokens]
            positions.copy_(lengths - 1)
            token_slots.copy_(torch.where(there, slots, -1))
            return {
                "slots": slots,
                "host_slots": host,
                "token_slots": token_slots,
                "positions": positions,
            }
        token = torch.arange(tokens, device=slots.device)
        before_end = common.query_start_loc[1:][row] - token  # 1 for a request's last token
        # the ring has no place for tokens so old; they may still be sinks
        own = torch.where(before_end > buffers.window, -2 - slots[row], slots[row])
        return {
            "slots": slots,
            "host_slots": host,
            "token_slots": torch.where(there, own, -1).int(),
            "positions": (lengths[row] - before_end).long(),
        }

    def _slots_of(
        self, common: CommonAttentionMetadata, rows: list[Row], table: Tensor, is_capture: bool
    ) -> list[int]:
        """Rows of the pools."""
        if is_capture:
            return []
        if common.req_idx is not None:
            known: list[int] = common.req_idx.tolist()
            return known[: table.shape[0]]
        real = [row for row in rows if row.tokens and row.length]
        slots = [0] * len(rows)
        if self._requests is None or not bool(table[:, 0].any()):
            return slots  # a dummy batch: page 0 is nobody's
        names = self._requests.names()
        found = self._buffers.known.rows(
            [names[row.number] for row in real],
            [row.context == 0 for row in real],
            self._requests.living,
        )
        for row, slot in zip(real, found, strict=True):
            slots[row.number] = slot
        return slots


def _rows_of_tokens(query_starts: Tensor, requests: int, tokens: int) -> Tensor:
    """``[T]`` int64: the request of each token."""
    token = torch.arange(tokens, dtype=query_starts.dtype, device=query_starts.device)
    row = torch.searchsorted(query_starts[1 : requests + 1], token, right=True)
    return row.clamp_max(requests - 1)
