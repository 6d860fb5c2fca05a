import math

import numpy as np
import pytest

from chai_attention.evaluation.scores import Mean, average, mean_of, paired


def test_means_have_the_sample_deviation_over_root_n_as_error():
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    found = mean_of(values)
    assert found.mean == pytest.approx(0.6)
    assert found.error == pytest.approx(np.std(values, ddof=1) / math.sqrt(5))
    assert mean_of([3.0]) == Mean(3.0, 0.0)


def test_pairing_cancels_what_makes_items_hard():
    base = [1.0, 50.0, 7.0, 900.0]
    found = paired([value + 0.5 for value in base], base)
    assert found.mean == pytest.approx(0.5)
    assert found.error == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match=r"shorter|longer"):
        paired([1.0], [1.0, 2.0])


def test_tasks_count_the_same_and_are_independent():
    found = average([Mean(0.2, 0.03), Mean(0.6, 0.04)])
    assert found.mean == pytest.approx(0.4)
    assert found.error == pytest.approx(0.025)
