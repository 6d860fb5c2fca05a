"""A layer as vLLM runs it: the heads that one rank holds, and what lies in their pages."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chai_attention.membership import Membership
from chai_attention.runtime.plan import LayerPlan

PAGE_MULTIPLE = 16  # tokens; what the kernels need of a page
PAGE = 64  # tokens of a page on GPUs: with fewer the kernels look up pages more than they read them
# Prefixes are found again at multiples of both kinds of pages: not more than so many far pages
_MOST_ALIGNED = 4
_LONGEST = 2  # local pages hold no more than so many far ones, unless the window does


@dataclass(frozen=True)
class PageLayout:
    """The pages of one layer, far or local.

    A page of N tokens is one run of memory: ``[N, key_heads, D]`` of K and behind it
    ``[N, value_heads, Dv]`` of V. Far pages hold the heads that a membership keeps, in the order of
    its ``key_heads`` and ``value_heads``; local pages those that it removes, in the order of its
    ``removed_key_heads`` and ``removed_value_heads``.

    Attributes:
        key_heads: K heads that a page holds.
        value_heads: V heads that a page holds.
        head_dim: D.
        value_dim: Dv.
    """

    key_heads: int
    value_heads: int
    head_dim: int
    value_dim: int

    @property
    def numbers_per_token(self) -> int:
        """Numbers that a page holds for every token; at least one, as vLLM has no empty pages."""
        return max(1, self.key_heads * self.head_dim + self.value_heads * self.value_dim)

    def page_bytes(self, tokens: int, element_size: int) -> int:
        """Bytes of a page of ``tokens``."""
        return tokens * self.numbers_per_token * element_size

    def split(self, cache: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        """View the K and V pages of a layer's cache.

        Args:
            cache: ``[P, 1, N, C]``, as vLLM hands it to attention; a page is one run of memory.
            start: numbers of a page, per token, that stand before the layer's.

        Returns:
            ``[P, N, key_heads, D]`` and ``[P, N, value_heads, Dv]``.
        """
        pages, tokens, stride = cache.shape[0], cache.shape[2], cache.stride(0)
        line, end = self.key_heads * self.head_dim, self.value_heads * self.value_dim
        first = cache.storage_offset() + tokens * start
        return (
            cache.as_strided(
                (pages, tokens, self.key_heads, self.head_dim),
                (stride, line, self.head_dim, 1),
                first,
            ),
            cache.as_strided(
                (pages, tokens, self.value_heads, self.value_dim),
                (stride, end, self.value_dim, 1),
                first + tokens * line,
            ),
        )


class Pages(NamedTuple):
    """A layer's pages: views of a cache, kept only for the one that vLLM has planned.

    It makes others for trials, which have to get free.

    Attributes:
        key: ``[P, N, kept K heads, D]``.
        value: ``[P, N, kept V heads, Dv]``.
        local_key: ``[P, N', removed K heads, D]`` of local pages; None if far pages hold all heads.
        local_value: ``[P, N', removed V heads, Dv]``; the same.
        shared: `PagedKV.shared` of these pages; None for pages of one step.
    """

    key: Tensor
    value: Tensor
    local_key: Tensor | None = None
    local_value: Tensor | None = None
    shared: dict[Any, Any] | None = None


def local_page(page: int, far: int, local: int, recent: int) -> int:
    """Tokens of a local page beside far pages of ``page`` tokens.

    vLLM takes both from one store of blocks, so every block is as large as the larger of the two.
    Local pages are as long as they can be without being the larger ones; but 16 tokens at least,
    not much longer than the window or far pages, and so that prefixes can be found again at every
    fourth far page or more often.

    Args:
        page: tokens of a far page, a multiple of 16.
        far: numbers per token in the far pages of all layers together.
        local: the same of local pages.
        recent: w.
    """
    found = PAGE_MULTIPLE
    longest = min(page * far // max(1, local), max(_LONGEST * page, recent), _MOST_ALIGNED * page)
    for tokens in range(PAGE_MULTIPLE, longest + 1, PAGE_MULTIPLE):
        if math.lcm(tokens, page) <= _MOST_ALIGNED * page:
            found = tokens
    return found


def sink_pages(sinks: int, page: int) -> int:
    """Local pages of ``page`` tokens that hold a request's first ``sinks`` tokens."""
    return -(-sinks // page)


def local_pages_of(tokens: int, page: int, recent: int, sinks: int, new: int = 1) -> int:
    """Local pages that a request of ``tokens`` holds at most, while ``new`` of them are read.

    Args:
        tokens: with the new ones.
        page: tokens of a local page.
        recent: w.
        sinks: s.
        new: tokens of a step, all of whose local pages are there while it runs.
    """
    window = -(-(recent - 2 + new) // page) + 1  # it may begin anywhere in a page
    return min(-(-tokens // page), window + sink_pages(sinks, page))


@dataclass(frozen=True)
class LayerShard:
    """One layer's heads on one rank.

    Attributes:
        plan: how they are clustered; heads count from the rank's first.
        kept: K heads that far pages hold, the same on every rank.
        fallback: ``[H]`` representatives of requests whose first chunk of tokens is too short to
            tell, of layers with an online membership.
        exact: streaming heads of the plan that attend to all keys nevertheless, as another rank has
            fewer of them (online memberships only).
    """

    plan: LayerPlan
    kept: int
    fallback: tuple[int, ...]
    exact: tuple[int, ...] = ()

    @cached_property
    def streaming(self) -> tuple[int, ...]:
        """Heads that see local keys only."""
        return tuple(head for head in self.plan.streaming if head not in self.exact)

    @cached_property
    def kept_values(self) -> int:
        """V heads that far pages hold, the same on every rank."""
        return replace(self.plan, streaming=self.streaming).kept_values

    def membership(self, device: torch.device | str | None = None) -> Membership:
        """The membership that does not depend on the request, of one row."""
        rep = self.plan.representatives or self.fallback
        # made on the CPU, so that kernels know the sizes of the clusters without waiting
        member = self.membership_of(torch.tensor([rep]))
        return member if device is None else member.to(device)

    def membership_of(self, representatives: torch.Tensor) -> Membership:
        """The membership of ``[B, H]`` representatives; a streaming head's is itself."""
        plan = self.plan
        return Membership.from_representatives(
            representatives,
            plan.clusters + len(self.exact),
            plan.kv_heads,
            self.kept,
            self.streaming,
        )

    @property
    def needs_workspace(self) -> bool:
        """Whether prompts read copies of 8-bit pages: `copies.DequantisationWorkspace`."""
        return not self.plan.is_identity

    @property
    def kind(self) -> Hashable:
        """Layers of one kind run the same kernels."""
        plan = self.plan
        kept = self.kept, self.kept_values, len(self.streaming)
        return plan.clusters, kept, plan.needs_probe, plan.has_recent_window

    def layout(self, head_dim: int, value_dim: int) -> PageLayout:
        """Far pages of this layer: K and V for all tokens."""
        return PageLayout(self.kept, self.kept_values, head_dim, value_dim)

    def local_layout(self, head_dim: int, value_dim: int) -> PageLayout | None:
        """Local pages of this layer: what far pages lack, for the exact window; None without."""
        keys, values = self.plan.kv_heads - self.kept, self.plan.kv_heads - self.kept_values
        if not self.plan.has_recent_window or not keys + values:
            return None
        return PageLayout(keys, values, head_dim, value_dim)


def local_page_tokens(
    layers: Iterable[LayerShard], page: int, head_dim: int, value_dim: int
) -> int:
    """Tokens of the local pages of a model, the same in all layers and on all ranks.

    Args:
        layers: all that the model has, of any tensor-parallel rank.
        page: tokens of a far page.
        head_dim: D.
        value_dim: Dv.
    """
    far = local = recent = 0
    for layer in layers:
        recent = max(recent, layer.plan.recent)
        far += layer.layout(head_dim, value_dim).numbers_per_token
        layout = layer.local_layout(head_dim, value_dim)
        local += 0 if layout is None else layout.numbers_per_token
    return local_page(page, far, local, recent)
