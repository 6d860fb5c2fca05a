"""vLLM's engine with clustered heads against vLLM as it is and against the Transformers runtime."""

import random

import pytest

from chai_attention.profile import ClusterProfile
from runtime_tokens import runtime_tokens

HEADS, LAYERS, PAGE = 8, 3, 32
CLUSTERS = (3, 8, 5)
REPRESENTATIVES = [[0, 1, 0, 3, 1, 1, 3, 0], list(range(8)), [0, 1, 2, 3, 4, 0, 3, 2]]


def prompts_of(sizes: list[int], vocabulary: int = 256, seed: int = 0) -> list[list[int]]:
    chosen = random.Random(seed)
    return [[chosen.randrange(3, vocabulary) for _ in range(size)] for size in sizes]


def table(seed: int) -> list[list[list[float]]]:
    chosen = random.Random(seed)
    heads = range(HEADS)
    return [
        [[0.0 if a == b else chosen.random() for b in heads] for a in heads] for _ in range(LAYERS)
    ]


STATIC = ClusterProfile(CLUSTERS, "static", representatives=REPRESENTATIVES)
ONLINE = ClusterProfile(CLUSTERS, window=8)
WINDOW = {"recent": 9, "sinks": 3, "offsets": table(1)}
PROFILES = {
    "static": STATIC,
    "online": ONLINE,
    "blend": ClusterProfile(
        CLUSTERS, "blend", window=8, probe_start=2, features="value", blend=1.0, costs=table(2)
    ),
    "static window": ClusterProfile(CLUSTERS, "static", representatives=REPRESENTATIVES, **WINDOW),
    "online window": ClusterProfile(CLUSTERS, window=8, **WINDOW),
}


@pytest.mark.parametrize("name", ["tiny", "smollm2"])
def test_without_clusters_tokens_are_those_of_vllm(name, engine, request) -> None:
    model = request.getfixturevalue(name)
    heads, layers, vocabulary = (HEADS, LAYERS, 256) if name == "tiny" else (9, 30, 49000)
    batches = [prompts_of([1, 5, 70, 33, 200], vocabulary)]
    plain = engine(model, batches, 12)
    own = engine(model, batches, 12, ClusterProfile((heads,) * layers), own=True)
    assert own["batches"] == plain["batches"]
    assert own["blocks"] == plain["blocks"]  # the same pages
    if name == "tiny":  # layers without clusters are left to vLLM's own attention
        mixed = engine(model, batches, 12, ClusterProfile((heads,) * layers))
        assert mixed["batches"] == plain["batches"]


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "together"])
@pytest.mark.parametrize("kind", PROFILES)
def test_tokens_are_those_of_the_transformers_runtime(kind, together, engine, tiny) -> None:
    profile = PROFILES[kind]
    window, probed = profile.recent > 0, profile.membership != "static"
    mixed = prompts_of([120, 10, 33, 64, 11, 90, 47, 80])
    shared = [mixed[0][: 70 + 9 * extra] for extra in range(4)]  # the first pages are the same
    tokens = 40
    wanted = {
        name: runtime_tokens(tiny, profile, prompts, tokens)
        for name, prompts in (("mixed", mixed), ("shared", shared))
    }
    # a chunk shorter than the probe window would decide a membership on fewer tokens
    chunk = 512 if probed else 48
    found = engine(
        tiny, [mixed, shared, mixed], tokens, profile,
        block_size=PAGE, num_gpu_blocks_override=10, max_num_batched_tokens=chunk,
        enable_prefix_caching=not window, max_model_len=256, together=together,
    )  # fmt: skip
    first, hits, again = found["batches"]
    assert found["preemptions"] >= 8
    assert first["ids"] == wanted["mixed"]
    assert hits["ids"] == wanted["shared"]
    assert again["ids"] == wanted["mixed"]
    if not window:  # also hits of pages that another request writes in the same step
        assert hits["cached"][1:] == [64, 64, 64]


