"""A model under vLLM, as its clustered layers share it."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Hashable, Iterator
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch

from chai_attention.integrations.vllm import reserve
from chai_attention.integrations.vllm.copies import PageCopies, copied_tokens
from chai_attention.integrations.vllm.layers import (
    ServedLayer,
    near_page_tokens,
    served_layers,
)
from chai_attention.integrations.vllm.options import (
    EIGHT_BITS,
    Asked,
    choose_page,
    mark,
    profile_of,
    refuse,
)
from chai_attention.integrations.vllm.pages import PAGE, PAGE_MULTIPLE
from chai_attention.integrations.vllm.savings import savings
from chai_attention.runtime.shape import describe

if TYPE_CHECKING:
    from chai_attention.integrations.vllm.near_layer import NearLayer

_log = logging.getLogger("vllm.chai_attention")  # shown where vLLM's own lines are
NEAR_LAYER = "near_pages.0"  # vLLM wants the number of a layer in every name

# layers hold their model; a model without layers leaves by itself
_models: weakref.WeakValueDictionary[int, ServedModel] = weakref.WeakValueDictionary()


class ServedModel:
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
        refuse(Asked.of_config(config), self.profile)
        mark(config, self.profile)
        if choose_page(config.cache_config, current_platform.is_cuda()):
            _log.info("clustered heads: pages of %d tokens (--block-size)", PAGE)
        self.layers: tuple[ServedLayer, ...] = served_layers(
            describe(config.model_config.hf_config),
            self.profile,
            get_tensor_model_parallel_world_size(),
            get_tensor_model_parallel_rank(),
        )
        self._tell_savings()
        self.requests: int = config.scheduler_config.max_num_seqs
        # a graph may be padded to more rows
        self.rows = max(self.requests, config.compilation_config.max_cudagraph_capture_size or 0)
        self.warmed: set[Hashable] = set()  # kinds of layers whose kernels are compiled
        self.near: NearLayer | None = None  # of this rank, once its layers' weights are loaded
        self._buffers: Any = None
        self._pages: int | None = None  # at most, before vLLM plans them
        self._copies: PageCopies | None = None

    def _tell_savings(self) -> None:
        """Log once what is saved."""
        from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank

        if get_tensor_model_parallel_rank() or not get_pp_group().is_first_rank:
            return
        shape = describe(self.config.model_config.hf_config)
        ranks = self.config.parallel_config.tensor_parallel_size
        _log.info("clustered heads: %s", savings(shape, self.profile, ranks, self.layers).line)

    @cached_property
    def packs(self) -> bool:
        """Whether there are near pages beside far ones, on any rank."""
        return any(layer.near_layout(1, 1) is not None for layer in self.layers)

    @property
    def needs_probe(self) -> bool:
        """Whether memberships depend on requests."""
        return any(layer.plan.needs_probe for layer in self.layers)

    @property
    def prefix_probe(self) -> int:
        """Tokens that decide what a cached prefix means; 0 if no request's tokens do."""
        if not self.config.cache_config.enable_prefix_caching:
            return 0
        return max(
            (layer.plan.probe_end for layer in self.layers if layer.plan.needs_probe), default=0
        )

    @classmethod
    def of(cls, config: Any) -> ServedModel:
        """The model of ``config``; the same object for all its layers."""
        key = id(config.compilation_config.static_forward_context)
        model = _models.get(key)
        if model is None:
            model = _models[key] = cls(config)
        return model

    def copies(self, device: torch.device) -> PageCopies:
        """Memory for copies of 8-bit pages, shared by all layers."""
        if self._copies is None:
            model = self.config.model_config
            batch_tokens = self.config.scheduler_config.max_num_batched_tokens
            tokens = copied_tokens(batch_tokens, model.max_model_len)
            self._copies = PageCopies(tokens, model.dtype, device)
        return self._copies

    def hold(self, layer: ServedLayer, device: torch.device) -> torch.Tensor | None:
        """Memory that the tables of a layer's pages will take; None where it need not be held.

        Called for the layers of this rank once their weights are loaded.
        """
        config = self.config
        size = config.model_config.get_head_size()
        row = reserve.row_bytes(layer, size)
        if not row:
            return None
        if self._pages is None:
            left = reserve.room(config, device)
            here = self._layers_here().values()
            element = 1 if config.cache_config.cache_dtype in EIGHT_BITS else None
            element = element or config.model_config.dtype.itemsize
            tokens = config.cache_config.block_size or PAGE_MULTIPLE
            self._pages = (
                0
                if left is None
                else reserve.planned_pages(
                    config.cache_config,
                    left,
                    sum(each.layout(size, size).page_bytes(tokens, element) for each in here),
                    sum(reserve.row_bytes(each, size) for each in here),
                )
            )
        return (
            torch.empty(self._pages * row, dtype=torch.uint8, device=device)
            if self._pages
            else None
        )

    def _layers_here(self) -> dict[str, ServedLayer]:
        """Those of this rank of a pipeline, by their names."""
        from vllm.model_executor.models.utils import extract_layer_index

        context = self.config.compilation_config.static_forward_context
        names = (name for name, module in context.items() if hasattr(module, "impl"))
        return {name: self.layers[extract_layer_index(name)] for name in names}

    def add_near_layer(self, module: Any, layouts: tuple[Any, ...]) -> None:
        """Let vLLM keep near pages for the layers of this rank, if there are any on some rank.

        Ranks of a pipeline have one by the same name and of the same size, also those that need
        none: vLLM cannot take a group of pages that is missing on a rank.

        Args:
            module: vLLM's ``Attention`` of one of them.
            layouts: of the cache, that all layers of the model can read.
        """
        if self.near is not None or not self.packs:
            return
        from chai_attention.integrations.vllm.near_layer import NearLayer, near_backend

        sizes = self.config.model_config.get_head_size(), module.head_size_v
        held = {
            name: layout
            for name, layer in self._layers_here().items()
            if (layout := layer.near_layout(*sizes)) is not None
        }
        self.near = NearLayer(
            module,
            near_backend(layouts),
            held,
            max(self._near_numbers(*sizes)),
            [layer.layout(*sizes).numbers_per_token for layer in self.layers],
            partial(near_page_tokens, self.layers, head_dim=sizes[0], value_dim=sizes[1]),
            self.profile.recent,
            self.profile.sinks,
            self.prefix_probe,
        )
        context = self.config.compilation_config.static_forward_context
        context[NEAR_LAYER] = self.near

    def _near_numbers(self, head_dim: int, value_dim: int) -> Iterator[int]:
        """Numbers per token of the near pages of each rank of a pipeline."""
        from vllm.distributed.utils import get_pp_indices

        ranks = self.config.parallel_config.pipeline_parallel_size
        for rank in range(ranks):
            start, stop = get_pp_indices(len(self.layers), rank, ranks)
            held = (layer.near_layout(head_dim, value_dim) for layer in self.layers[start:stop])
            yield sum(layout.numbers_per_token for layout in held if layout is not None)

    def buffers(self, device: torch.device) -> Any:
        """Tensors that all metadata builders fill."""
        if self._buffers is None:
            from chai_attention.integrations.vllm.metadata import StepBuffers

            self._buffers = StepBuffers(self.rows, device)
        return self._buffers
