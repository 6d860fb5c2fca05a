"""Memberships of running requests, found by the first page of each.

A request's membership has to be found again in every step, also after vLLM moved its row, and by
other requests that share its first page (prefix caching). The number of that page serves for both:
it belongs to the request until its K and V are dropped, and a request that reads the page needs
the membership that wrote it.

So every page has a row of tables in every layer that decides memberships. The tables are allocated
after vLLM's pages. To leave room for them, the layers reserve as much memory when their weights are
loaded, which vLLM counts as used (`row_bytes`, `planned_pages`).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import fields
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from chai_attention.errors import UnsupportedModelError
from chai_attention.integrations.vllm.layers import LayerShard
from chai_attention.integrations.vllm.metadata import ChaiMetadata
from chai_attention.integrations.vllm.request_spans import RequestSpan
from chai_attention.membership import Membership
from chai_attention.ops import windowed
from chai_attention.ops.membership_tables import MembershipTables
from chai_attention.runtime.plan import LayerPlan

LEAST_PROBE = 5  # tokens that a membership is decided on at least (the paper's window)

# a membership's tables that kernels read, for pages and prompts, and for exact windows
_TABLES = ("slot_heads", "key_heads", "value_heads", "value_slot", "key_slot")
_WINDOW_TABLES = ("removed_key_heads", "removed_value_heads", "key_place", "value_place")


def probe_range(plan: LayerPlan) -> tuple[int, int, int]:
    """Where the probe window begins and ends, and how many of its tokens decide at least."""
    return plan.probe_start, plan.probe_end, min(LEAST_PROBE, plan.window)


def full_tokens(plan: LayerPlan, request: RequestSpan) -> int:
    """First new tokens of a request that attend with all heads.

    They are the tokens of its prompt up to the probe window's end. Where these are too few to
    decide a membership, there are none: the request runs like one of a static profile from its
    first token on, however its prompt is cut into chunks.
    """
    if request.context_len or not plan.needs_probe:
        return 0
    start, end, least = probe_range(plan)
    first = request.prompt_before(end)
    return first if first - start >= least else 0


class RequestTable:
    """What the model runner knows of requests, and attention backends are not told.

    A request that vLLM preempted starts anew with its prompt and all it has generated. Its
    membership has to be what it was, so what was generated must not be taken for prompt: how long
    the prompt is, only the runner knows.

    Args:
        runner: vLLM's, the older one (``input_batch``) or the newer one (``req_states``).
    """

    def __init__(self, runner: Any):
        self._runner = runner

    @classmethod
    def of_caller(cls) -> RequestTable:
        """The table of the model runner that is calling.

        Raises:
            UnsupportedModelError: no caller is a model runner.
        """
        frame = inspect.currentframe()
        while frame is not None:
            caller = frame.f_locals.get("self")
            older, newer = (getattr(caller, name, None) for name in ("input_batch", "req_states"))
            if hasattr(older, "num_prompt_tokens") or hasattr(newer, "prompt_len"):
                return cls(caller)
            frame = frame.f_back
        raise UnsupportedModelError(
            "online memberships need the lengths of prompts, which this version of vLLM keeps "
            "elsewhere: use a static profile, or a version that docs/serving.md names"
        )

    def prompt_len(self, index: int, req_idx: Any) -> int:
        """Tokens of the prompt of a step's request.

        Args:
            index: the request's place in the step.
            req_idx: ``[B]``, the requests' rows in the runner's table; None where they are the
                step's.
        """
        if req_idx is None:
            return int(self._runner.input_batch.num_prompt_tokens[index])
        return int(self._runner.req_states.prompt_len.np[req_idx[index]])


class FixedMembership:
    """One membership for all requests.

    Args:
        layer: the layer; it has no probe window.
        rows: most requests of a step.
        device: the cache's.
    """

    def __init__(self, layer: LayerShard, rows: int, device: torch.device):
        self._membership = layer.membership(device)
        self._offset: Tensor | None = None
        if layer.plan.has_recent_window:
            offset = windowed.head_offsets(layer.plan.offset_table(device), self._membership)
            self._offset = None if offset is None else offset.repeat(rows, 1)
        self._offsets: dict[int, Tensor] = {}  # views of it, by their rows

    def of(self, pages: Tensor) -> tuple[Membership, Tensor | None]:
        """As `PageMemberships.of`; one row of tables for all."""
        return self._membership, None

    def offsets(self, pages: Tensor) -> Tensor | None:
        """As `PageMemberships.offsets`."""
        if self._offset is None:
            return None
        rows = pages.shape[0]
        found = self._offsets.get(rows)
        if found is None:
            found = self._offsets[rows] = self._offset[:rows]
        return found


class PageMemberships:
    """Tables of one layer with a row per page; only rows of first pages are used.

    Args:
        layer: the layer.
        pages: P, pages of the cache.
        device: the cache's.
    """

    def __init__(self, layer: LayerShard, pages: int, device: torch.device):
        self.layer = layer
        self._range = probe_range(layer.plan)
        fallback = layer.membership(device)
        self._fallback = fallback.representatives  # [1, H]
        if (clustered := layer.plan.clustered) is not None:
            # only these heads get a membership; they are counted among themselves
            inside = {head: number for number, head in enumerate(clustered)}
            own = [[inside[layer.fallback[head]] for head in clustered]]
            self._fallback = torch.tensor(own, device=device)
        self._tables = MembershipTables(
            layer.membership_of(fallback.representatives.repeat(pages, 1)),
            layer.plan.offset_table(device) if layer.plan.has_recent_window else None,
            layer.plan.has_recent_window,
            clustered,
        )
        self._all = self._tables.membership

    def of(self, pages: Tensor) -> tuple[Membership, Tensor | None]:
        """Tables for requests with these first pages, ``[B]`` int32, and which row each has.

        On CUDA the tables are all pages' and stay where they are, for CUDA graphs.
        """
        if pages.is_cuda:
            return self._all, pages
        return self._all.select(pages.long()), None

    def offsets(self, pages: Tensor) -> Tensor | None:
        """``[B, H]`` float32 added to the far keys' log-sum-exp (`windowed`), None for zeros."""
        offset = self._tables.offset
        return None if offset is None else offset.index_select(0, pages)

    def begin(self, step: ChaiMetadata) -> None:
        """Give the known membership to requests that start with too few tokens to decide one."""
        pages = step.undecided_pages(*self._range)
        if pages is not None:
            self._tables.put(pages, self._fallback)

    def probe(
        self, step: ChaiMetadata, query: Tensor, key: Tensor, value: Tensor, scale: float,
        softcap: float | None,
    ) -> None:  # fmt: skip
        """Cluster the heads of the other requests that start, each on its own first tokens.

        Args:
            step: the step.
            query: ``[T, H, D]`` of its tokens.
            key: ``[T, G, D]``.
            value: ``[T, G, Dv]``.
            scale: factor on the scores.
            softcap: as in `ops.reference.clustered_attention`.
        """
        if step.new and (found := step.deciders(*self._range)) is not None:
            representatives = self.layer.plan.packed_representatives(
                query, key, value, found.window, found.real, scale, softcap
            )
            self._tables.put(found.first_pages, representatives)


