"""The shares of a budget against trying every way to spend it."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chai_attention.clustering.allocation import Allocation, EqualError

CURVES = st.lists(
    st.lists(st.floats(0, 10), min_size=0, max_size=4).map(
        lambda steps: [0.0, *np.cumsum(steps).tolist()]
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(CURVES)
def test_no_other_allocation_is_cheaper(curves):
    plan = Allocation(curves)
    assert plan.most == sum(len(curve) - 1 for curve in curves)
    for units in range(plan.most + 1):
        removed = plan.removed(units)
        assert sum(removed) == units
        price = sum(curve[n] for curve, n in zip(curves, removed, strict=True))
        best = min(
            sum(curve[n] for curve, n in zip(curves, choice, strict=True))
            for choice in itertools.product(*(range(len(curve)) for curve in curves))
            if sum(choice) == units
        )
        assert price == pytest.approx(best)
        assert plan.costs[units] == pytest.approx(best)


@settings(max_examples=60, deadline=None)
@given(CURVES)
def test_a_level_keeps_the_worst_layer_as_good_as_possible(curves):
    plan = EqualError(curves)
    for units in range(plan.most + 1):
        removed = plan.removed(units)
        assert sum(removed) == units
        worst = max(curve[n] for curve, n in zip(curves, removed, strict=True))
        best = min(
            max(curve[n] for curve, n in zip(curves, choice, strict=True))
            for choice in itertools.product(*(range(len(curve)) for curve in curves))
            if sum(choice) == units
        )
        assert worst == pytest.approx(best)


@pytest.mark.parametrize("kind", [Allocation, EqualError])
@pytest.mark.parametrize("units", [-1, 4])
def test_more_than_there_is_cannot_be_removed(kind, units):
    with pytest.raises(ValueError, match="0 to 3 units"):
        kind([[0.0, 1.0], [0.0, 1.0, 2.0], [0.0]]).removed(units)
