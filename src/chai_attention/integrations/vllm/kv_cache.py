"""For vLLM's manager of the K,V cache: which prefixes it may find again, and local pages.

Prefixes: vLLM finds a cached page by its tokens and those before it, and every request that reads a
page takes over the membership of its first one. So all pages of a prefix must have been written
with the membership that the first page's tokens alone decide. That holds if the whole probe window
stands in the first page (`options.page_problem`), and if the request that wrote them decided on the
whole window. A request with a shorter prompt, or a shorter first chunk, decided on fewer tokens:
its pages stay out of the cache (`Decided`).

Local pages are pages of a sliding window, with one exception: the pages of a request's first
tokens, the sinks, stay (`LocalManager`). A prefix is found again if its first pages are and those
of its last w - 1 tokens; all between may be gone. vLLM gives pages to layers, so local pages are
those of one more layer (`LocalLayer`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.core.kv_cache_utils import BlockHashListWithBlockSize
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, SlidingWindowManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from chai_attention.errors import UnsupportedModelError
from chai_attention.integrations.vllm.layers import PageLayout, sink_pages
from chai_attention.integrations.vllm.metadata import ChaiMetadata
from chai_attention.integrations.vllm.options import page_problem

if TYPE_CHECKING:
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager as Manager
else:
    Manager = object


@dataclass(frozen=True, kw_only=True)
class FarSpec(FullAttentionSpec):
    """Pages of all layers of a model whose far pages are not simply vLLM's.

    Attributes:
        probe_end: tokens of a prompt that decide its membership, counted from its first one; 0
            where memberships do not depend on requests, or no prefix is found again.
    """

    probe_end: int = 0

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        """One spec for layers whose pages are alike."""
        return replace(super().merge(specs), probe_end=max(spec.probe_end for spec in specs))


class Decided(Manager):
    """Keeps pages of requests that decided on too few tokens out of the prefix cache.

    A class to put before vLLM's manager. Managers of all groups of pages come to the same decision,
    as all of them see the same tokens of every request.

    vLLM asks every manager some five questions per running request and step. Most requests need no
    page then and have no new full one: such questions are answered here, as vLLM's manager would.
    """

    def __init__(self, kv_cache_spec: Any, *args: Any, **kwargs: Any):
        super().__init__(kv_cache_spec, *args, **kwargs)
        self._probe_end: int = kv_cache_spec.probe_end
        # running requests: tokens behind their first chunk, if nothing was found before it
        self._begun: dict[str, int | None] = {}

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[Any],
        *args: Any,
        **kwargs: Any,
    ) -> int:
        """Pages that a request takes out of those that are free, found ones included."""
        pages = self.req_to_blocks.get(request_id)
        if pages and num_tokens <= len(pages) * self.block_size and not new_computed_blocks:
            return 0
        count: int = super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, *args, **kwargs
        )
        return count

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Take pages for ``num_tokens``, and note of a request's first chunk, which needs some.

        Args:
            request_id: whose.
            num_tokens: all that will have a place, perhaps with drafts.
            args: vLLM's; the first are the tokens without drafts.
            kwargs: the same.
        """
        pages = self.req_to_blocks.get(request_id)
        if pages and num_tokens <= len(pages) * self.block_size:
            return []
        if self._probe_end and request_id not in self._begun:
            found = self.num_cached_block.get(request_id, 0) > 0  # pages of one that decided so
            tokens = args[0] if args else kwargs.get("num_tokens_main_model", num_tokens)
            self._begun[request_id] = None if found else int(tokens)
        return super().allocate_new_blocks(request_id, num_tokens, *args, **kwargs)

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Let later requests find the full pages of ``request``, if it decided as they would.

        Args:
            request: vLLM's.
            num_tokens: those whose full pages may be found.
            args: as vLLM's.
            kwargs: the same.
        """
        name = request.request_id
        if num_tokens // self.block_size <= self.num_cached_block.get(name, 0):
            return
        begun = self._begun.get(name)
        if begun is None or min(begun, request.num_prompt_tokens) >= self._probe_end:
            super().cache_blocks(request, num_tokens, *args, **kwargs)

    def pop_blocks_for_free(self, request_id: str) -> Any:
        """Forget a request that ended or has to start anew."""
        self._begun.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)


class FarManager(Decided, FullAttentionManager):
    """vLLM's manager of pages that are kept until a request ends.

    Beside pages of another size vLLM's own takes note of a prompt's last page in every step, as
    prefixes of some models may end within it. Here they end where pages of all kinds do.
    """


def far_pages(spec: FullAttentionSpec, probe_end: int) -> FarSpec:
    """The same pages, looked after by `FarManager`.

    Raises:
        UnsupportedModelError: the first page does not hold the probe window.
    """
    problem = page_problem(probe_end, spec.block_size)
    if problem is not None:
        raise UnsupportedModelError(f"clustered heads do not support {problem}")
    known = {field.name: getattr(spec, field.name) for field in fields(spec) if field.init}
    return FarSpec(**known, probe_end=probe_end)


@dataclass(frozen=True, kw_only=True)
class LocalSpec(SlidingWindowSpec):
    """Local pages of all layers of a rank.

    Attributes:
        sinks: s, first tokens that are never given back.
        probe_end: as in `FarSpec`; 0 where memberships do not depend on requests.
    """

    sinks: int = 0
    probe_end: int = 0

    @property
    def sink_pages(self) -> int:
        """Pages that hold a request's first tokens."""
        return sink_pages(self.sinks, self.block_size)

    def max_admission_blocks_per_request(self, *args: Any, **kwargs: Any) -> int:
        """Pages that a request holds at most, as vLLM counts on before it starts one.

        For the window's pages vLLM counts all steps that may be in flight (`layers.local_pages_of`
        counts one).
        """
        most: int = super().max_admission_blocks_per_request(*args, **kwargs)
        return most + self.sink_pages


