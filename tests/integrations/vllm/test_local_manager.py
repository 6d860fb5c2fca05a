"""Which local pages vLLM keeps, gives back and finds again, by its own manager of pages."""

import pickle
import random

import pytest
import torch

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, SlidingWindowManager
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import Request

from chai_attention.integrations.vllm.kv_cache import (
    FarManager,
    LocalManager,
    LocalSpec,
    far_pages,
)

FAR, LOCAL, HASH, HIT = 32, 48, 16, 96  # tokens of pages, of their hashes, and between hits
RECENT = 50
HEADS = {"num_kv_heads": 2, "head_size": 8, "dtype": torch.float32}


def local_spec(sinks: int, probe: int = 0, recent: int = RECENT) -> LocalSpec:
    return LocalSpec(
        block_size=LOCAL, sliding_window=recent, sinks=sinks, probe_end=probe, num_head_slots=1,
        state_content_bytes=64, **HEADS,
    )  # fmt: skip


def manager_of(sinks: int, blocks: int = 200, probe: int = 0, caching: bool = True):
    far = far_pages(FullAttentionSpec(block_size=FAR, **HEADS), probe)
    made = managed(far, local_spec(sinks, probe), blocks, caching)
    assert isinstance(local_of(made), LocalManager)
    return made


def managed(far: FullAttentionSpec, local: SlidingWindowSpec, blocks: int, caching: bool = True):
    groups = [KVCacheGroupSpec(["far"], far), KVCacheGroupSpec(["local"], local)]
    config = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=groups)
    return KVCacheManager(
        config, 4096, HIT, HASH if caching else HIT, enable_caching=caching, max_in_flight_tokens=64
    )


def local_of(manager: KVCacheManager) -> LocalManager:
    found: LocalManager = manager.coordinator.single_type_managers[1]
    return found


def request(name: str, tokens: list[int]) -> Request:
    init_none_hash(hash)
    return Request(
        name, tokens, SamplingParams(max_tokens=1000), None,
        block_hasher=get_request_block_hasher(HASH, pickle.dumps),
    )  # fmt: skip


def begin(manager: KVCacheManager, new: Request, chunk: int) -> int:
    """Take what is found and a first chunk behind it; returns the tokens found."""
    blocks, found = manager.get_computed_blocks(new)[:2]
    assert manager.allocate_slots(new, chunk, found, blocks) is not None
    new.num_computed_tokens += chunk + found
    return found


def go_on(manager: KVCacheManager, running: Request, chunk: int) -> None:
    """Compute more of the prompt, or generate."""
    if running.num_computed_tokens >= running.num_tokens:
        running.append_output_token_ids([7] * chunk)
    assert manager.allocate_slots(running, chunk) is not None
    running.num_computed_tokens += chunk


def held(manager: KVCacheManager, name: str) -> list[bool]:
    """Which of a request's local pages are its own."""
    return [not page.is_null for page in local_of(manager).req_to_blocks[name]]


