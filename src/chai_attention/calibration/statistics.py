"""Accumulated statistics of attention maps: bounded memory, whatever the amount of text."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from chai_attention.integrations.transformers.capture import capture

QUERY_ROWS = 256  # rows of the maps that exist at a time


class GramStatistics:
    """Sums, over sequences, the inner products of all heads' attention maps, per layer.

    k-means error of any clustering of the maps follows exactly from these ``[H, H]`` matrices
    (see `clustering.kmeans`), so the maps themselves, ``[H, S, S]`` each, are never stored.
    """

    def __init__(self, layers: int, heads: int):
        self.grams = torch.zeros(layers, heads, heads, dtype=torch.float64)
        self.sequences = 0

    def add(
        self, layer: int, query: Tensor, key: Tensor, scale: float, softcap: float | None
    ) -> None:
        """Add the causal maps of ``query [B, H, S, D]`` and ``key [B, G, S, D]``."""
        batch, heads, size, _ = query.shape
        keys = key.float().repeat_interleave(heads // key.shape[1], dim=1)
        position = torch.arange(size, device=query.device)
        for start in range(0, size, QUERY_ROWS):
            rows = slice(start, min(start + QUERY_ROWS, size))
            scores = query[:, :, rows].float() @ keys[:, :, : rows.stop].mT * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            future = position[: rows.stop] > position[rows, None]
            maps = torch.softmax(scores.masked_fill(future, -torch.inf), dim=-1)
            maps = maps.view(batch, heads, -1)
            self.grams[layer] += (maps @ maps.mT).sum(0).double().cpu()


@torch.no_grad()
def collect_grams(
    model: PreTrainedModel,
    windows: Tensor,
    layers: int,
    heads: int,
    *,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Run ``windows [N, S]`` of tokens through the model; return ``[layers, H, H]`` float64.

    ``progress`` is called with (sequences done, sequences in all).
    """
    statistics = GramStatistics(layers, heads)
    decoder = model.base_model  # the vocabulary's logits are not needed
    training = model.training
    model.eval()  # dropout would make every run a different one
    try:
        with capture(model, statistics.add):
            for batch in windows.split(batch_size):
                decoder(batch.to(model.device), use_cache=False)
                statistics.sequences += batch.shape[0]
                if progress is not None:
                    progress(statistics.sequences, windows.shape[0])
    finally:
        model.train(training)
    return statistics.grams


def cosine_similarity(gram: Tensor) -> Tensor:
    """``[..., H, H]`` cosine similarity of the points of a Gram matrix."""
    norm = gram.diagonal(dim1=-2, dim2=-1).clamp_min(1e-30).sqrt()
    return gram / (norm[..., :, None] * norm[..., None, :])
