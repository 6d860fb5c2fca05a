"""vLLM's engine with clustered heads against vLLM as it is and against the Transformers runtime."""

import random
from functools import cache

import pytest
from transformers import AutoConfig

from chai_attention.integrations.vllm.shares import layer_shards
from chai_attention.profile import ClusterProfile
from chai_attention.runtime.shape import describe
from runtime_tokens import narrow_losses, runtime_tokens
from vllm_job import abort, beams, generate, reload
from vllm_profiles import (
    CLUSTERS,
    GROUPED,
    HEADS,
    LAYERS,
    PAGE,
    PROFILES,
    REPRESENTATIVES,
    STATIC,
    prompts_of,
)

# with this seed no two tokens are so equally likely that rounding could tip them
MIXED = prompts_of([120, 10, 33, 64, 11, 90, 47, 80], seed=6)
SHARED = [MIXED[0][: 70 + 9 * extra] for extra in range(4)]  # the first pages are the same
LONG = [MIXED[5][:70]]
TOKENS, FEW, BEAMS = 40, 8, 3
LOCAL = 0.03  # nats by which the last bit of K and V in 8 bits may shift a token
DROPPED = {1: 2, 3: 7, 0: 9, 6: 0}  # prompt: step in which its client goes


def pool_of(kind: str) -> int:
    """Blocks that hold some of the requests at a time, but not all."""
    if not PROFILES[kind].recent:
        return 10
    return 20 if kind == "streaming" else 16


@pytest.fixture(scope="module")
def expected(tiny):
    """What the Transformers runtime generates, by kind of profile."""

    @cache
    def made(kind: str) -> dict[str, list[list[list[int]]]]:
        profile = PROFILES[kind]
        return {
            "mixed": runtime_tokens(tiny, profile, MIXED, TOKENS),
            "shared": runtime_tokens(tiny, profile, SHARED, TOKENS),
            "beams": runtime_tokens(tiny, profile, LONG, FEW, BEAMS),
        }

    return made


@pytest.fixture(scope="module")
def served(engine, tiny):
    """One engine of each kind, through everything that happens to requests, in little memory."""

    @cache
    def made(kind: str):
        profile = PROFILES[kind]
        probed = profile.membership != "static"
        parts = {
            "first": generate(MIXED, TOKENS),
            "shared": generate(SHARED, TOKENS),
            "aborts": abort(MIXED, TOKENS, DROPPED),
            "again": generate(MIXED[:4], TOKENS),
            "samples": generate(MIXED[:1], FEW, n=3),
            "beams": beams(LONG, FEW, BEAMS),
            "reloaded": reload(MIXED[:4], TOKENS, at=9),
            "afterwards": generate(MIXED[:4], TOKENS),
        }
        found = engine(
            tiny, list(parts.values()), profile,
            block_size=PAGE, num_gpu_blocks_override=pool_of(kind),
            # a chunk shorter than the probe window would decide a membership on fewer tokens
            max_num_batched_tokens=512 if probed else 48,
            max_model_len=256,
        )  # fmt: skip
        found["parts"] = dict(zip(parts, found["parts"], strict=True))
        return found

    return made


EVERY = pytest.mark.parametrize("kind", PROFILES)


@EVERY
def test_tokens_are_those_of_the_transformers_runtime(kind, served, expected) -> None:
    found = served(kind)
    assert found["preemptions"] >= 8
    assert found["parts"]["first"]["ids"] == expected(kind)["mixed"]
    # hits of pages that another request writes in the same step
    assert found["parts"]["shared"]["ids"] == expected(kind)["shared"]
    assert found["parts"]["shared"]["cached"][1:] == [64, 64, 64]
    assert found["parts"]["again"]["ids"] == expected(kind)["mixed"][:4]


@EVERY
def test_aborts_in_flight_disturb_nobody(kind, served, expected) -> None:
    found = served(kind)
    assert found["parts"]["aborts"]["ids"] == [
        None if row in DROPPED else ids for row, ids in enumerate(expected(kind)["mixed"])
    ]
    assert found["free"] == [pool_of(kind) - 1] * 2  # all but the page that is nobody's


@EVERY
def test_memory_for_memberships_is_counted_before_pages_are(kind, served) -> None:
    found = served(kind)
    # `vllm_job` says how much there is, as on a GPU
    assert found["counted"] == (PROFILES[kind].membership != "static")
    assert not found["held"]


@EVERY
def test_weights_that_are_loaded_anew_change_no_token(kind, served, expected) -> None:
    parts = served(kind)["parts"]
    for part in ("reloaded", "afterwards"):  # with requests under way, and none
        assert parts[part]["ids"] == expected(kind)["mixed"][:4]