class LocalManager(Decided, SlidingWindowManager):
    """vLLM's manager of a sliding window's pages, which keeps the first ones."""

    def __init__(self, kv_cache_spec: LocalSpec, *args: Any, **kwargs: Any):
        super().__init__(kv_cache_spec, *args, **kwargs)
        self._sinks = kv_cache_spec.sink_pages
        many = 2**40
        self._seen = many - self.get_num_skipped_tokens(many)  # the last tokens, which are kept

    def remove_skipped_blocks(
        self, request_id: str, computed_tokens: int, *args: Any, **kwargs: Any
    ) -> None:
        """Give back pages between the first tokens and the window.

        Asked for every request in every step; few of them have a page to give back.
        """
        last = (computed_tokens - self._seen) // self.block_size - 1
        if last < self._sinks:
            return
        pages = self.req_to_blocks.get(request_id)
        if not pages or (last < len(pages) and pages[last].is_null):
            return
        # what is not there is not given back
        first = pages[: self._sinks]
        pages[: self._sinks] = [self._null_block] * len(first)
        super().remove_skipped_blocks(request_id, computed_tokens, *args, **kwargs)
        pages[: self._sinks] = first

    @classmethod
    def find_longest_cache_hit(cls, block_hashes: Any, *args: Any, **kwargs: Any) -> Any:
        """The longest prefix whose first pages are there, and those of its last tokens."""
        found, length = super().find_longest_cache_hit(block_hashes, *args, **kwargs)
        spec, pool = kwargs["kv_cache_spec"], kwargs["block_pool"]
        for index in range(min(spec.sink_pages, len(found[0]))):
            if not found[0][index].is_null:
                continue
            first = pool.get_cached_block(
                _hashes_of_pages(block_hashes, pool, spec.block_size)[index],
                kwargs["kv_cache_group_ids"],
            )
            if not first:
                return tuple([] for _ in found), 0
            for pages, page in zip(found, first, strict=True):
                pages[index] = page
        return found, length

    @classmethod
    def reachable_block_mask(
        cls, start_block: int, end_block: int, *args: Any, **kwargs: Any
    ) -> list[bool] | None:
        """Which of a request's pages another one may find; None for all."""
        mask: list[bool] | None = super().reachable_block_mask(
            start_block, end_block, *args, **kwargs
        )
        if mask is not None:
            spec = kwargs["kv_cache_spec"]
            for index in range(start_block, min(end_block, spec.sink_pages)):
                mask[index - start_block] = True
        return mask

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[Any],
        total_computed_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        """Pages that a request takes out of those that are free, found ones included."""
        count: int = super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, total_computed_tokens, *args, **kwargs
        )
        if not new_computed_blocks or request_id in self.num_cached_block:
            return count
        skipped = self.get_num_skipped_tokens(total_computed_tokens) // self.block_size
        return count + self._get_num_evictable_blocks(
            new_computed_blocks[: min(self._sinks, skipped)]
        )

    def add_local_computed_blocks(
        self, request_id: str, new_computed_blocks: Sequence[Any], *args: Any, **kwargs: Any
    ) -> None:
        """Take over found pages."""
        super().add_local_computed_blocks(request_id, new_computed_blocks, *args, **kwargs)
        pages = self.req_to_blocks[request_id]
        for index, page in enumerate(new_computed_blocks[: self._sinks]):
            if pages[index] is not page:  # given up as older than the window
                self.block_pool.touch([page])
                pages[index] = page


