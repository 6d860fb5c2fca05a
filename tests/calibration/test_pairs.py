"""Blocks of queries: bounded whatever the length, and without a trace in the results."""

import pytest
import torch

from chai_attention.calibration import backward, pairs
from chai_attention.calibration.costs import ExactWindow, OffsetStatistics, collect_costs
from chai_attention.calibration.pairs import bands_of, gradient_costs, value_costs
from chai_attention.calibration.statistics import GramStatistics, observe
from chai_attention.evaluation.head_sums import HeadSums
from chai_attention.evaluation.map_pictures import MapPictures
from chai_attention.integrations.transformers import logits
from chai_attention.integrations.transformers.intervene import LayerCall
from chai_attention.ops import reference_backend
from largest_tensor import largest_tensor
from tiny_models import tiny_model


def states(heads, groups, size, dim=8):
    draw = torch.Generator().manual_seed(size)
    return (
        torch.randn(heads, size, dim, generator=draw),
        torch.randn(groups, size, dim, generator=draw),
        torch.randn(groups, size, dim, generator=draw),
        torch.randn(heads, size, dim, generator=draw),
    )


@pytest.mark.parametrize("size", [1, 2, 63, 129, 700])
@pytest.mark.parametrize("scores", [1, 100, 4096, 50_000, 1 << 27])
def test_blocks_hold_every_query_once_and_few_scores(scores, size, monkeypatch):
    monkeypatch.setattr(pairs, "SCORES", scores)
    found = list(pairs._blocks(6, size))
    assert [n for rows in found for n in range(rows.start, rows.stop)] == list(range(size))
    for rows in found:
        count = rows.stop - rows.start
        assert count <= pairs.ROWS
        assert count == 1 or 6 * count * rows.stop <= scores


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("size", [1, 5, 63, 129])
@pytest.mark.parametrize("scores", [1, 700, 5000])
def test_costs_of_blocks_are_those_of_all_queries_at_once(
    scores, size, groups, softcap, monkeypatch
):
    query, key, value, gradient = states(6, groups, size)
    recents, sinks = [1, 4, 19, 200], 3
    offsets = [torch.randn(6, 6) for _ in recents]
    whole = value.repeat_interleave(6 // groups, 0)

    def found():
        total = torch.zeros(2, len(recents), 6, 7)
        for bands in bands_of(query, key, 0.4, softcap, recents, sinks):
            for place, costs in enumerate(
                gradient_costs(bands, value, gradient[:, bands.rows], offsets)
            ):
                total[0, place] += torch.cat([costs.sharing, costs.streaming[:, None]], 1)
        for bands in bands_of(query, key, 0.4, softcap, recents, sinks):
            for place, costs in enumerate(value_costs(bands, whole, offsets)):
                total[1, place] += torch.cat([costs.sharing, costs.streaming[:, None]], 1)
        return total

    want = found()
    monkeypatch.setattr(pairs, "SCORES", scores)
    torch.testing.assert_close(found(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sinks", [0, 3, 40])
@pytest.mark.parametrize("scores", [1, 900, 1 << 27])
def test_bands_divide_the_keys_a_query_sees(scores, sinks, monkeypatch):
    """Each key in one band of each query, local and far by its distance; all weigh what they do."""
    monkeypatch.setattr(pairs, "SCORES", scores)
    query, key, _, _ = states(2, 2, 45)
    recents = [1, 7, 46, 60]
    logits = (query @ key.mT).double()
    for bands in bands_of(query, key, 1.0, None, recents, sinks):
        for row in range(bands.rows.stop - bands.rows.start):
            position = bands.rows.start + row
            seen = []
            for number, band in enumerate(bands.bands):
                weights, lse = band.weights[:, row], band.lse[:, row]
                keys = torch.arange(band.keys.start, band.keys.stop)[weights[0] > 0]
                seen += keys.tolist()
                assert bool((keys < sinks).all()) == (sinks > 0 and number == 0) or not len(keys)
                want = logits[:, position, keys].logsumexp(-1)
                torch.testing.assert_close(lse.double(), want, rtol=1e-5, atol=1e-5)
            assert sorted(seen) == list(range(position + 1))
            for w, count in zip(recents, bands.local, strict=True):
                local = [
                    key
                    for band in bands.bands[:count]
                    for key in torch.arange(band.keys.start, band.keys.stop)[
                        band.weights[0, row] > 0
                    ].tolist()
                ]
                assert sorted(local) == [
                    n for n in range(position + 1) if n < sinks or n > position - w
                ]


@pytest.mark.parametrize("size", [700, 1401])
@pytest.mark.parametrize("evidence", ["maps", "offsets", "redundancy", "pictures", "gradient"])
def test_no_tensor_grows_with_the_square_of_the_length(evidence, size, monkeypatch):
    """Operations of torch included: scores of a block, or what grows with the length alone."""
    monkeypatch.setattr(pairs, "SCORES", 30_000)
    query, key, value, gradient = states(4, 2, size)
    call = LayerCall(0, query[None], key[None], value[None], 1.0, None)
    with largest_tensor() as made:
        if evidence == "maps":
            GramStatistics(1, 4).add(call)
        elif evidence == "offsets":
            OffsetStatistics(1, 4, [ExactWindow(4, 2), ExactWindow(64, 2)]).add(call)
        elif evidence == "redundancy":
            HeadSums([0], 4, [5, 300, size])(call, query)
        elif evidence == "pictures":
            MapPictures(size, 16)(call, query)
        else:
            offset = torch.zeros(4, 4)
            for bands in bands_of(query, key, 1.0, None, [4, 64], 2):
                gradient_costs(bands, value, gradient[:, bands.rows], [offset, offset])
    assert made.numbers <= max(30_000, query.numel())


@pytest.mark.parametrize("scores", [1, 333, 1 << 27])
@pytest.mark.parametrize("kind", ["gradient", "value"])
def test_the_size_of_blocks_changes_no_cost_of_a_model(kind, scores, monkeypatch):
    model, ids = tiny_model("gemma2"), torch.randint(3, 97, (2, 33))
    exact = [ExactWindow(5, 2), ExactWindow(12, 2)]
    want = collect_costs(model, ids, kind, exact=exact)
    monkeypatch.setattr(pairs, "SCORES", scores)
    for got, one in zip(collect_costs(model, ids, kind, exact=exact), want, strict=True):
        torch.testing.assert_close(got.sharing, one.sharing, rtol=1e-4, atol=1e-10)
        torch.testing.assert_close(got.streaming, one.streaming, rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("keep", [0, 1e9], ids=["recomputed", "kept"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_models_evidence_makes_nothing_that_grows_with_the_square_of_the_length(
    family, keep, monkeypatch
):
    """Forward and backward, loss included; of Gemma 2's sliding layers a mask for all heads."""
    size, exact = 900, [ExactWindow(4, 2), ExactWindow(64, 2)]
    monkeypatch.setattr(pairs, "SCORES", 60_000)
    monkeypatch.setattr(reference_backend, "SCORES", 60_000)
    monkeypatch.setattr(logits, "LOGITS", 60_000)
    monkeypatch.setattr(backward, "KEEP_BYTES", keep)
    model, ids = tiny_model(family), torch.randint(3, 97, (1, size))
    model.config.max_position_embeddings = size
    grams, offsets = GramStatistics(3, 6), OffsetStatistics(3, 6, exact)
    with largest_tensor() as made:
        observe(model, ids, [grams.add, offsets.add], batch_size=1)
        collect_costs(model, ids, "gradient", exact=exact)
    mask = size * size if family == "gemma2" else 0
    assert made.numbers <= max(60_000, 2 * 48 * size, mask)
    assert max(60_000, 2 * 48 * size) < size * size / 8
