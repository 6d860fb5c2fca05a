"""What the clustered layers of a model share under vLLM."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Hashable, Iterator
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch

from chai_attention.integrations.vllm import memberships
from chai_attention.integrations.vllm.copies import DequantisationWorkspace, workspace_numbers
from chai_attention.integrations.vllm.decode_graphs import DecodeMemory
from chai_attention.integrations.vllm.flash import FlashSchedules
from chai_attention.integrations.vllm.layers import (
    PAGE,
    PAGE_MULTIPLE,
    LayerShard,
    local_page_tokens,
)
from chai_attention.integrations.vllm.options import (
    EIGHT_BITS,
    Asked,
    choose_page,
    mark,
    profile_of,
    refuse,
)
from chai_attention.integrations.vllm.shares import layer_shards, savings
from chai_attention.runtime.shape import describe

if TYPE_CHECKING:
    from chai_attention.integrations.vllm.kv_cache import LocalLayer

_log = logging.getLogger("vllm.chai_attention")  # shown where vLLM's own lines are
LOCAL_LAYER = "local_pages.0"  # vLLM wants the number of a layer in every name

# layers hold their model; a model without layers leaves by itself
_models: weakref.WeakValueDictionary[int, ModelState] = weakref.WeakValueDictionary()


class ModelState:
    """Profile, layers and shared memory of one model on one rank.

    Args:
        config: the ``VllmConfig``.

    Raises:
        ChaiError: something that cannot run; the text says what to do.
    """

    def __init__(self, config: Any):
        from vllm.distributed import (
            get_tensor_model_parallel_rank,
            get_tensor_model_parallel_world_size,
        )
        from vllm.platforms import current_platform

        self.config = config
        self.profile = profile_of(config)
        refuse(Asked.of_config(config), self.profile, config.model_config.model)
        mark(config, self.profile)
        if choose_page(config.cache_config, current_platform.is_cuda()):
            _log.info("clustered heads: pages of %d tokens (--block-size)", PAGE)
        self.layers: tuple[LayerShard, ...] = layer_shards(
            describe(config.model_config.hf_config),
            self.profile,
            get_tensor_model_parallel_world_size(),
            get_tensor_model_parallel_rank(),
        )
        self._tell_savings()
        # most requests of a step; a graph may be padded to more
        self.max_requests: int = max(
            config.scheduler_config.max_num_seqs,
            config.compilation_config.max_cudagraph_capture_size or 0,
        )
        self.warmed: set[Hashable] = set()  # kinds of layers whose kernels are compiled
        self.local: LocalLayer | None = None  # of this rank, once its layers' weights are loaded
        self.flash: FlashSchedules | None = None  # of layers that run vLLM's FlashAttention
        self._first_pages: torch.Tensor | None = None
        self._planned: int | None = None  # pages at most, before vLLM plans them
        self._workspace: DequantisationWorkspace | None = None
        self._decodes: DecodeMemory | None = None

    def _tell_savings(self) -> None:
        """Log once what is saved."""
        from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank

        if get_tensor_model_parallel_rank() or not get_pp_group().is_first_rank:
            return
        shape = describe(self.config.model_config.hf_config)
        ranks = self.config.parallel_config.tensor_parallel_size
        _log.info("clustered heads: %s", savings(shape, self.profile, ranks, self.layers).line)

    @cached_property
    def has_local_pages(self) -> bool:
        """Whether there are local pages beside far ones, on any rank."""
        return any(layer.local_layout(1, 1) is not None for layer in self.layers)

    @property
    def needs_probe(self) -> bool:
        """Whether memberships depend on requests."""
        return any(layer.plan.needs_probe for layer in self.layers)

    @property
    def prefix_probe(self) -> int:
        """Tokens of a prompt that decide its membership, if prefixes are cached; else 0."""
        if not self.config.cache_config.enable_prefix_caching:
            return 0
        return max(
            (layer.plan.probe_end for layer in self.layers if layer.plan.needs_probe), default=0
        )

    @property
    def far_probe(self) -> int | None:
        """``probe_end`` of `kv_cache.FarSpec`; None where far pages are simply vLLM's."""
        return self.prefix_probe if self.prefix_probe or self.has_local_pages else None

    @classmethod
    def of(cls, config: Any) -> ModelState:
        """The model of ``config``; the same object for all its layers."""
        key = id(config.compilation_config.static_forward_context)
        model = _models.get(key)
        if model is None:
            model = _models[key] = cls(config)
        return model

    def first_pages(self, device: torch.device) -> torch.Tensor:
        """``[most requests]`` int32 that all metadata builders fill and CUDA graphs read."""
        if self._first_pages is None:
            self._first_pages = torch.zeros(self.max_requests, dtype=torch.int32, device=device)
        return self._first_pages

    def workspace(
        self, layer: LayerShard, value_dim: int, device: torch.device
    ) -> DequantisationWorkspace:
        """Memory for copies of 8-bit pages, shared by all layers, with room for those of one."""
        model, head_dim = self.config.model_config, self.config.model_config.get_head_size()
        drafted = self.config.speculative_config
        # of two steps, as one may be under way when the next is described
        drafts = 0 if drafted is None else 2 * drafted.num_speculative_tokens
        if self._workspace is None:
            self._workspace = DequantisationWorkspace(model.dtype, device, drafts)
        page = self.config.cache_config.block_size or PAGE_MULTIPLE
        self._workspace.reserve(
            workspace_numbers(
                layer,
                head_dim,
                value_dim,
                self.config.scheduler_config.max_num_batched_tokens,
                model.max_model_len,
                local_page_tokens(self.layers, page, head_dim, value_dim),
                drafts,
            )
        )
        return self._workspace

    @property
    def has_graphs(self) -> bool:
        """Whether layers capture decodes: where vLLM has CUDA graphs.

        Microbatches run side by side, which the layers' common memory is not for.
        """
        mode = self.config.compilation_config.cudagraph_mode
        side_by_side = getattr(self.config.parallel_config, "enable_dbo", False)
        return mode is not None and bool(mode) and not side_by_side

    def decode_memory(self, cache: torch.Tensor) -> DecodeMemory:
        """What captured decodes read and write, shared by all layers.

        Args:
            cache: the pages of one of them, ``[P, 1, N, numbers]``.
        """
        if self._decodes is None:
            model, layer = self.config.model_config, next(iter(self._layers_here()))
            module = self.config.compilation_config.static_forward_context[layer]
            self._decodes = DecodeMemory(
                self.config.scheduler_config.max_num_seqs,
                model.max_model_len,
                module.num_heads,
                (module.head_size, module.head_size_v),
                (cache.shape[2], None if self.local is None else self.local.kv_cache.shape[2]),
                model.dtype,
                cache.device,
            )
        return self._decodes

    def schedules(self, softcap: bool) -> FlashSchedules:
        """FlashAttention's schedules, which all layers of a rank share."""
        if self.flash is None:
            self.flash = FlashSchedules.for_model(self.config, self.max_requests, softcap)
        return self.flash

    def hold(self, layer: LayerShard, device: torch.device) -> torch.Tensor | None:
        """Take memory for the tables of a layer's pages; None where it need not be held.

        Called for the layers of this rank once their weights are loaded.
        """
        row = memberships.row_bytes(layer, self.config.model_config.get_head_size())
        if not row:
            return None
        if self._planned is None:
            self._planned = self._planned_pages(device)
        held = self._planned * row
        return torch.empty(held, dtype=torch.uint8, device=device) if held else None

    def _planned_pages(self, device: torch.device) -> int:
        """Pages that vLLM will plan at most; 0 where it does not count the memory."""
        left = memberships.memory_left(self.config, device)
        if left is None:
            return 0
        cache, model = self.config.cache_config, self.config.model_config
        element = 1 if cache.cache_dtype in EIGHT_BITS else model.dtype.itemsize
        size, tokens = model.get_head_size(), cache.block_size or PAGE_MULTIPLE
        here = self._layers_here().values()
        return memberships.planned_pages(
            cache,
            left,
            sum(each.layout(size, size).page_bytes(tokens, element) for each in here),
            sum(memberships.row_bytes(each, size) for each in here),
        )

    def _layers_here(self) -> dict[str, LayerShard]:
        """The layers of this rank of a pipeline, by their names."""
        from vllm.model_executor.models.utils import extract_layer_index

        context = self.config.compilation_config.static_forward_context
        names = (name for name, module in context.items() if hasattr(module, "impl"))
        return {name: self.layers[extract_layer_index(name)] for name in names}

    def add_local_layer(self, module: Any, layouts: tuple[Any, ...]) -> None:
        """Let vLLM keep local pages for the layers of this rank, if there are any on some rank.

        Ranks of a pipeline have one by the same name and of the same size, also those that need
        none: vLLM cannot take a group of pages that is missing on a rank.

        Args:
            module: vLLM's ``Attention`` of one of them.
            layouts: of the cache, that all layers of the model can read.
        """
        if self.local is not None or not self.has_local_pages:
            return
        from chai_attention.integrations.vllm.backend import local_backend
        from chai_attention.integrations.vllm.kv_cache import LocalLayer

        sizes = self.config.model_config.get_head_size(), module.head_size_v
        held = {
            name: layout
            for name, layer in self._layers_here().items()
            if (layout := layer.local_layout(*sizes)) is not None
        }
        self.local = LocalLayer(
            module,
            local_backend(layouts),
            held,
            max(self._local_numbers(*sizes)),
            [layer.layout(*sizes).numbers_per_token for layer in self.layers],
            partial(local_page_tokens, self.layers, head_dim=sizes[0], value_dim=sizes[1]),
            self.profile.recent,
            self.profile.sinks,
            self.prefix_probe,
        )
        context = self.config.compilation_config.static_forward_context
        context[LOCAL_LAYER] = self.local

    def _local_numbers(self, head_dim: int, value_dim: int) -> Iterator[int]:
        """Numbers per token of the local pages of each rank of a pipeline."""
        from vllm.distributed.utils import get_pp_indices

        ranks = self.config.parallel_config.pipeline_parallel_size
        for rank in range(ranks):
            start, stop = get_pp_indices(len(self.layers), rank, ranks)
            held = (layer.local_layout(head_dim, value_dim) for layer in self.layers[start:stop])
            yield sum(layout.numbers_per_token for layout in held if layout is not None)
