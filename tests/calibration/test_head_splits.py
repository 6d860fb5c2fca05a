"""What heads do, over layers, against trying everything; which window serves best."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from chai_attention.calibration.evidence import Evidence
from chai_attention.calibration.head_splits import HeadSplits, best_recent
from chai_attention.errors import CalibrationError

HEADS = 4


def shape_of(layers=3, kv_heads=HEADS, clusterable=None, sliding_window=None):
    return SimpleNamespace(
        layers=layers, heads=HEADS, kv_heads=kv_heads, clusterable=clusterable or (True,) * layers,
        sliding_window=sliding_window,
    )  # fmt: skip


def evidence_of(layers=3, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    sharing = scale * torch.rand(layers, HEADS, HEADS, generator=generator, dtype=torch.float64)
    streaming = scale * torch.rand(layers, HEADS, generator=generator, dtype=torch.float64)
    sharing.diagonal(dim1=1, dim2=2).zero_()
    return Evidence(torch.eye(HEADS).expand(layers, -1, -1), sharing, None, streaming)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("recipe", ["stream", "both"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_no_other_splits_of_the_layers_are_cheaper(kv_heads, recipe, ranks):
    splits = HeadSplits(
        shape_of(kv_heads=kv_heads),
        evidence_of(),
        8,
        4,
        share=recipe != "stream",
        ranks=ranks,
    )
    local = kv_heads // ranks
    assert splits.most == 3 * 2 * local
    for units in range(splits.most + 1):
        found = splits.at(units)
        assert sum(split.saved for split in found) >= units
        best = min(
            sum(split.cost for split in chosen)
            for chosen in itertools.product(*splits.layers)
            if sum(split.saved for split in chosen) >= units
        )
        assert sum(split.cost for split in found) == pytest.approx(best)
        assert splits.rise(units) == pytest.approx(torch.tensor(best / 2).expm1().item())


def test_a_unit_of_ranks_is_of_all_of_them():
    """As many bytes are saved with fewer units, and never more cheaply."""
    one, two = (HeadSplits(shape_of(), evidence_of(), 16, 4, ranks=n) for n in (1, 2))
    assert (one.units, two.units) == (24, 12)
    assert two.unit_share(100) == pytest.approx(2 * one.unit_share(100))
    for units in range(two.most + 1):
        assert two.saved(two.at(units), 100) >= units * two.unit_share(100) - 1e-9
        assert two.rise(units) >= one.rise(2 * units) - 1e-12
    assert sum(two.rise(n) > one.rise(2 * n) + 1e-6 for n in range(two.most + 1)) > 3


def test_a_layer_that_cannot_be_clustered_is_left_alone():
    splits = HeadSplits(shape_of(clusterable=(True, False, True)), evidence_of(), 8, 4)
    assert splits.most == 16
    assert splits.at(16)[1].representatives == (0, 1, 2, 3)
    assert splits.at(16)[1].saved == 0


def test_rings_count_in_what_is_saved():
    """100 tokens, 16 + 4 of which stay: every unit saves 80% of its tokens."""
    splits = HeadSplits(shape_of(), evidence_of(), 16, 4)
    assert splits.units == 24
    assert splits.saved(splits.at(24), 100) == pytest.approx(0.8)
    assert splits.saved(splits.at(24), 10) == 0.0
    for share in (0.1, 0.4, 0.8):
        units = splits.units_to_save(share, 100)
        assert units * splits.unit_share(100) >= share - 1e-9
        assert (units - 1) * splits.unit_share(100) < share
    assert splits.units_to_save(0.81, 100) is None


def test_layers_with_sliding_windows_count_as_many_tokens_as_they_hold():
    """Of 100 tokens two layers hold 100, and the one in between 25."""
    shape = shape_of(clusterable=(True, False, True), sliding_window=25)
    splits = HeadSplits(shape, evidence_of(), 16, 4)
    assert splits.saved(splits.at(16), 100) == pytest.approx(2 * 80 / 225)
    assert splits.saved(splits.at(16), 22) == pytest.approx(2 * 2 / 66)


def test_the_most_units_within_a_predicted_loss():
    splits = HeadSplits(shape_of(), evidence_of(scale=0.1), 16, 4)
    for max_loss in (0.0, 0.01, 0.1, 9.0):
        units = splits.units_within(max_loss)
        assert splits.rise(units) <= max_loss
        assert units == splits.most or splits.rise(units + 1) > max_loss


def windows(cheap):
    """w = 16 and 64 with these costs."""
    return {
        w: HeadSplits(shape_of(), evidence_of(scale=scale), w, 4)
        for w, scale in zip((16, 64), cheap, strict=True)
    }


def test_a_wide_window_serves_long_contexts_and_a_narrow_one_short():
    both = windows((0.4, 0.04))
    assert best_recent(both, 4096, save=0.3) == 64
    assert best_recent(both, 80, save=0.3) == 16
    assert best_recent(both, 4096, max_loss=0.01) == 64
    assert best_recent(both, 80, max_loss=0.01) == 16


def test_of_equal_windows_the_narrow_one_serves():
    assert best_recent(windows((0.0, 0.0)), 4096, save=0.3) == 16
    assert best_recent(windows((0.1, 0.1)), 4096, max_loss=0.01) == 16


def test_more_than_any_window_can_save_is_refused():
    with pytest.raises(CalibrationError, match=r"save 90.0%.*80.0% with an exact window of 16"):
        best_recent(windows((1.0, 1.0)), 100, save=0.9)
    with pytest.raises(ValueError, match="either"):
        best_recent(windows((1.0, 1.0)), 100)
