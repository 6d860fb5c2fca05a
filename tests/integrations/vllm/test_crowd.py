"""Hundreds of requests at random: each gets what it would get alone, whatever goes on beside it."""

import random

import pytest

from vllm_job import crowd, generate
from vllm_profiles import PAGE, PROFILES

pytestmark = pytest.mark.exhaustive
MOST, PROMPTS, REQUESTS, POOL = 30, 60, 300, 30


def prompts_of(count: int, chosen: random.Random) -> list[list[int]]:
    """Prompts of up to 150 tokens, most of which begin like others do."""
    made = [[chosen.randrange(3, 256) for _ in range(150)] for _ in range(3)]
    while len(made) < count:
        start = chosen.choice(made)
        start = start[: chosen.choice([0, len(start), chosen.randint(1, len(start))])]
        more = chosen.choice([1, 5, 20, 60])
        made.append([*start, *(chosen.randrange(3, 256) for _ in range(more))][:150])
    return made


@pytest.mark.parametrize(
    "kind", ["online", "static window", "online window", "streaming", "online streaming"]
)
def test_answers_in_a_crowd_are_those_of_lone_runs(kind, engine, tiny) -> None:
    chosen, profile = random.Random(kind), PROFILES[kind]
    prompts = prompts_of(PROMPTS, chosen)
    requests = []
    for number in range(REQUESTS):
        comes = number // 2 + chosen.randint(0, 8)
        leaves = comes + chosen.randint(0, 12) if chosen.random() < 0.15 else None
        requests.append([chosen.randrange(PROMPTS), chosen.randint(1, MOST), comes, leaves])
    options = {
        "block_size": PAGE, "max_model_len": 256,
        # all that begin in a step decide on their whole probe windows, or chunks are short
        "max_num_batched_tokens": 40 if profile.membership == "static" else 12 * 256,
    }  # fmt: skip
    found = engine(
        tiny, [crowd(prompts, requests)], profile, **options,
        num_gpu_blocks_override=POOL, max_num_seqs=12,
    )  # fmt: skip
    part = found["parts"][0]
    lone = [generate([prompt], MOST) for prompt in prompts]
    alone = engine(tiny, lone, profile, **options, enable_prefix_caching=False)["parts"]
    stayed = [(*request, ids) for request, ids in zip(requests, part["ids"], strict=True) if ids]
    assert len(stayed) >= 0.8 * REQUESTS
    for prompt, tokens, *_, ids in stayed:
        assert ids == alone[prompt]["ids"][0][0][:tokens]
    assert found["preemptions"] >= 5
    assert part["cached"] >= 500
    assert found["free"] == [POOL - 1] * 2