@pytest.mark.parametrize("sinks", [0, 4, 48, 60])
@pytest.mark.parametrize("caching", [True, False])
def test_pages_between_the_first_tokens_and_the_window_are_given_back(sinks, caching) -> None:
    manager = manager_of(sinks, caching=caching)
    one = request("a", list(range(500)))
    begin(manager, one, 10)
    for chunk in (90, 200, 100, 100, *[1] * 100):
        computed = one.num_computed_tokens  # when the step is planned
        go_on(manager, one, chunk)
        first = -(-sinks // LOCAL)
        seen = max(0, computed - RECENT + 1) // LOCAL  # the next token sees from here on
        for index, own in enumerate(held(manager, "a")):
            assert own == (index < first or index >= seen)
    most = local_of(manager).kv_cache_spec.max_admission_blocks_per_request(200, 4096)
    assert sum(held(manager, "a")) <= most
    manager.free(one)
    assert manager.block_pool.get_num_free_blocks() == 199


@pytest.mark.parametrize("sinks", [0, 4, 60])
def test_a_prefix_is_found_with_its_first_pages_and_those_of_the_window(sinks) -> None:
    manager = manager_of(sinks)
    tokens = list(range(400))
    one = request("a", tokens)
    begin(manager, one, 400)
    go_on(manager, one, 1)
    two = request("b", [*tokens[:300], *[9] * 50])
    assert begin(manager, two, 20) == 288  # whole pages of both kinds
    first = -(-sinks // LOCAL)
    # behind position 287 the next one sees 239 and later ones
    assert held(manager, "b") == [
        index < first or index >= (288 - RECENT + 1) // LOCAL for index in range(7)
    ]
    mine, others = (local_of(manager).req_to_blocks[name] for name in "ba")
    for index in range(first):
        assert mine[index] is others[index]
        assert mine[index].ref_cnt == 2
    manager.free(one)
    manager.free(two)
    assert manager.block_pool.get_num_free_blocks() == 199
    assert begin(manager, request("c", tokens), 16) == 384  # of those that have ended, too


def test_without_its_first_page_no_prefix_is_found() -> None:
    for sinks in (4, 0):
        manager = manager_of(sinks)
        tokens = list(range(400))
        one = request("a", tokens)
        begin(manager, one, 400)
        first = local_of(manager).req_to_blocks["a"][0]
        assert manager.block_pool._maybe_evict_cached_block(first)
        found = manager.get_computed_blocks(request("b", tokens))[1]
        assert found == (0 if sinks else 384)


def test_first_pages_are_kept_out_of_what_is_free_before_they_are_taken() -> None:
    # a request that finds pages which nobody holds takes them out of the free ones
    manager = manager_of(4)
    one = request("a", list(range(400)))
    begin(manager, one, 400)
    manager.free(one)
    two = request("b", list(range(400)))
    blocks, found = manager.get_computed_blocks(two)[:2]
    counted = manager.coordinator.get_num_blocks_to_allocate(
        "b", 400, blocks.blocks, 0, found, found, 400
    )
    before = manager.block_pool.get_num_free_blocks()
    assert manager.allocate_slots(two, 400 - found, found, blocks) is not None
    assert before - manager.block_pool.get_num_free_blocks() == counted


def test_hasty_decisions_are_found_in_neither_kind_of_pages() -> None:
    manager = manager_of(4, probe=20)
    tokens = list(range(300))
    one = request("a", tokens)
    begin(manager, one, 19)
    go_on(manager, one, 281)
    assert manager.get_computed_blocks(request("b", tokens))[1] == 0
    assert not any(page.block_hash for page in local_of(manager).req_to_blocks["a"])
    # a first chunk that is shorter than what hits are aligned to decides as well as any
    two = request("c", tokens)
    begin(manager, two, 20)
    go_on(manager, two, 280)
    assert manager.get_computed_blocks(request("d", tokens))[1] == 288


def test_requests_at_random_leave_no_page_behind() -> None:
    chosen = random.Random(3)
    manager = manager_of(4, blocks=40)
    texts = [[chosen.randrange(50) for _ in range(300)] for _ in range(3)]
    running: list[Request] = []
    found = 0
    for number in range(400):
        some = [*chosen.choice(texts)[: chosen.randint(1, 300)], number]
        new = request(str(number), some)
        blocks, hits = manager.get_computed_blocks(new)[:2]
        chunk = min(chosen.randint(1, 120), len(some) - hits)
        if manager.allocate_slots(new, chunk, hits, blocks) is None:
            manager.free(running.pop(chosen.randrange(len(running))))
            continue
        found += hits
        new.num_computed_tokens += chunk + hits
        running.append(new)
        for one in list(running):
            if chosen.random() < 0.2:
                manager.free(one)
                running.remove(one)
            elif one.num_computed_tokens < one.num_tokens:
                left = one.num_tokens - one.num_computed_tokens
                if manager.allocate_slots(one, left) is None:
                    manager.free(one)
                    running.remove(one)
                else:
                    one.num_computed_tokens += left
    assert found > 5000
    for one in running:
        manager.free(one)
    assert manager.block_pool.get_num_free_blocks() == 39
    assert not local_of(manager).req_to_blocks


def state(manager: KVCacheManager) -> list[object]:
    """All that the managers of both kinds of pages know of requests, and what is free."""
    single = manager.coordinator.single_type_managers
    held = [
        {name: [page.block_id for page in pages] for name, pages in one.req_to_blocks.items()}
        for one in single
    ]
    cached = [dict(one.num_cached_block) for one in single]
    return [held, cached, manager.block_pool.get_num_free_blocks()]


class Twice:
    """Asks two managers of pages the same, who have to give the same answers."""

    def __init__(self, ours: KVCacheManager, theirs: KVCacheManager):
        self.both = ours, theirs
        self.running: dict[str, tuple[Request, Request]] = {}
        self.refused = self.found = self.grown = 0

    def agree(self, results: list[object]) -> object:
        assert results[0] == results[1]
        assert state(self.both[0]) == state(self.both[1])
        return results[0]

    def begin(self, name: str, tokens: list[int], chunk: int) -> None:
        new = request(name, tokens), request(name, tokens)
        hits = [one.get_computed_blocks(own) for one, own in zip(self.both, new, strict=True)]
        found = self.agree([hit[1] for hit in hits])
        chunk = min(chunk, len(tokens) - found)
        made = [
            one.allocate_slots(own, chunk, found, hit[0], full_sequence_must_fit=True)
            for one, own, hit in zip(self.both, new, hits, strict=True)
        ]
        if self.agree([one and one.get_block_ids() for one in made]) is None:
            self.refused += 1
            return
        self.found += found
        self.running[name] = new
        for own in new:
            own.num_computed_tokens += found + chunk

    def go_on(self, name: str, chunk: int, drafts: int, in_flight: int) -> bool:
        """Compute ``chunk`` tokens; False if there is no room."""
        new = self.running[name]
        made = []
        for one, own in zip(self.both, new, strict=True):
            own.num_in_flight_tokens = in_flight
            if own.num_computed_tokens >= own.num_tokens:
                own.append_output_token_ids([7] * chunk)
            made.append(one.allocate_slots(own, chunk, num_lookahead_tokens=drafts))
        pages = self.agree([one and one.get_block_ids() for one in made])
        if pages is None:
            return False
        self.grown += any(pages)
        for one, own in zip(self.both, new, strict=True):
            own.num_computed_tokens += chunk
            one.cache_blocks(own, own.num_computed_tokens)
        self.agree([None, None])
        return True

    def end(self, name: str) -> None:
        for one, own in zip(self.both, self.running.pop(name), strict=True):
            one.free(own)
        self.agree([None, None])


@pytest.mark.parametrize("caching", [True, False])
def test_answers_at_once_are_those_of_vllms_own_managers(caching) -> None:
    chosen = random.Random(5)
    far = FullAttentionSpec(block_size=FAR, **HEADS)
    window = SlidingWindowSpec(block_size=LOCAL, sliding_window=RECENT, **HEADS)
    ours = managed(far_pages(far, 0), local_spec(sinks=0), 60, caching)
    theirs = managed(far, window, 60, caching)
    for made, kinds in (
        (ours, [FarManager, LocalManager]),
        (theirs, [FullAttentionManager, SlidingWindowManager]),
    ):
        assert [type(one) for one in made.coordinator.single_type_managers] == kinds
    twice = Twice(ours, theirs)
    texts = [[chosen.randrange(50) for _ in range(300)] for _ in range(3)]
    steps = 0
    for number in range(400):
        if len(twice.running) < 8:
            some = [*chosen.choice(texts)[: chosen.randint(1, 300)], number]
            twice.begin(str(number), some, chosen.randint(1, 120))
        for name in list(twice.running):
            own = twice.running[name][0]
            left = own.num_tokens - own.num_computed_tokens
            chunk = min(left, chosen.randint(1, 120)) if left > 0 else 1
            drafts = chosen.choice([0, 0, 0, 3])
            room = twice.go_on(name, chunk, drafts, chosen.choice([0, 1, chunk]))
            steps += room
            if not room or chosen.random() < 0.03:  # preempted, or it has ended
                twice.refused += not room
                twice.end(name)
    assert steps > 2000
    assert twice.grown < steps // 4  # most need no page
    assert twice.refused > 5
    assert twice.found > (3000 if caching else -1)
    for name in list(twice.running):
        twice.end(name)
    assert ours.block_pool.get_num_free_blocks() == 59
