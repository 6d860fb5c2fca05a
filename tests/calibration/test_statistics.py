"""Accumulated Gram matrices against the model's own attention weights in float64."""

import pytest
import torch

from chai_attention.calibration import pairs
from chai_attention.calibration.statistics import GramStatistics, cosine_similarity, observe
from chai_attention.integrations.transformers.intervene import LayerCall
from chai_attention.progress import silent
from tiny_models import CONFIGS, tiny_model

FAMILIES = sorted(CONFIGS)


def collect_grams(model, windows, layers, heads, *, batch_size, progress=silent):
    statistics = GramStatistics(layers, heads)
    observe(model, windows, [statistics.add], batch_size=batch_size, progress=progress)
    return statistics.grams


def some_windows(count=5, length=20):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, 97, (count, length), generator=generator)


def eager_grams(model, windows):
    """From transformers' own weights, one sequence at a time: ``[layers, H, H]`` float64."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    total = 0
    with torch.no_grad():
        for row in windows:
            maps = model(row[None], output_attentions=True).attentions
            flat = torch.stack([layer[0].double().flatten(1) for layer in maps])
            total = total + flat @ flat.mT
    model.set_attn_implementation(before)
    return total


def full_attention_layers(model):
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * 3
    return [i for i, kind in enumerate(kinds) if kind == "full_attention"]


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_models_own_attention_weights(family):
    model = tiny_model(family)
    windows = some_windows()
    got = collect_grams(model, windows, 3, 6, batch_size=2)
    assert got.shape == (3, 6, 6)
    assert got.dtype == torch.float64
    layers = full_attention_layers(model)
    torch.testing.assert_close(got[layers], eager_grams(model, windows)[layers], rtol=1e-5, atol=0)


@pytest.mark.parametrize("rows", [1, 7, 19, 20, 64])
def test_the_size_of_blocks_changes_nothing(rows, monkeypatch):
    model = tiny_model("llama-grouped")
    want = eager_grams(model, some_windows())
    monkeypatch.setattr(pairs, "ROWS", rows)
    got = collect_grams(model, some_windows(), 3, 6, batch_size=5)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_batch_changes_nothing_and_progress_is_told(batch_size):
    model = tiny_model("llama")
    told = []
    got = collect_grams(
        model, some_windows(7), 3, 6, batch_size=batch_size, progress=lambda *x: told.append(x)
    )
    torch.testing.assert_close(got, eager_grams(model, some_windows(7)), rtol=1e-5, atol=0)
    done = [min(batch_size * (i + 1), 7) for i in range(-(-7 // batch_size))]
    assert told == [(n, 7) for n in done]


def test_statistics_add_up_over_text():
    model = tiny_model("llama")
    one, two = some_windows(6)[:2], some_windows(6)[2:]
    parts = [collect_grams(model, part, 3, 6, batch_size=2) for part in (one, two)]
    whole = collect_grams(model, some_windows(6), 3, 6, batch_size=2)
    torch.testing.assert_close(sum(parts), whole, rtol=1e-6, atol=0)


def test_a_model_in_training_is_measured_without_dropout_and_stays_in_training():
    model = tiny_model("gpt2").train()
    first = collect_grams(model, some_windows(), 3, 6, batch_size=2)
    assert model.training
    assert torch.equal(first, collect_grams(model, some_windows(), 3, 6, batch_size=2))


def test_no_map_of_a_whole_sequence_ever_exists():
    """The largest tensor made has ROWS rows, however long the text."""
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    query = torch.randn(1, 2, 2048, 8)
    record = GramStatistics(1, 2)
    with Watch():
        record.add(LayerCall(0, query, query, query, 1.0, None))
    assert largest == 2 * pairs.ROWS * 2048


def test_cosine_similarity():
    points = torch.randn(2, 5, 30, dtype=torch.float64)
    points[0, 3] = 0
    got = cosine_similarity(points @ points.mT)
    want = torch.nn.functional.cosine_similarity(points[:, :, None], points[:, None], dim=-1)
    torch.testing.assert_close(got, want)