@EVERY
def test_samples_and_beams_share_the_pages_of_a_prompt(kind, served, expected) -> None:
    parts = served(kind)["parts"]
    assert parts["samples"]["ids"] == [[expected(kind)["mixed"][0][0][:FEW]] * 3]
    assert parts["beams"]["ids"] == expected(kind)["beams"]


@pytest.mark.parametrize("name", ["tiny", "smollm2"])
def test_without_clusters_tokens_are_those_of_vllm(name, engine, request) -> None:
    model = request.getfixturevalue(name)
    heads, layers, vocabulary = (HEADS, LAYERS, 256) if name == "tiny" else (9, 30, 49000)
    parts = [generate(prompts_of([1, 5, 70, 33, 200], vocabulary), 12)]
    plain = engine(model, parts)
    own = engine(model, parts, ClusterProfile((heads,) * layers), own=True)
    assert own["parts"] == plain["parts"]
    assert own["blocks"] == plain["blocks"]  # the same pages
    if name == "tiny":  # layers without clusters are left to vLLM's own attention
        mixed = engine(model, parts, ClusterProfile((heads,) * layers))
        assert mixed["parts"] == plain["parts"]


def test_short_first_chunks_and_prompts(engine, tiny) -> None:
    prompts = prompts_of([81, 1, 2, 3, 4, 5, 6, 40])
    # 5 tokens decide at least; with fewer, the known costs do
    found = engine(tiny, [generate(prompts, 20)] * 2, PROFILES["blend"], max_num_batched_tokens=42,
                   block_size=PAGE, enable_prefix_caching=False)  # fmt: skip
    for part in found["parts"]:
        assert all(len(ids[0]) == 20 for ids in part["ids"])
    # fewer run like those of a static profile: of what is known of the heads' likeness
    alike = [[[float(a == b) for b in rep] for a in rep] for rep in REPRESENTATIVES]
    short = ClusterProfile(CLUSTERS, window=8, similarity=alike)
    few = [*prompts_of([4, 3, 2, 4, 3]), [7], [9]]
    wanted = runtime_tokens(tiny, STATIC, few, 20)
    # chunks end within prompts
    found = engine(tiny, [generate(few, 20)], short, block_size=PAGE, max_num_batched_tokens=9)
    assert found["parts"][0]["ids"] == wanted


@pytest.mark.parametrize("kind", ["online", "blend"])
def test_what_short_prompts_decided_is_no_prefix_of_longer_ones(kind, engine, tiny):
    # chats that begin with less than a probe window, are scored with their answer (which computes
    # all of it anew), and go on: the last turn finds pages of the turns before it
    begun = prompts_of([9, 8, 7, 6, 5, 6, 7, 9], seed=9)
    rest = prompts_of([90] * len(begun), seed=10)
    first = engine(
        tiny, [generate(begun, 40)], PROFILES[kind], block_size=PAGE
    )["parts"][0]["ids"]  # fmt: skip
    chats = [
        [*chat, *answer[0][: PAGE + 8], *more]
        for chat, answer, more in zip(begun, first, rest, strict=True)
    ]
    last = [[*chat, 5] for chat in chats]
    # one after the other, as they would disturb each other's order
    parts = [
        part
        for chat, scored, turn in zip(begun, chats, last, strict=True)
        for part in (
            generate([chat], 40), generate([scored], 1, scored=True), generate([turn], 20)
        )
    ]  # fmt: skip
    found = engine(tiny, parts, PROFILES[kind], block_size=PAGE)["parts"]
    assert all(turn["cached"] == [4 * PAGE] for turn in found[2::3])  # caching goes on
    assert [turn["ids"][0] for turn in found[2::3]] == runtime_tokens(
        tiny, PROFILES[kind], last, 20
    )


@pytest.mark.parametrize("kind", ["online", "blend", "online window"])
def test_preemption_does_not_change_what_a_short_prompt_decided(kind, engine, tiny):
    # a preempted request starts anew with all it has generated, which is more than its prompt
    # and, in the end, more than the probe window
    short = prompts_of([40, 1, 2, 3, 4, 5, 6, 7], seed=6)
    alone = [generate([prompt], 40) for prompt in short]
    # the prompt of 40 tokens would begin with a chunk of 6, which decide another membership
    crowd = generate([*prompts_of([100, 90, 60], seed=5), *short], 40)
    found = engine(
        tiny, [*alone, crowd], PROFILES[kind], block_size=PAGE, num_gpu_blocks_override=15,
        max_num_seqs=12, enable_prefix_caching=False, max_model_len=192,
        enable_chunked_prefill=False, max_num_batched_tokens=256,
    )  # fmt: skip
    assert found["preemptions"] >= 4
    *apart, crowded = (part["ids"] for part in found["parts"])
    assert crowded[3:] == [ids[0] for ids in apart]


