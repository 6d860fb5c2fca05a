import torch

from chai_attention.ops import window_gram
from helpers import definition


def test_gram_is_of_the_causal_attention_maps():
    batch, heads, groups, window, dim = 2, 6, 3, 7, 16
    query = torch.randn(batch, heads, window, dim)
    key = torch.randn(batch, groups, window, dim)
    # with V the unit vectors, attention returns its own probabilities
    unit = torch.eye(window).expand(batch, groups, window, window)
    everyone = torch.arange(heads).expand(batch, heads)
    maps = definition(query, key, unit, everyone, 0.25)  # [B, W, H, W]
    maps = maps.transpose(1, 2).flatten(2)
    got = window_gram(query, key, scale=0.25)
    torch.testing.assert_close(got.double(), maps @ maps.mT, atol=1e-5, rtol=0)
