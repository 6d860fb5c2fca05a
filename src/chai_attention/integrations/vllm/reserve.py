"""Memory for the tables of online memberships, held while vLLM plans its pages.

Every page has a row of tables in every layer that decides memberships (`PageMemberships`). They
are made when the pages are there, from what vLLM left. So as much as they will take is held from
when the weights are loaded, which vLLM counts, until they are made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from chai_attention.integrations.vllm.layers import ServedLayer
from chai_attention.membership import Membership

# all that is made of a membership for pages, prompts and exact windows
_TABLES = ("slot_heads", "key_heads", "value_heads", "value_slot", "key_slot")
_WINDOW_TABLES = ("removed_key_heads", "removed_value_heads", "key_place", "value_place")


def row_bytes(layer: ServedLayer, head_dim: int) -> int:
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
    from chai_attention.ops.triton import launch_decode, prefill
    from chai_attention.ops.triton.chunks import chunks_of, members_of
    from chai_attention.ops.triton.decode import padded
    from chai_attention.ops.triton.paged_prefill import natural_chunks

    heads = len(member.far_heads)
    decode, prompts = (
        members_of(heads, member.clusters, columns // padded(head_dim))
        for columns in (launch_decode.COLUMNS, prefill.COLUMNS)
    )
    # with a window a program takes two members at most; on Hopper also where one would do
    sizes = {min(2, prompts), 2} if has_window else {prompts}
    wanted = [
        (chunks_of, decode),
        *((make, n) for make in (chunks_of, natural_chunks) for n in sizes),
    ]
    for make, members in wanted:
        chunks = make(member, members)
        for field in fields(chunks):
            table = getattr(chunks, field.name)
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


def room(config: Any, device: torch.device) -> int | None:
    """Bytes that vLLM may still take, once weights are loaded; None where it does not count them.

    With sleep mode weights have a pool of their own, whose memory nothing else can get later.
    """
    if device.type != "cuda" or getattr(config.model_config, "enable_sleep_mode", False):
        return None
    free, total = torch.cuda.mem_get_info(device)
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(total * config.cache_config.gpu_memory_utilization) - (total - free - idle)