def _hashes_of_pages(block_hashes: Any, pool: Any, page: int) -> Any:
    """The hash of each page of ``page`` tokens."""
    if pool.hash_block_size == page or isinstance(block_hashes, BlockHashListWithBlockSize):
        return block_hashes
    return BlockHashListWithBlockSize(block_hashes, pool.hash_block_size, page)


# vLLM registers its own kinds when it first looks one up, unless there are any by then
KVCacheSpecRegistry.check_kv_cache_spec_registry({})
KVCacheSpecRegistry.register(FarSpec, FarManager, FullAttentionSpec)
KVCacheSpecRegistry.register(LocalSpec, LocalManager, SlidingWindowSpec)


class LocalLayer(AttentionLayerBase):
    """The layer by which vLLM keeps local pages: it has pages, and never runs.

    Its pages hold what an exact window needs of the heads that far pages do not hold: the local K
    and V of one clustered layer after the other. As all layers of a rank share this one, they make
    one group of pages: vLLM forms groups by how many layers have pages of each size.

    Args:
        like: a clustered layer of vLLM's, of whose kind of numbers the pages are.
        backend: of `local_backend`, with the layouts of the model's layers.
        layouts: what pages hold of each layer, by layers' names, in this order.
        numbers: per token, at least as many as the layouts have; the same on all ranks of a
            pipeline.
        far: numbers per token of the far pages of each of the model's layers.
        tokens: of a local page, from those of a far page.
        recent: w.
        sinks: s.
        probe_end: as in `LocalSpec`.
    """

    def __init__(
        self,
        like: Any,
        backend: type[AttentionBackend],
        layouts: Mapping[str, PageLayout],
        numbers: int,
        far: Collection[int],
        tokens: Callable[[int], int],
        recent: int,
        sinks: int,
        probe_end: int,
    ):
        self._like = like
        self._backend = backend
        self._layouts = dict(layouts)
        ends = accumulate(layout.numbers_per_token for layout in layouts.values())
        self._starts = dict(zip(layouts, [0, *ends], strict=False))
        self._numbers = numbers
        self._far = set(far)
        self._tokens = tokens
        self.step: ChaiMetadata | None = None  # the one that vLLM is describing
        self._window = {"sliding_window": recent, "sinks": sinks, "probe_end": probe_end}
        self.kv_cache = torch.tensor([])

    def get_attn_backend(self) -> type[AttentionBackend]:
        """The backend class of these pages."""
        return self._backend

    def get_kv_cache_spec(self, vllm_config: Any) -> LocalSpec:
        """The kind of pages that vLLM has to keep."""
        far = self._like.get_kv_cache_spec(vllm_config)
        page, numbers = self._tokens(far.block_size), self._numbers
        if {page * numbers} == {far.block_size * each for each in self._far}:
            numbers += 16  # pages of one size would be grouped by other rules
        return LocalSpec(
            block_size=page,
            num_kv_heads=far.num_kv_heads,
            head_size=far.head_size,
            head_size_v=far.head_size_v,
            dtype=far.dtype,
            kv_quant_mode=far.kv_quant_mode,
            num_head_slots=1,
            state_content_bytes=numbers * far.dtype.itemsize,
            **self._window,
        )

    def split(self, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """View the local pages of one layer.

        Args:
            name: the layer's.
            dtype: of K and V in pages.

        Returns:
            K ``[P, N, removed K heads, D]`` and V ``[P, N, removed V heads, Dv]``.
        """
        return self._layouts[name].split(self.kv_cache.view(dtype), self._starts[name])
