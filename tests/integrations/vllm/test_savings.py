"""What ranks save, as the estimate and the server's log tell it."""

import logging
from types import SimpleNamespace

import pytest
from transformers import LlamaConfig

from chai_attention.integrations.vllm.model_state import ModelState
from chai_attention.integrations.vllm.shares import layer_shards, savings
from chai_attention.profile import ClusterProfile
from chai_attention.runtime.shape import describe

CONFIG = LlamaConfig(hidden_size=64, num_attention_heads=8, num_hidden_layers=2, vocab_size=64)
EVERY = tuple(range(8))
FIRST = ClusterProfile((2, 8), "static", representatives=((0, 0, 0, 0, 0, 0, 0, 7), EVERY))
EVEN = ClusterProfile(
    (4, 8), "static", representatives=((0, 0, 3, 3, 5, 5, 6, 6), EVERY), tensor_parallel=4
)


@pytest.mark.parametrize(
    ("profile", "ranks", "line"),
    [
        (FIRST, 1, "18.8% of the K,V bytes per token saved"),
        # the second rank keeps two K heads, so the first does
        (
            FIRST,
            2,
            "12.5% of the K,V bytes per token saved on each of 2 ranks, 18.8% on one GPU: pages of "
            "one size keep 33.3% of the saving; chai calibrate --tensor-parallel 2 chooses heads "
            "so that they keep nothing",
        ),
        (EVEN, 1, "12.5% of the K,V bytes per token saved"),
        *(
            (
                EVEN,
                ranks,
                f"12.5% of the K,V bytes per token saved on each of {ranks} ranks, as on one GPU "
                "(the profile is made for 4)",
            )
            for ranks in (2, 4)
        ),
    ],
)
def test_ranks_say_what_they_save_and_why_it_is_less_than_on_one_gpu(profile, ranks, line) -> None:
    found = savings(describe(CONFIG), profile, ranks)
    assert found.line == line
    assert (found.lost > 0) == ("calibrate" in line)


def test_a_profile_that_saves_nothing_loses_nothing() -> None:
    found = savings(describe(CONFIG), ClusterProfile((8, 8)), 2)
    assert (found.share, found.lost) == (0.0, 0.0)


@pytest.mark.parametrize(("rank", "first"), [(0, True), (1, True), (0, False)])
def test_one_rank_of_a_server_logs_one_line(rank, first, monkeypatch) -> None:
    distributed = pytest.importorskip("vllm.distributed")
    monkeypatch.setattr(distributed, "get_tensor_model_parallel_rank", lambda: rank)
    monkeypatch.setattr(distributed, "get_pp_group", lambda: SimpleNamespace(is_first_rank=first))
    model = ModelState.__new__(ModelState)
    model.profile, model.layers = FIRST, layer_shards(describe(CONFIG), FIRST, 2, rank)
    model.config = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=CONFIG),
        parallel_config=SimpleNamespace(tensor_parallel_size=2),
    )
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vllm")  # vLLM's own, with the level that the environment asks for
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        model._tell_savings()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    line = savings(describe(CONFIG), FIRST, 2).line
    assert lines == ([f"clustered heads: {line}"] if (rank, first) == (0, True) else [])
