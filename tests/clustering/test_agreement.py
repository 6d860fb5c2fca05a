"""Agreement of clusterings, against scikit-learn and against all matchings."""

from itertools import permutations

import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from chai_attention.clustering.agreement import adjusted_rand, kept_share


@pytest.mark.parametrize("heads", [1, 2, 5, 9, 32])
def test_adjusted_rand_is_scikit_learns(heads):
    first, second = torch.randint(max(1, heads // 2), (2, 20, heads))
    first[0], second[0] = 0, 0  # all together
    first[1], second[1] = torch.arange(heads), torch.arange(heads)  # all apart
    first[2], second[2] = 0, torch.arange(heads)
    second[3] = 7 - first[3]  # other names
    found = adjusted_rand(first, second)
    wanted = [adjusted_rand_score(a, b) for a, b in zip(first, second, strict=True)]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64))
    assert found[3] == 1


def test_adjusted_rand_broadcasts():
    rows = torch.randint(3, (4, 9))
    table = adjusted_rand(rows[:, None], rows[None])
    assert table.shape == (4, 4)
    torch.testing.assert_close(table, table.T)
    torch.testing.assert_close(table.diagonal(), torch.ones(4, dtype=torch.float64))


def test_kept_share_is_the_best_matching():
    for _ in range(20):
        before, after = torch.randint(4, (2, 9))
        best = max(
            sum(int(order[b] == a) for b, a in zip(before, after, strict=True))
            for order in permutations(range(4))
        )
        assert kept_share(before, after) == best / 9
    assert kept_share(torch.tensor([3, 3, 1]), torch.tensor([0, 0, 2])) == 1
