"""Near pages as vLLM manages them: those of the last tokens and of the first, beside far pages.

They are pages of a sliding window, with one exception: the pages of a request's first tokens, the
sinks, stay. A prefix is found again if its first pages are and those of its last w - 1 tokens; all
between may be gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.kv_cache_utils import BlockHashListWithBlockSize
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from chai_attention.integrations.vllm.pages import sink_pages
from chai_attention.integrations.vllm.prefixes import Decided


@dataclass(frozen=True, kw_only=True)
class NearSpec(SlidingWindowSpec):
    """Near pages of all layers of a rank.

    Attributes:
        sinks: s, first tokens that are never given back.
        probe_end: as in `prefixes.ProbedSpec`; 0 where memberships do not depend on requests.
    """

    sinks: int = 0
    probe_end: int = 0

    @property
    def sink_pages(self) -> int:
        """Pages that hold a request's first tokens."""
        return sink_pages(self.sinks, self.block_size)

    def max_admission_blocks_per_request(self, *args: Any, **kwargs: Any) -> int:
        """Pages that a request holds at most, as vLLM counts on before it starts one.

        For the window's pages vLLM counts all steps that may be in flight (`pages.near_pages_of`
        counts one).
        """
        most: int = super().max_admission_blocks_per_request(*args, **kwargs)
        return most + self.sink_pages


class NearManager(Decided, SlidingWindowManager):
    """vLLM's manager of a sliding window's pages, which keeps the first ones."""

    def __init__(self, kv_cache_spec: NearSpec, *args: Any, **kwargs: Any):
        super().__init__(kv_cache_spec, *args, **kwargs)
        self._sinks = kv_cache_spec.sink_pages

    def remove_skipped_blocks(
        self, request_id: str, computed_tokens: int, *args: Any, **kwargs: Any
    ) -> None:
        """Give back pages between the first tokens and the window.

        Asked for every request in every step; few of them have a page to give back.
        """
        pages = self.req_to_blocks.get(request_id)
        last = self.get_num_skipped_tokens(computed_tokens) // self.block_size - 1
        if not pages or last < self._sinks or pages[min(last, len(pages) - 1)].is_null:
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
        """Which of a request's pages can ever be of use to another one; None for all."""
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
        if request_id in self.num_cached_block:
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


KVCacheSpecRegistry.register(NearSpec, NearManager, SlidingWindowSpec)
