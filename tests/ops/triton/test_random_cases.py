"""Random cases of all kernels, on a GPU if there is one, else interpreted and few.

CHAI_RANDOM_CASES says how many, CHAI_RANDOM_SHARD=i/n takes one of n parts by configuration, so
that no two parts compile the same: benchmarks/gpu_random.py runs all parts at a time.
CHAI_RANDOM_STREAMING=1 takes cases with an exact window and streaming heads.
"""

import os

import pytest
import torch

pytest.importorskip("triton")

from random_cases import CONFIGURATIONS, KINDS, run_case

CUDA = torch.cuda.is_available()
COUNT = int(os.environ.get("CHAI_RANDOM_CASES", CONFIGURATIONS if CUDA else 16))
PART, PARTS = map(int, os.environ.get("CHAI_RANDOM_SHARD", "0/1").split("/"))
NUMBERS = [
    pytest.param(n, marks=pytest.mark.exhaustive if n >= len(KINDS) else ())
    for n in range(COUNT)
    if n % CONFIGURATIONS % PARTS == PART
]


@pytest.mark.parametrize("number", NUMBERS)
def test_kernels_are_the_definition(number, nan_memory):
    run_case(number, most=700 if CUDA else 70)
