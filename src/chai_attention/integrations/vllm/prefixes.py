"""Which pages a later request may find again, where memberships are decided on requests' tokens.

vLLM finds a cached page by its tokens and those before it, and every request that reads a page
takes over the membership of its first one. So all pages of a prefix must have been written with
the membership that the first page's tokens alone decide. That holds if the whole probe window
stands in the first page (`fits`), and if a request decided on the whole window. One whose prompt,
or whose first chunk of it, was shorter decided on less: its pages stay out of the cache.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from chai_attention.errors import UnsupportedModelError
from chai_attention.integrations.vllm.options import page_problem

if TYPE_CHECKING:
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager as Manager
else:
    Manager = object


@dataclass(frozen=True, kw_only=True)
class ProbedSpec(FullAttentionSpec):
    """Pages of a model with online memberships and prefix caching; of all its layers.

    Attributes:
        probe_end: tokens of a prompt that decide its membership, counted from its first one.
    """

    probe_end: int = 0

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        """One spec for layers whose pages are alike."""
        return replace(super().merge(specs), probe_end=max(spec.probe_end for spec in specs))


class Decided(Manager):
    """Keeps pages of hasty decisions out of the prefix cache; goes before vLLM's manager.

    Managers of all groups decide alike, as all of them see the same tokens of every request.
    """

    def __init__(self, kv_cache_spec: Any, *args: Any, **kwargs: Any):
        super().__init__(kv_cache_spec, *args, **kwargs)
        self._probe_end: int = kv_cache_spec.probe_end
        # running requests: tokens behind their first chunk, if nothing was found before it
        self._begun: dict[str, int | None] = {}

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Take note of a request's first chunk.

        Args:
            request_id: whose.
            num_tokens: all that will have a place, perhaps with drafts.
            args: vLLM's; the first are the tokens without drafts.
            kwargs: the same.
        """
        if self._probe_end and request_id not in self._begun:
            found = self.num_cached_block.get(request_id, 0) > 0  # pages of one that decided so
            tokens = args[0] if args else kwargs.get("num_tokens_main_model", num_tokens)
            self._begun[request_id] = None if found else int(tokens)
        return super().allocate_new_blocks(request_id, num_tokens, *args, **kwargs)

    def cache_blocks(self, request: Any, *args: Any, **kwargs: Any) -> None:
        """Let later requests find the full pages of ``request``, if it decided as they would.

        Args:
            request: vLLM's.
            args: as vLLM's.
            kwargs: the same.
        """
        begun = self._begun.get(request.request_id)
        if begun is None or min(begun, request.num_prompt_tokens) >= self._probe_end:
            super().cache_blocks(request, *args, **kwargs)

    def pop_blocks_for_free(self, request_id: str) -> Any:
        """Forget a request that ended or has to start anew."""
        self._begun.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)


class ProbedManager(Decided, FullAttentionManager):
    """vLLM's manager of pages that are kept until a request ends."""


# vLLM registers its own kinds when it first looks one up, unless there are any by then
KVCacheSpecRegistry.check_kv_cache_spec_registry({})
KVCacheSpecRegistry.register(ProbedSpec, ProbedManager, FullAttentionSpec)


def probed(spec: FullAttentionSpec, probe_end: int) -> ProbedSpec:
    """The same pages, found again as `ProbedManager` allows.

    Raises:
        UnsupportedModelError: the first page does not hold the probe window.
    """
    problem = page_problem(probe_end, spec.block_size)
    if problem is not None:
        raise UnsupportedModelError(f"clustered heads do not support {problem}")
    known = {field.name: getattr(spec, field.name) for field in fields(spec) if field.init}
    return ProbedSpec(**known, probe_end=probe_end)
