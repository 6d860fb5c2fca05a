"""ThinK and SnapKV by kvpress against their definitions, in one forward without a cache."""

import pickle
import sys
from importlib.util import find_spec

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from chai_attention.calibration.recall import RecallCase
from chai_attention.calibration.recall_score import recall_score
from chai_attention.errors import EvaluationError, UnsupportedModelError
from chai_attention.evaluation.comparators.kvpress import (
    kept_tokens,
    kvpress_comparator,
    load_kvpress,
    load_presses,
    pruned_channels,
)
from chai_attention.integrations.transformers.methods import cached_logits
from comparator_cases import logits, traces
from compressed_contexts import ANSWER, by_definition, sequence
from tiny_models import tiny_model


@pytest.fixture
def library():
    if find_spec("kvpress") is None:  # not imported here: that would change transformers
        pytest.skip("needs the extra baselines")
    return load_kvpress()


@pytest.mark.parametrize(
    ("channels", "save", "pruned"),
    [(64, 0.1, 13), (64, 0.25, 32), (8, 0.2, 4), (128, None, 51), (64, 0.492, 63)],
)
def test_think_prunes_twice_the_share_of_channels_because_v_stays(channels, save, pruned):
    assert pruned_channels(channels, save) == pruned
    if save is not None:
        assert save <= pruned / (2 * channels) < save + 1 / (2 * channels)


def test_think_cannot_save_v():
    with pytest.raises(EvaluationError, match="less than half"):
        pruned_channels(64, 0.5)


@pytest.mark.parametrize(
    ("tokens", "save", "kept"),
    [(66, 0.1, 60), (10, 0.1, 9), (9, 0.1, 9), (1, 0.9, 1), (2048, None, 1024), (7, 0.9, 1)],
)
def test_snapkv_keeps_a_share_of_the_prompt(tokens, save, kept):
    assert kept_tokens(tokens, save) == kept


