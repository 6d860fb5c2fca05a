"""`calibrate` with streaming heads: what the recipes choose, what is saved, what is promised."""

import pytest
import torch

from chai_attention.calibration import calibrate
from chai_attention.calibration.evidence import EvidenceStore
from chai_attention.calibration.perplexity import paired_rise, token_loss
from chai_attention.calibration.settings import AUTO, Settings
from chai_attention.calibration.texts import windows_of
from chai_attention.integrations.transformers import enabled
from chai_attention.profile import ClusterProfile
from chai_attention.runtime.shape import describe
from tiny_models import CONFIGS, tiny_model
from tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXT = "".join(f"Line {i} of some text, {i * i} and so on.\n" for i in range(400))
LOCAL = {"samples": 6, "length": 24, "recent": 4, "sinks": 1, "context": 40}


def shares(profile):
    return any(r != h for rep in profile.representatives for h, r in enumerate(rep))


@pytest.mark.parametrize("family", ["llama", "llama-grouped", "gemma2"])
def test_recipes_share_or_stream_or_both(family):
    model = tiny_model(family)
    made = {
        recipe: calibrate(model, TOKENIZER, TEXT, recipe=recipe, save=0.3, **LOCAL)
        for recipe in ("default", "stream")
    }
    assert not shares(made["stream"])
    for profile in made.values():
        assert any(profile.streaming)
        profile.check(describe(model))
        assert profile.saved(describe(model), 40) >= 0.3 - 1e-9
    local = {**LOCAL, "context": None}
    shared = calibrate(model, TOKENIZER, TEXT, recipe="share", save=0.15, **local)
    assert shared.streaming is None
    assert shares(shared)
    # both together cost no more than either, as far as costs tell
    assert sum(map(len, made["default"].streaming)) <= sum(map(len, made["stream"].streaming))


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_every_family_streams(family):
    model = tiny_model(family)
    profile = calibrate(model, TOKENIZER, TEXT, save=0.2, measure=False, **LOCAL)
    for layer, free in enumerate(describe(model).clusterable):
        assert free or not profile.streaming_heads(layer)
    with enabled(model, profile), torch.no_grad():
        model(torch.ones(1, 12, dtype=torch.long))


def test_no_smaller_profile_of_the_same_kind_saves_as_much():
    """What is saved is counted at the context, rings included."""
    model = tiny_model("llama")
    shape = describe(model)
    for save in (0.1, 0.35, 0.6):
        profile = calibrate(model, TOKENIZER, TEXT, save=save, **LOCAL)
        unit = (1 - 5 / 40) / 36
        assert save - 1e-9 <= profile.saved(shape, 40)
        assert profile.saved(shape, 40) < save + 2 * unit


def test_the_share_of_the_heads_that_was_asked_for_gives_up_far_keys():
    model = tiny_model("llama")
    profile = calibrate(model, TOKENIZER, TEXT, removed=0.5, **LOCAL)
    assert 9 <= 18 - sum(profile.clusters) <= 10
    assert profile.promise["removed"] == 0.5


def test_the_same_arguments_give_the_same_file():
    model = tiny_model("llama")
    first, second = (
        calibrate(model, TOKENIZER, TEXT, max_loss=0.5, **LOCAL).to_json() for _ in range(2)
    )
    assert first == second


def test_the_promise_holds_at_two_lengths_of_unseen_text():
    model = tiny_model("llama")
    local = {**LOCAL, "samples": 24}
    profile = calibrate(model, TOKENIZER, TEXT, max_loss=0.5, held_out=32, **local)
    promise = profile.promise
    longer = promise["longer"]
    assert (promise["length"], longer["length"]) == (24, 96)
    assert promise["windows"] == 4 * longer["windows"] == 32
    for found in (promise, longer):
        assert found["rise"] + 1.645 * found["standard_error"] <= 0.5 + 1e-6
    # told once more, from the text alone: 6 long windows to learn from, 8 held out, spread
    windows = windows_of(TEXT, TOKENIZER, 14, 96, 0)
    held = windows[[round((i + 0.5) * 14 / 8 - 0.5) for i in range(8)]]
    for text, found in ((held, longer), (held.view(-1, 24), promise)):
        plain = token_loss(model, text)
        with enabled(model, profile):
            rise = paired_rise(plain, token_loss(model, text))
        assert rise.rise == pytest.approx(found["rise"], abs=1e-4)


def test_a_text_with_few_long_windows_is_measured_at_one_length():
    model = tiny_model("llama")
    profile = calibrate(model, TOKENIZER, TEXT[:400], max_loss=0.9, held_out=4, **LOCAL)
    assert "longer" not in profile.promise


def test_the_window_serves_the_context():
    """Of several windows; a short context is served best by a short one."""
    model = tiny_model("llama")
    options = {"samples": 4, "length": 200, "sinks": 1, "save": 0.3, "measure": False}
    store = EvidenceStore(model, windows_of(TEXT, TOKENIZER, 4, 200, 0))
    chosen = {
        context: calibrate(
            model, TOKENIZER, store.sequences, context=context, store=store, recent=AUTO, **options
        ).recent
        for context in (60, 250)
    }
    assert chosen[60] == 32
    assert chosen[250] >= chosen[60]
    assert chosen[250] in (32, 64, 128)


def test_which_windows_are_tried():
    shape = describe(tiny_model("llama"))
    chosen = Settings().resolve(shape)
    assert chosen.streams
    assert (chosen.recent, chosen.context) == (AUTO, 2048)
    assert chosen.recents(1024) == [32, 64, 128, 256, 512]
    assert chosen.recents(256) == [32, 64, 128]
    assert Settings(context=100).resolve(shape).recents(1024) == [32, 64]
    assert Settings(recent=40).resolve(shape).recents(1024) == [40]
    for other in ({"membership": "online"}, {"cost": "value"}, {"recent": 0}, {"clusters": 3}):
        assert not Settings(**other).resolve(shape).streams
    assert not Settings(recipe="share").resolve(shape).streams
    assert Settings(recipe="share").resolve(shape).recent == 32


def test_a_profile_with_streaming_heads_comes_back_from_its_file(tmp_path):
    profile = calibrate(tiny_model("llama"), TOKENIZER, TEXT, save=0.3, **LOCAL)
    profile.save(tmp_path / "p.json")
    assert ClusterProfile.load(tmp_path / "p.json") == profile
    assert profile.provenance["context"] == 40
