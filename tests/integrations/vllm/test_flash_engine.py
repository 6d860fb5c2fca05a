"""vLLM's engine where kept heads run a stand-in for FlashAttention and the others stream."""

import pytest

from chai_attention.profile import ClusterProfile
from runtime_tokens import runtime_tokens
from vllm_job import abort, generate
from vllm_profiles import PAGE, prompts_of

MIXED = prompts_of([120, 10, 33, 64, 11, 90, 47, 80], seed=6)
SHARED = [MIXED[0][: 70 + 9 * extra] for extra in range(4)]
TOKENS = 24
EVERY = tuple(range(8))
# the query's heads are gathered in one layer and sliced in another; vLLM runs the second itself
GROUPED = ClusterProfile(
    (4, 8, 6), "static", representatives=(EVERY,) * 3, streaming=((2, 3, 4, 5), (), (6, 7)),
    recent=20, sinks=3,
)  # fmt: skip
# as many on either rank
RANKED = ClusterProfile(
    (4, 8, 4), "static", representatives=(EVERY,) * 3, streaming=((2, 3, 4, 5), (), (0, 1, 6, 7)),
    recent=20, sinks=3,
)  # fmt: skip


@pytest.mark.parametrize(("profile", "ranks"), [(GROUPED, 1), (RANKED, 2)])
def test_tokens_are_those_of_the_transformers_runtime(
    profile: ClusterProfile, ranks: int, engine, tiny_grouped
) -> None:
    """Through chunks, preemptions, prefix hits and requests that are dropped."""
    model = tiny_grouped
    options = {"tensor_parallel_size": 2} if ranks == 2 else {"num_gpu_blocks_override": 24}
    found = engine(
        model,
        [generate(MIXED, TOKENS), generate(SHARED, TOKENS)]
        + ([] if ranks == 2 else [abort(MIXED, TOKENS, {1: 2, 3: 7}), generate(MIXED, TOKENS)]),
        profile, flash=True, block_size=PAGE, max_num_batched_tokens=48,
        max_model_len=256, **options,
    )  # fmt: skip
    wanted = runtime_tokens(model, profile, MIXED, TOKENS)
    assert found["parts"][0]["ids"] == wanted
    assert found["parts"][1]["ids"] == runtime_tokens(model, profile, SHARED, TOKENS)
    if ranks == 1:
        assert found["flash"] == 2
        assert found["preemptions"] > 0
        assert found["parts"][3]["ids"] == wanted