def score_by_loops(query, key, window, group):
    """SnapKV's importance of every token before the window, per K/V head, in float64 loops."""
    heads, length = query.shape[1], key.shape[2]
    far = length - window
    found = torch.zeros(heads // group, far, dtype=torch.float64)
    for head in range(heads):
        total = torch.zeros(far, dtype=torch.float64)
        for place in range(far, length):
            keys = key[0, head // group, : place + 1].double()
            scores = keys @ query[0, head, place].double() * query.shape[-1] ** -0.5
            total += scores.softmax(0)[:far] / window
        for token in range(far):  # what is beyond the ends counts as nothing
            found[head // group, token] += total[max(0, token - 2) : token + 3].sum() / 5 / group
    return found


@pytest.mark.parametrize("family", ["llama", "llama-grouped", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("length", "save", "window"), [(41, 0.2, 15), (120, 0.1, 32), (90, 0.4, 26)]
)
def test_snapkv_leaves_out_what_the_last_queries_look_at_least(
    library, family, length, save, window
):
    model, tokens = tiny_model(family), sequence(length)
    method = kvpress_comparator("snapkv", save)
    kept = kept_tokens(length - ANSWER, save)
    assert min(32, kept // 2) == window

    def compress(layer, query, key, value):
        scores = score_by_loops(query, key, window, query.shape[1] // key.shape[1])
        seen = torch.zeros(1, key.shape[1], 1, key.shape[2], dtype=torch.bool)
        seen[..., -window:] = True
        for head, row in enumerate(scores):
            seen[0, head, 0, row.topk(kept - window).indices] = True
        return key, value, seen

    with method.attached(model):
        found = cached_logits(model, method, tokens[None], ANSWER)[0]
    wanted = by_definition(model, tokens, compress)
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)
    assert (found - logits(model, tokens[None])[0, -ANSWER:]).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["llama", "llama-grouped", "qwen2", "qwen3"])
@pytest.mark.parametrize("length", [20, 60])
def test_think_leaves_out_the_channels_that_matter_least(library, family, length):
    model, tokens = tiny_model(family), sequence(length)
    method = kvpress_comparator("think", 0.2)

    def compress(layer, query, key, value):
        group, size = query.shape[1] // key.shape[1], key.shape[-1]
        for head in range(key.shape[1]):
            asked = query[0, head * group : (head + 1) * group, -32:].double()
            weight = asked.square().mean((0, 1)) * key[0, head].double().square().mean(0)
            key[0, head, :, weight.argsort()[: pruned_channels(size, 0.2)]] = 0
        return key, value, None

    with method.attached(model):
        found = cached_logits(model, method, tokens[None], ANSWER)[0]
    wanted = by_definition(model, tokens, compress)
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)
    assert (found - logits(model, tokens[None])[0, -ANSWER:]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["think", "snapkv"])
@pytest.mark.parametrize("length", [2, 3, 5, 9])
def test_short_prompts_are_compressed_too_as_far_as_there_is_anything(library, name, length):
    model, tokens = tiny_model("llama"), sequence(length)
    method = pickle.loads(pickle.dumps(kvpress_comparator(name, 0.3)))  # as another process has it
    with method.attached(model):
        found = cached_logits(model, method, tokens[None], 1)[0]
    assert found.isfinite().all()


@pytest.mark.parametrize("name", ["think", "snapkv"])
def test_the_cache_holds_what_the_share_says(library, name):
    model, tokens = tiny_model("llama-grouped"), sequence(50)[None]
    method = kvpress_comparator(name, 0.3)
    before, plain = traces(model), logits(model, tokens)
    with method.attached(model), torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
        # zeroed channels are those that a server would not hold
        held = sum(
            (x != 0).any(2, keepdim=True).expand(x.shape).sum().item()
            for layer in cache.layers
            for x in (layer.keys, layer.values)
        )
        assert held / (3 * 2 * 2 * 50 * 8) == pytest.approx(method.kv_share(model, 50))
    assert traces(model) == before
    assert torch.equal(logits(model, tokens), plain)
    with pytest.raises(KeyError), method.attached(model):
        raise KeyError(name)
    assert traces(model) == before


def test_importing_kvpress_leaves_transformers_attention_as_it_is(library):
    assert not ALL_ATTENTION_FUNCTIONS._local_mapping
    for name, function in ALL_ATTENTION_FUNCTIONS.items():
        module = getattr(function, "__module__", "")
        assert not module.startswith("kvpress"), name


@pytest.mark.parametrize("family", ["opt", "phi", "gemma2"])
def test_models_that_kvpress_cannot_run_are_refused(library, family):
    model = tiny_model(family)
    method = kvpress_comparator("think", None)
    with pytest.raises(UnsupportedModelError, match="leave think out"):
        method.prepare(model, ())
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM"), method.attached(model):
        pass


def test_a_share_is_a_share(library):
    with pytest.raises(EvaluationError, match="share"):
        kvpress_comparator("snapkv", 1.0)


def test_kvpress_needs_nothing_that_only_its_other_methods_need(monkeypatch, tmp_path):
    """Where data sets or requests are missing, ThinK and SnapKV run all the same."""
    folder = tmp_path / "kvpress" / "presses"
    folder.mkdir(parents=True)
    (tmp_path / "kvpress" / "__init__.py").write_text("import no_such_library_of_data_sets\n")
    (folder / "__init__.py").write_text("")
    (folder / "base_press.py").write_text("SUPPORTED_MODELS = (int,)\n")
    (folder / "think_press.py").write_text("import kvpress.presses.base_press\nThinKPress = 1\n")
    (folder / "snapkv_press.py").write_text("SnapKVPress = 2\n")
    for name in [name for name in sys.modules if name.partition(".")[0] == "kvpress"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    before = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    load_presses.cache_clear()
    try:
        found = load_presses()
    finally:
        load_presses.cache_clear()
        for name in [name for name in sys.modules if name.partition(".")[0] == "kvpress"]:
            del sys.modules[name]
    assert (found.SUPPORTED_MODELS, found.ThinKPress, found.SnapKVPress) == ((int,), 1, 2)
    assert "kvpress" not in sys.modules  # who imports it gets all of it
    assert ALL_ATTENTION_FUNCTIONS._local_mapping == before


@pytest.mark.parametrize("name", ["snapkv", "think"])
def test_questions_in_a_batch_are_answered_as_one_by_one(library, name):
    model = tiny_model("llama-grouped")
    draw = torch.Generator().manual_seed(4)
    made = [torch.randint(3, 97, (45,), generator=draw) for _ in range(5)]
    cases = [RecallCase(x[: 42 + n % 2], x[42 + n % 2 :]) for n, x in enumerate(made)]
    method, alone = kvpress_comparator(name, 0.3), kvpress_comparator(name, 0.3)
    alone.rows_apart = False
    found = []
    for press in (method, alone):
        with press.attached(model):
            found.append(recall_score(model, cases, method=press))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-4, rtol=1e-4)
    plain = recall_score(model, cases)[1]
    assert (found[0][1] - plain).abs().max() > 1e-4