@pytest.mark.parametrize(
    "options",
    [
        {},
        # vLLM's runner for CPUs can only split layers if it compiles; by what does not matter
        {"pipeline_parallel_size": 2, "compilation_config": {"backend": "eager"}},
    ],
    ids=["one process", "two ranks"],
)
def test_graph_compilation_and_ranks_of_a_pipeline_change_nothing(options, engine, tiny) -> None:
    prompts = prompts_of([60, 20])
    found = engine(
        tiny, [generate(prompts, 12)], STATIC, block_size=PAGE, enforce_eager=False, **options
    )
    assert found["parts"][0]["ids"] == runtime_tokens(tiny, STATIC, prompts, 12)


def test_clients_that_leave_a_pipeline_cost_nobody_the_recent_window(engine, tiny) -> None:
    # steps that only some of the running ones take part in
    profile, prompts = PROFILES["static window"], MIXED * 2
    found = engine(
        tiny, [abort(prompts, 20, {0: 3, 2: 5, 5: 12, 6: 14, 9: 20, 12: 30})], profile,
        block_size=PAGE, pipeline_parallel_size=2, max_num_seqs=4, enforce_eager=False,
        compilation_config={"backend": "eager"},
    )  # fmt: skip
    wanted = runtime_tokens(tiny, profile, MIXED, 20) * 2
    stayed = found["parts"][0]["ids"]
    assert sum(ids is not None for ids in stayed) >= 10
    for ids, expected in zip(stayed, wanted, strict=True):
        assert ids is None or ids == expected


