"""Mixtures of calibration text: parsing, shares, interleaving, holding out, and the warning."""

import math
import warnings

import datasets
import pytest
import torch

from chai_attention.calibration import self_text
from chai_attention.calibration import texts as texts_module
from chai_attention.calibration.data import hold_out
from chai_attention.calibration.perplexity import PairedRise
from chai_attention.calibration.sources import (
    Source,
    mixed_sequences,
    parse_sources,
    warn_uneven,
)
from chai_attention.errors import CalibrationError
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
LENGTH = 4


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Three texts whose windows of 4 tokens name their text and count up."""
    monkeypatch.chdir(tmp_path)
    for name, count in {"a": 900, "b": 900, "c": 5}.items():
        (tmp_path / f"{name}.txt").write_text("".join(f"{name}{i:03d}" for i in range(count)))
    return tmp_path


def texts_of(windows):
    return [TOKENIZER.decode(row) for row in windows]


@pytest.mark.parametrize(
    ("items", "wanted"),
    [
        (["a.txt"], [("a.txt", 1.0)]),
        (["a.txt", "self"], [("a.txt", 1.0), ("self", 1.0)]),
        (["a.txt:0.5", "b.jsonl:1.5"], [("a.txt", 0.5), ("b.jsonl", 1.5)]),
        (["self:2", "org/data:config:1e1"], [("self", 2.0), ("org/data:config", 10.0)]),
        (["org/data:config", "org/data:v1.2"], [("org/data:config", 1.0), ("org/data:v1.2", 1.0)]),
        (["org/data:103:1", "a.txt:.5"], [("org/data:103", 1.0), ("a.txt", 0.5)]),
        (["org/data:nan"], [("org/data:nan", 1.0)]),
    ],
)
def test_only_a_number_at_the_end_is_a_weight(items, wanted):
    assert parse_sources(items) == [Source(*pair) for pair in wanted]


def test_a_file_of_exactly_that_name_has_no_weight(tmp_path):
    path = tmp_path / "part:2"
    path.write_text("text")
    assert parse_sources([str(path)]) == [Source(str(path), 1.0)]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "at least one source"),
        (["a:0"], "positive"),
        (["a:-1"], "positive"),
        (["a:1e999"], "positive"),
        (["a:1", "b"], "every source .* or none"),
        (["a", "b", "a"], "a is there twice"),
        ([""], "empty"),
        ([" :1"], "empty"),
        (["a.txt:nan"], "weight 'nan' is not a positive"),
        (["a.jsonl:half"], "weight 'half' is not a positive"),
    ],
)
def test_bad_sources_are_refused(items, message):
    with pytest.raises(CalibrationError, match=message):
        parse_sources(items)


@pytest.mark.parametrize(
    ("weights", "samples", "shares"),
    [
        ((1, 1), 10, [5, 5]),
        ((0.7, 0.3), 10, [7, 3]),
        ((1, 1), 7, [4, 3]),  # a tie goes to the first
        ((0.2, 0.3), 9, [4, 5]),  # 3.6 and 5.4
        ((9, 1), 6, [5, 1]),  # 5.4 and 0.6
    ],
)
def test_windows_come_in_proportion_to_the_weights(weights, samples, shares, files):
    sources = [Source("a.txt", weights[0]), Source("b.txt", weights[1])]
    windows, index = mixed_sequences(sources, None, TOKENIZER, samples, LENGTH, seed=0)
    assert windows.shape == (samples, LENGTH)
    assert windows.dtype == index.dtype == torch.long
    assert torch.bincount(index).tolist() == shares
    assert [text[0] for text in texts_of(windows)] == ["ab"[i] for i in index]


def test_weights_whose_sum_is_no_float_are_shares_all_the_same(files):
    sources = [Source("a.txt", 1e308), Source("b.txt", 1e308)]
    _, index = mixed_sequences(sources, None, TOKENIZER, 8, LENGTH, seed=0)
    assert torch.bincount(index).tolist() == [4, 4]


def test_a_token_that_the_model_has_no_row_for_is_named(files):
    model = tiny_model("llama")
    model.resize_token_embeddings(20)
    with pytest.raises(CalibrationError, match=r"token id \d+, and this model embeds ids 0 to 19"):
        mixed_sequences([Source("a.txt")], model, TOKENIZER, 4, LENGTH, seed=0)


def test_sources_are_interleaved_by_seed_and_keep_the_order_of_their_text(files):
    sources = [Source("a.txt"), Source("b.txt")]
    windows, index = mixed_sequences(sources, None, TOKENIZER, 40, LENGTH, seed=3)
    for name in "ab":
        numbers = [text for text in texts_of(windows) if text[0] == name]
        assert numbers == sorted(numbers)
        assert len(set(numbers)) == 20
    assert (index[1:] != index[:-1]).sum() > 8  # not one source after the other
    again = mixed_sequences(sources, None, TOKENIZER, 40, LENGTH, seed=3)
    other = mixed_sequences(sources, None, TOKENIZER, 40, LENGTH, seed=4)
    assert torch.equal(windows, again[0])
    assert torch.equal(index, again[1])
    assert not torch.equal(windows, other[0])
    assert not torch.equal(index, other[1])


def test_a_source_with_too_little_text_is_used_whole_and_named(files):
    sources = [Source("a.txt"), Source("c.txt")]
    with pytest.warns(UserWarning, match=r"c\.txt has text for 5 of the 8 sequences"):
        windows, index = mixed_sequences(sources, None, TOKENIZER, 16, LENGTH, seed=0)
    assert torch.bincount(index).tolist() == [8, 5]
    assert sum(text[0] == "c" for text in texts_of(windows)) == 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mixed_sequences(sources, None, TOKENIZER, 10, LENGTH, seed=0)


def test_the_model_can_be_a_source(files):
    model = tiny_model("llama")
    sources = [Source("self"), Source("a.txt")]
    windows, index = mixed_sequences(sources, model, TOKENIZER, 6, LENGTH, seed=5)
    assert torch.equal(windows[index == 0], self_text(model, 3, LENGTH, seed=5))


def test_a_data_set_is_read_for_its_own_share(monkeypatch):
    asked = []

    def stream(name, config, **options):
        asked.append((name, config))
        return iter([{"text": "some words. " * 10}] * 50)

    monkeypatch.setattr(texts_module, "require_dataset", lambda name, error: None)
    monkeypatch.setattr(datasets, "load_dataset", stream)
    sources = parse_sources(["org/data:first:3", "org/data:second:1"])
    _, index = mixed_sequences(sources, None, TOKENIZER, 8, LENGTH, seed=0)
    assert asked == [("org/data", "first"), ("org/data", "second")]
    assert torch.bincount(index).tolist() == [6, 2]


def test_a_source_without_a_window_is_refused(files):
    with pytest.raises(CalibrationError, match=r"4 samples leave no sequence for b\.txt"):
        mixed_sequences(
            [Source("a.txt", 99), Source("b.txt", 1)], None, TOKENIZER, 4, LENGTH, seed=0
        )
    with pytest.raises(CalibrationError, match=r"c\.txt: .*at least 21 tokens.*has 20"):
        mixed_sequences([Source("a.txt"), Source("c.txt")], None, TOKENIZER, 4, 21, seed=0)


@pytest.mark.parametrize(
    ("counts", "held_out", "wanted"),
    [
        ((30, 10), 8, [6, 2]),
        ((30, 10), 0, [0, 0]),
        ((5,), 4, [4]),
        ((9, 1), 8, [8, 0]),  # the only window of a source is never held out
        ((2, 2, 2), 3, [1, 1, 1]),
        ((4, 3), 5, [3, 2]),
    ],
)
def test_what_is_held_out_is_spread_over_every_source(counts, held_out, wanted):
    torch.manual_seed(0)
    sources = torch.cat([torch.full((n,), i) for i, n in enumerate(counts)])
    sources = sources[torch.randperm(len(sources))]
    held = hold_out(len(sources), held_out, sources)
    assert torch.bincount(sources[held], minlength=len(counts)).tolist() == wanted
    assert held.sum() == held_out
    for index, count in enumerate(counts):
        places = held[sources == index].nonzero()[:, 0]
        # each is the middle one of an equal part of its source
        middles = [(2 * i + 1) * count / (2 * wanted[index]) for i in range(wanted[index])]
        assert all(
            abs(at + 0.5 - middle) <= 0.5 for at, middle in zip(places, middles, strict=True)
        )


@pytest.mark.parametrize("held_out", [-1, 4, 9])
def test_too_many_held_out_are_refused(held_out):
    with pytest.raises(CalibrationError, match="0 to 3 can be held out"):
        hold_out(5, held_out, torch.tensor([0, 1, 0, 1, 0]))


def test_an_uneven_rise_is_said_in_a_sentence():
    rises = {
        "wiki": PairedRise(0.01, 0.002),
        "chat": PairedRise(0.09, 0.01),
        "code": PairedRise(0.03, 0.002),
    }
    warning = warn_uneven(rises)
    assert "9.0% on chat but by 1.0% on wiki" in warning
    assert "\n" not in warning


@pytest.mark.parametrize(
    ("first", "second", "uneven"),
    [
        ((0.021, 0.001), (0.010, 0.001), True),
        ((0.019, 0.001), (0.010, 0.001), False),  # less than twice
        ((0.05, 0.02), (0.01, 0.01), False),  # 4% apart, 1.8 standard errors
        ((0.05, 0.016), (0.01, 0.01), True),  # 2.1 standard errors
        ((0.05, 0.01), (-0.01, 0.01), True),  # twice a negative rise is no bound
        ((-0.01, 0.001), (-0.05, 0.001), False),
        ((0.5, math.nan), (0.01, 0.001), False),  # a single window has no error to judge by
    ],
)
def test_when_two_rises_are_uneven(first, second, uneven):
    rises = {"a": PairedRise(*first), "b": PairedRise(*second)}
    assert (warn_uneven(rises) is not None) is uneven
    assert (warn_uneven(dict(reversed(rises.items()))) is not None) is uneven


def test_one_source_is_never_uneven():
    assert warn_uneven({"a": PairedRise(0.5, 0.01)}) is None


def test_the_same_file_by_another_name_is_there_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").symlink_to("a.txt")
    (tmp_path / "copy.txt").write_text("text")
    (tmp_path / "other.txt").write_text("next")
    assert len(parse_sources(["a.txt", "other.txt", "org/a.txt"])) == 3
    for other in ("./a.txt", str(tmp_path / "a.txt"), "b.txt", "copy.txt"):
        with pytest.raises(CalibrationError, match="is there twice"):
            parse_sources(["a.txt", other])
