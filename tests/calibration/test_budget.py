"""The search for the largest saving within a loss, on losses that are known."""

import pytest

from chai_attention.calibration.budget import CONFIDENCE, largest_within, most_tries
from chai_attention.calibration.perplexity import PairedRise

ERROR = 0.001


@pytest.mark.parametrize("guess", [1, 3, 17, 60, 500])
@pytest.mark.parametrize("answer", [1, 2, 17, 59, 60])
def test_it_finds_the_last_that_holds(answer, guess):
    calls = []

    def measure(units):
        calls.append(units)
        return [PairedRise(0.01 * units / (answer + 0.5) - CONFIDENCE * ERROR, ERROR)]

    kept = largest_within(measure, 60, 0.01, guess)
    assert kept.units == answer
    assert kept.tried == len(calls) == len(set(calls))
    assert kept.tried <= 12
    assert kept.rises == measure(answer)


def test_the_standard_error_counts():
    assert largest_within(lambda units: [PairedRise(0.009, 0.001)], 10, 0.01, 4).units == 0
    assert largest_within(lambda units: [PairedRise(0.009, 0.0005)], 10, 0.01, 4).units == 10


def test_if_nothing_holds_the_loss_of_one_unit_is_told():
    kept = largest_within(lambda units: [PairedRise(0.1 * units, 0.0)], 10, 0.01, 6)
    assert (kept.units, kept.rises[0].rise) == (0, 0.1)


def test_every_length_has_to_keep_to_the_loss():
    def measure(units):
        return [PairedRise(0.001 * units, 0.0), PairedRise(0.002 * units, 0.0)]

    kept = largest_within(measure, 60, 0.01, 6)
    assert kept.units == 5
    assert kept.rises == measure(5)


@pytest.mark.parametrize("resolution", [1, 3, 7])
@pytest.mark.parametrize("answer", [1, 2, 17, 59, 60])
def test_the_answer_falls_short_by_less_than_the_resolution(answer, resolution):
    kept = largest_within(
        lambda units: [PairedRise(0.0 if units <= answer else 1.0, 0.0)], 60, 0.5, 20, resolution
    )
    assert answer - resolution < kept.units <= answer


@pytest.mark.parametrize("guess", [0, 1, 2, 5, 9, 30])
@pytest.mark.parametrize("most", [1, 2, 3, 9, 23, 30])
@pytest.mark.parametrize("resolution", [1, 2, 5])
def test_the_number_of_tries_is_known_before(most, guess, resolution):
    def tried(answer):
        return largest_within(
            lambda units: [PairedRise(0.0 if units <= answer else 1.0, 0.0)],
            most, 0.5, guess, resolution,
        ).tried  # fmt: skip

    found = max(map(tried, range(most + 1)))
    bound = most_tries(most, guess, resolution)
    assert found == bound if resolution == 1 else found <= bound