def row_bytes(layer: LayerShard, head_dim: int) -> int:
    """Bytes that the tables of one page take in a layer; 0 if it decides no memberships.

    Args:
        layer: the layer.
        head_dim: D, by which kernels choose how heads are dealt out.
    """
    plan, rows = layer.plan, 2  # of one, those that all have in common would look like others
    if not plan.needs_probe:
        return 0
    # tables on "meta" have sizes only: those of memberships that only the GPU knows
    member = layer.membership_of(torch.zeros(rows, plan.heads, dtype=torch.long, device="meta"))
    for name in (*_TABLES, *(_WINDOW_TABLES if plan.has_recent_window else ())):
        getattr(member, name)
    made: list[Tensor] = []
    if find_spec("triton") is not None:
        made += _kernel_tables(member, head_dim, plan.has_recent_window)
    made += _own_tables(member)
    each = {id(table): table.nbytes for table in made if table.ndim > 1 and table.stride(0)}
    has_offsets = plan.has_recent_window and (plan.offsets is not None or layer.streaming)
    return sum(each.values()) // rows + (4 * plan.heads if has_offsets else 0)


def _own_tables(member: Membership) -> Iterator[Tensor]:
    """What a membership remembers, and that of its heads which see far keys."""
    for made in vars(member).values():
        if isinstance(made, Tensor):
            yield made
        elif isinstance(made, Membership):
            yield from _own_tables(made)


def _kernel_tables(member: Membership, head_dim: int, has_window: bool) -> Iterator[Tensor]:
    """How kernels deal out heads, in decode and in prefill."""
    from chai_attention.ops.triton import launch_decode, launch_prefill
    from chai_attention.ops.triton.decode import padded
    from chai_attention.ops.triton.head_tiles import (
        head_tiles_of,
        heads_per_tile,
        natural_head_tiles,
    )

    heads = len(member.far_heads)
    decode, prompts = (
        heads_per_tile(heads, member.clusters, columns // padded(head_dim))
        for columns in (launch_decode.COLUMNS, launch_prefill.COLUMNS)
    )
    # with a window a program takes two members at most; on Hopper also where one would do
    sizes = {min(2, prompts), 2} if has_window else {prompts}
    wanted = [
        (head_tiles_of, decode),
        *((make, n) for make in (head_tiles_of, natural_head_tiles) for n in sizes),
    ]
    for make, members in wanted:
        head_tiles = make(member, members)
        for field in fields(head_tiles):
            table = getattr(head_tiles, field.name)
            if isinstance(table, Tensor):
                yield table


def planned_pages(cache: Any, room: int, page: int, row: int) -> int:
    """Pages that vLLM plans at most.

    Args:
        cache: its ``CacheConfig``.
        room: bytes that it may still take.
        page: bytes of a page in all layers of the rank.
        row: bytes of its tables in all of them.
    """
    if cache.num_gpu_blocks_override:
        return int(cache.num_gpu_blocks_override)
    given = getattr(cache, "kv_cache_memory_bytes", None)
    return int(given) // page if given else max(0, room) // (page + row)


def memory_left(config: Any, device: torch.device) -> int | None:
    """Bytes that vLLM may still take, once weights are loaded; None where it does not count them.

    With sleep mode weights have a pool of their own, whose memory nothing else can get later.
    """
    if device.type != "cuda" or getattr(config.model_config, "enable_sleep_mode", False):
        return None
    free, total = torch.cuda.mem_get_info(device)
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(total * config.cache_config.gpu_memory_utilization) - (total - free - idle)
