"""Attention maps small enough to look at: pooled to cells and stored as bytes."""

from __future__ import annotations

import base64
import math

import torch
from torch import Tensor

from chai_attention.calibration.pairs import maps_of
from chai_attention.integrations.transformers.intervene import LayerCall


class MapPictures:
    """Pooled maps of all heads of every layer, for one request.

    Args:
        length: tokens of the request.
        cells: cells per side at most.
    """

    def __init__(self, length: int, cells: int):
        self.block = math.ceil(length / cells)
        self.encoded: dict[int, str] = {}

    def __call__(self, call: LayerCall, out: Tensor) -> None:
        """Keep a layer's maps; the layer's output is not needed."""
        query, key = call.query[0], call.key[0]
        heads, length, _ = query.shape
        cells = math.ceil(length / self.block)
        sums = torch.zeros(heads, cells, cells, device=query.device)
        cell = torch.arange(length, device=query.device) // self.block
        for maps in maps_of(query, key, call.scale, call.softcap):
            seen = maps.whole.shape[-1]
            by_key = maps.whole.new_zeros(heads, maps.whole.shape[1], cells)
            by_key.index_add_(2, cell[:seen], maps.whole)
            sums.index_add_(1, cell[maps.rows], by_key)
        queries = torch.bincount(cell, minlength=cells)
        self.encoded[call.layer] = encode(sums / queries[:, None])


def encode(maps: Tensor) -> str:
    """Base64 of the lower triangles of ``[H, C, C]`` probabilities, ``255 sqrt(p)`` in uint8.

    The square root spends more of the 256 steps on small probabilities, of which there are many.
    """
    rows, columns = torch.tril_indices(*maps.shape[1:], device=maps.device)
    values = (255 * maps[:, rows, columns].clamp(0, 1).sqrt()).round().to(torch.uint8)
    return base64.b64encode(values.cpu().numpy().tobytes()).decode("ascii")