def test_short_first_chunks_and_prompts(engine, tiny) -> None:
    prompts = prompts_of([81, 1, 2, 3, 4, 5, 6, 40])
    # 5 tokens decide at least; with fewer, the known costs do
    found = engine(tiny, [prompts, prompts], 20, PROFILES["blend"], max_num_batched_tokens=42,
                   block_size=PAGE, enable_prefix_caching=False)  # fmt: skip
    for batch in found["batches"]:
        assert all(len(ids[0]) == 20 for ids in batch["ids"])
    # one token has no attention to share, so that only the fallback is left: what is known of the
    # heads' likeness, here the clusters of a static profile
    alike = [[[float(a == b) for b in rep] for a in rep] for rep in REPRESENTATIVES]
    short = ClusterProfile(CLUSTERS, window=8, similarity=alike)
    one = [[7], [9]]
    found = engine(tiny, [one], 20, short, block_size=PAGE)
    wanted = runtime_tokens(tiny, STATIC, one, 20)
    assert found["batches"][0]["ids"] == wanted


def test_several_samples_of_a_prompt_share_its_pages(engine, tiny) -> None:
    prompt = prompts_of([70])
    found = engine(tiny, [prompt], 12, ONLINE, n=3, block_size=PAGE)
    wanted = runtime_tokens(tiny, ONLINE, prompt, 12)
    assert found["batches"][0]["ids"] == [wanted[0] * 3]


def test_graph_compilation_changes_nothing(engine, tiny) -> None:
    prompts = prompts_of([60, 20])
    found = engine(tiny, [prompts], 12, STATIC, block_size=PAGE, enforce_eager=False)
    assert found["batches"][0]["ids"] == runtime_tokens(tiny, STATIC, prompts, 12)


def test_draft_tokens_of_n_grams(engine, tiny) -> None:
    prompts = [prompts_of([12])[0] * 4, prompts_of([30], seed=5)[0]]
    for kind in ("static", "static window"):
        profile = PROFILES[kind]
        found = engine(
            tiny, [prompts], 30, profile, block_size=PAGE, enable_prefix_caching=False,
            speculative_config={
                "method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3,
            },
        )  # fmt: skip
        assert found["batches"][0]["ids"] == runtime_tokens(tiny, profile, prompts, 30)


def test_planner_gives_the_blocks_of_the_formula(engine, tiny) -> None:
    found = engine(tiny, [prompts_of([10])], 1, STATIC, block_size=PAGE)
    page = PAGE * 64 * 4 * sum(k + HEADS for k in CLUSTERS)
    assert found["blocks"] == 2**30 // page


def test_real_multi_head_model(engine, shared) -> None:
    folder = shared / "models" / "mha-lm"  # its heads of size 48 are more than vLLM's CPU has
    chosen = random.Random(4)
    reps = []
    for _ in range(14):
        some = sorted(chosen.sample(range(16), 8))
        reps.append([head if head in some else chosen.choice(some) for head in range(16)])
    profile = ClusterProfile((8,) * 14, "static", representatives=reps, recent=32, sinks=4)
    prompts = prompts_of([100, 20], 16000)
    found = engine(folder, [prompts], 16, profile, enable_prefix_caching=False)
    assert found["batches"][0]["ids"] == runtime_tokens(folder, profile, prompts, 16)


def test_grouped_queries_of_a_real_model(engine, smollm2) -> None:
    chosen = random.Random(4)
    reps = []
    for _ in range(30):
        some = sorted(chosen.sample(range(9), 6))
        reps.append([head if head in some else chosen.choice(some) for head in range(9)])
    profile = ClusterProfile((6,) * 30, "static", representatives=reps)
    prompts = prompts_of([40, 20], 49000)
    found = engine(smollm2, [prompts], 12, profile)
    assert found["batches"][0]["ids"] == runtime_tokens(smollm2, profile, prompts, 12)


def test_what_cannot_run_stops_with_one_line(engine, tiny, tmp_path) -> None:
    for profile, options, line in (
        (PROFILES["static window"], {}, "--no-enable-prefix-caching"),
        (STATIC, {"kv_cache_dtype": "fp8"}, "K,V cache of fp8"),
        (ClusterProfile((8, 8)), {}, "2 layers in the profile, 3 in the model"),
    ):
        with pytest.raises(RuntimeError, match=line):
            engine(tiny, [[[5]]], 1, profile, **options)