def test_tensor_parallel_ranks_cluster_their_own_heads(engine, tiny) -> None:
    # clusters that lie across ranks are taken apart: the same as a profile that never had them
    shape = describe(AutoConfig.from_pretrained(tiny))
    ranks = [layer_shards(shape, STATIC, 2, rank) for rank in range(2)]
    rep = [
        [*low.fallback, *(head + HEADS // 2 for head in high.fallback)]
        for low, high in zip(*ranks, strict=True)
    ]
    apart = ClusterProfile(tuple(len(set(each)) for each in rep), "static", representatives=rep)
    assert apart.clusters != STATIC.clusters
    prompts = prompts_of([5, 40, 130, 17])
    found = engine(tiny, [generate(prompts, 16)], STATIC, block_size=PAGE, tensor_parallel_size=2)
    assert found["parts"][0]["ids"] == runtime_tokens(tiny, apart, prompts, 16)


@pytest.mark.parametrize("kind", list(GROUPED))
def test_grouped_queries_through_hits_preemption_and_chunks(kind, engine, tiny_grouped):
    profile = GROUPED[kind]
    parts = {
        "first": generate(MIXED, TOKENS), "shared": generate(SHARED, TOKENS),
        "samples": generate(MIXED[:1], FEW, n=3), "again": generate(MIXED[:4], TOKENS),
    }  # fmt: skip
    found = engine(
        tiny_grouped, list(parts.values()), profile, block_size=PAGE,
        num_gpu_blocks_override=16, max_model_len=256,
        max_num_batched_tokens=512 if kind == "online" else 48,
    )  # fmt: skip
    ids = {name: part["ids"] for name, part in zip(parts, found["parts"], strict=True)}
    wanted = runtime_tokens(tiny_grouped, profile, MIXED, TOKENS)
    assert found["preemptions"] >= 4
    assert ids["first"] == wanted
    assert ids["shared"] == runtime_tokens(tiny_grouped, profile, SHARED, TOKENS)
    assert found["parts"][1]["cached"][1:] == [64, 64, 64]
    assert ids["samples"] == [[wanted[0][0][:FEW]] * 3]
    assert ids["again"] == wanted[:4]


@pytest.mark.parametrize(
    "kind", ["static", "static window", "online", "streaming", "online streaming"]
)
def test_draft_tokens_of_n_grams(kind, engine, tiny) -> None:
    prompts = [prompts_of([12])[0] * 4, prompts_of([30], seed=5)[0]]
    profile = PROFILES[kind]
    found = engine(
        tiny, [generate(prompts, 30)], profile, block_size=PAGE,
        speculative_config={
            "method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3,
        },
    )  # fmt: skip
    assert found["parts"][0]["ids"] == runtime_tokens(tiny, profile, prompts, 30)
    if "streaming" not in kind:  # the planner gives the blocks of the formula
        page = PAGE * 64 * 4 * sum(k + HEADS for k in CLUSTERS)
        assert found["blocks"] == 2**30 // page


@pytest.mark.parametrize(
    "kind",
    ["static", "online", "static window", "streaming", "online window", "online streaming"],
)
def test_pages_of_8_bits(kind, engine, tiny) -> None:
    profile = PROFILES[kind]
    found = engine(
        tiny, [generate(MIXED, TOKENS), generate(SHARED, TOKENS)], profile, own=True,
        kv_cache_dtype="fp8", block_size=PAGE,
        num_gpu_blocks_override=pool_of(kind), max_model_len=256,
        max_num_batched_tokens=512 if profile.membership != "static" else 48,
    )  # fmt: skip
    assert found["preemptions"] >= 1
    assert found["parts"][1]["cached"][1:] == [64, 64, 64]
    # chunks and prefix hits behind a context read copies
    copied, refused = found["copied"]
    assert copied >= 2  # the layers with clusters
    assert not refused
    for part, prompts in zip(found["parts"], (MIXED, SHARED), strict=True):
        assert max(narrow_losses(tiny, profile, prompts, part["ids"])) < LOCAL


@pytest.mark.parametrize("kind", ["static window", "streaming"])
def test_chunks_of_a_long_prompt_read_copies_of_8_bit_pages(kind, engine, tiny) -> None:
    # beside decodes, and beside each other; the window's pages before a chunk are given back
    prompts = prompts_of([260, 30, 300, 7, 190], seed=8)
    found = engine(
        tiny, [generate(prompts, FEW)], PROFILES[kind], own=True,
        kv_cache_dtype="fp8", block_size=PAGE, max_num_batched_tokens=96,
    )  # fmt: skip
    copied, refused = found["copied"]
    assert copied >= 5 * 2  # steps, and the layers with clusters
    assert not refused
    assert max(narrow_losses(tiny, PROFILES[kind], prompts, found["parts"][0]["ids"])) < LOCAL


@pytest.mark.parametrize("kind", ["static", "static window", "online"])
def test_scales_of_8_bit_pages_change_no_token(kind, engine, tiny) -> None:
    # by powers of two K and V round to the same numbers
    prompts = MIXED[:5]
    found = engine(
        tiny, [generate(prompts, FEW)], PROFILES[kind], own=True,
        scales=(0.5, 4.0), kv_cache_dtype="fp8", block_size=PAGE, enable_prefix_caching=False,
    )  # fmt: skip
    losses = narrow_losses(tiny, PROFILES[kind], prompts, found["parts"][0]["ids"])
    assert max(losses) < LOCAL


def test_pages_of_8_bits_are_half_as_large(engine, tiny) -> None:
    parts = [generate(prompts_of([60, 20]), FEW)]
    options = {"kv_cache_dtype": "fp8", "block_size": PAGE}
    found = engine(tiny, parts, STATIC, own=True, **options)
    assert found["blocks"] == 2**30 // (PAGE * 64 * sum(k + HEADS for k in CLUSTERS))
    # layers without clusters run vLLM's own attention where that reads 8 bits
    plain = engine(tiny, parts, **options)
    mixed = engine(tiny, parts, ClusterProfile((HEADS,) * LAYERS), **options)
    assert mixed["parts"] == plain["parts"]
    assert mixed["blocks"] == plain["blocks"]


def test_real_multi_head_model(engine, shared) -> None:
    folder = shared / "models" / "mha-lm"  # its heads of size 48 are more than vLLM's CPU has
    chosen = random.Random(4)
    reps = []
    for _ in range(14):
        some = sorted(chosen.sample(range(16), 8))
        reps.append([head if head in some else chosen.choice(some) for head in range(16)])
    profile = ClusterProfile((8,) * 14, "static", representatives=reps, recent=32, sinks=4)
    prompts = prompts_of([100, 20], 16000)
    found = engine(folder, [generate(prompts, 16)], profile)
    assert found["parts"][0]["ids"] == runtime_tokens(folder, profile, prompts, 16)


def test_grouped_queries_of_a_real_model(engine, smollm2) -> None:
    chosen = random.Random(4)
    reps = []
    for _ in range(30):
        some = sorted(chosen.sample(range(9), 6))
        reps.append([head if head in some else chosen.choice(some) for head in range(9)])
    profile = ClusterProfile((6,) * 30, "static", representatives=reps)
    prompts = prompts_of([40, 20], 49000)
    found = engine(smollm2, [generate(prompts, 12)], profile)
    assert found["parts"][0]["ids"] == runtime_tokens(smollm2, profile, prompts, 12)


def test_what_cannot_run_stops_with_one_line(engine, tiny) -> None:
    for profile, options, line in (
        (
            PROFILES["static window"],
            {"disable_hybrid_kv_cache_manager": True},
            "leave out --disable-hybrid-kv-cache-manager",
        ),
        (STATIC, {"kv_cache_dtype": "fp8_e5m2"}, "K,V cache of fp8_e5m2"),
        (STATIC, {"block_size": 24}, "--block-size takes multiples of 16"),
        (ClusterProfile((8, 8)), {}, "2 layers in the profile, 3 in the model"),
    ):
        with pytest.raises(RuntimeError, match=line):
            engine(tiny, [generate([[5]], 1)], profile, **options)
