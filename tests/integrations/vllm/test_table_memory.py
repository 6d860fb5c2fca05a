"""Memory of membership tables, which vLLM has to know of before it plans; no vLLM needed."""

from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from chai_attention.integrations.vllm.layers import LayerShard
from chai_attention.integrations.vllm.memberships import PageMemberships, planned_pages, row_bytes
from chai_attention.membership import Membership
from chai_attention.runtime.plan import LayerPlan

PAGES, DIM = 37, 64


@pytest.mark.parametrize(
    ("window", "streaming"), [(0, ()), (4, ()), (4, (2, 3, 6, 7))], ids=["", "window", "streaming"]
)
@pytest.mark.parametrize(
    ("heads", "groups", "clusters", "target"),
    [(12, 12, 5, "scores"), (8, 4, 2, "k-bytes"), (32, 32, 8, "scores")],
)
def test_what_is_counted_is_what_tables_of_all_pages_take(
    heads, groups, clusters, target, window, streaming, monkeypatch
) -> None:
    head_tiles = pytest.importorskip("chai_attention.ops.triton.head_tiles")
    # on a GPU the host does not know who is in which cluster
    monkeypatch.setattr(Membership, "known_rows", None)
    table = tuple(tuple(float(a != b) for b in range(heads)) for a in range(heads))
    plan = LayerPlan(
        0, heads, groups, clusters, 8, target, recent=window, sinks=1 if window else 0,
        offsets=table if window else None, streaming=streaming,
    )  # fmt: skip
    kept = clusters * groups // heads if target == "k-bytes" else clusters
    unit = heads // groups if target == "k-bytes" else 1
    far = [head for head in range(heads) if head not in streaming]
    own = far[:clusters]
    rep = tuple(
        head if head in own or head in streaming else own[head % unit] for head in range(heads)
    )
    layer = LayerShard(plan, kept, rep)
    pages = PageMemberships(layer, PAGES, torch.device("cpu"))
    member = pages._all
    # what writing, decode, prefill and windows read
    names = ["slot_heads", "key_heads", "value_heads", "value_slot", "key_slot"]
    for name in [*names, *(["key_place", "value_place"] if window else [])]:
        getattr(member, name)
    wide = 64
    decode, prompts = (
        head_tiles.heads_per_tile(len(far), clusters, n // wide) for n in (1024, 256)
    )
    prompts = min(2, prompts) if window else prompts
    head_tiles.head_tiles_of(member, decode)
    head_tiles.head_tiles_of(member, prompts)
    head_tiles.natural_head_tiles(member, prompts)
    if window:
        head_tiles.natural_head_tiles(member, 2)
    made = [*vars(member).values(), *vars(member.far or member).values(), pages._tables.offset]
    for held in member.derived.values():
        made += [getattr(held, field.name) for field in fields(held)]
    tables = [one for one in made if isinstance(one, Tensor) and one.ndim > 1]  # with a row a page
    sizes = {id(one): one.nbytes for one in tables if one.stride(0)}
    taken = sum(sizes.values())
    assert taken <= PAGES * row_bytes(layer, DIM) <= 1.3 * taken


def test_layers_that_decide_nothing_need_no_tables() -> None:
    rep = (0, 1, 0, 1)
    assert row_bytes(LayerShard(LayerPlan(0, 4, 4, 2, 8, "scores", rep), 2, rep), DIM) == 0
    assert row_bytes(LayerShard(LayerPlan(0, 4, 4, 4, 8, "scores"), 4, rep), DIM) == 0


def test_pages_and_their_tables_share_what_is_left() -> None:
    cache = SimpleNamespace(num_gpu_blocks_override=None, kv_cache_memory_bytes=None)
    assert planned_pages(cache, 1_000_000, 900, 100) == 1000
    assert planned_pages(cache, -5, 900, 100) == 0
    cache.kv_cache_memory_bytes = 900_000  # for pages alone
    assert planned_pages(cache, 1, 900, 100) == 1000
    cache.num_gpu_blocks_override = 7
    assert planned_pages(cache, 1, 900, 100) == 7
