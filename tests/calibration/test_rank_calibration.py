"""`calibrate` for tensor-parallel ranks: what they serve, what they keep, what is refused."""

from functools import lru_cache

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from chai_attention.calibration import calibrate
from chai_attention.errors import CalibrationError
from chai_attention.integrations.vllm.shares import savings
from chai_attention.profile import FOR_EVER
from chai_attention.runtime.shape import describe
from tiny_models import COMMON
from tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXT = "".join(f"Line {i} of some text, {i * i} and so on.\n" for i in range(400))
LOCAL = {"samples": 6, "length": 24, "recent": 4, "sinks": 1, "context": 40}


@lru_cache
def model_of(kv_heads: int) -> LlamaForCausalLM:
    torch.manual_seed(1)
    sizes = {**COMMON, "num_attention_heads": 8, "hidden_size": 64, "initializer_range": 0.2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=kv_heads)).eval()


@pytest.mark.parametrize("recipe", ["default", "stream", "share", "elbow"])
@pytest.mark.parametrize(("kv_heads", "ranks"), [(8, 2), (8, 4), (4, 2), (4, 4), (2, 4)])
def test_ranks_serve_what_was_chosen_for_them_and_keep_nothing_to_spare(kv_heads, ranks, recipe):
    model = model_of(kv_heads)
    shape = describe(model)
    if recipe in ("share", "elbow") and kv_heads <= ranks:
        pytest.skip("a rank with one K/V head has nobody to share with")
    options = {"save": 0.15}
    if recipe == "elbow":
        options = {"membership": "static", "max_error": 0.6}
    local = {**LOCAL, "context": LOCAL["context"] if recipe in ("default", "stream") else None}
    made = {
        n: calibrate(model, TOKENIZER, TEXT, recipe=recipe, tensor_parallel=n, **options, **local)
        for n in (1, ranks)
    }
    profile = made[ranks]
    assert profile.tensor_parallel == ranks
    profile.check(shape)
    found = savings(shape, profile, ranks)
    assert found.lost == 0
    if recipe != "elbow":
        assert profile.saved(shape, local["context"] or FOR_EVER) >= 0.15 - 1e-6
        assert found.share == pytest.approx(profile.saved(shape, FOR_EVER))
        predicted = profile.provenance
        assert predicted["predicted_rise"] >= predicted["predicted_rise_one_rank"] > 0
    assert "predicted_rise" not in made[1].provenance
    assert "tensor_parallel" not in made[1].to_json()


def test_a_profile_for_four_ranks_serves_two_and_one():
    model = model_of(8)
    shape = describe(model)
    profile = calibrate(model, TOKENIZER, TEXT, tensor_parallel=4, save=0.3, **LOCAL)
    assert any(map(any, profile.streaming))
    for ranks in (1, 2, 4):
        found = savings(shape, profile, ranks)
        assert found.lost == 0
        assert found.share == pytest.approx(profile.saved(shape, FOR_EVER))
    assert savings(shape, profile, 8).lost > 0
    alone = calibrate(model, TOKENIZER, TEXT, save=0.3, **LOCAL)
    assert savings(shape, alone, 4).lost > 0


def test_the_promise_of_ranks_is_searched_in_steps_of_all_of_them():
    model = model_of(8)
    options = {**LOCAL, "samples": 24, "max_loss": 0.4, "held_out": 32, "tensor_parallel": 4}
    profile = calibrate(model, TOKENIZER, TEXT, **options)
    assert profile.promise["rise"] + 1.645 * profile.promise["standard_error"] <= 0.4 + 1e-6
    assert savings(describe(model), profile, 4).lost == 0
    assert profile.promise["profiles_tried"] <= 4  # of 12 units


@pytest.mark.parametrize(
    ("kv_heads", "options", "message"),
    [
        (8, {"tensor_parallel": 3}, "8 heads cannot be dealt to 3 ranks: choose 1, 2, 4, 8"),
        (2, {"tensor_parallel": 3}, "8 heads of 2 K/V heads cannot be dealt to 3 ranks"),
        (8, {"tensor_parallel": 0}, "tensor_parallel 0 is not a whole number of 1"),
        (8, {"tensor_parallel": 2, "recipe": "paper"}, "each rank clusters its own heads"),
        (8, {"tensor_parallel": 2, "recipe": "elbow"}, "each rank clusters its own heads"),
        (8, {"tensor_parallel": 2, "membership": "blend"}, "with another each rank"),
        (8, {"tensor_parallel": 8, "recipe": "share"}, "use recipe default or stream"),
        (4, {"tensor_parallel": 2, "target": "scores", "recipe": "share"}, "needs target k-bytes"),
        (8, {"tensor_parallel": 2, "clusters": 3}, "3 clusters; possible: 2, 4, 6, 8"),
    ],
)
def test_what_ranks_cannot_have_is_refused(kv_heads, options, message):
    with pytest.raises(CalibrationError, match=message):
        calibrate(model_of(kv_heads), TOKENIZER, TEXT, samples=6, length=24, **options)
