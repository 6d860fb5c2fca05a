"""Accumulated statistics of attention maps: bounded memory, whatever the amount of text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from chai_attention.calibration.pairs import maps_of
from chai_attention.integrations.transformers.capture import AttentionCall, Callback, capture
from chai_attention.integrations.transformers.logits import rows_at_once
from chai_attention.integrations.transformers.modes import evaluating


class GramStatistics:
    """Sums, over sequences, the inner products of all heads' attention maps, per layer.

    k-means error of any clustering of the maps follows exactly from these ``[H, H]`` matrices
    (see `clustering.kmeans`), so the maps themselves, ``[H, S, S]`` each, are never stored.
    """

    def __init__(self, layers: int, heads: int):
        self.grams = torch.zeros(layers, heads, heads, dtype=torch.float64)

    def add(self, call: AttentionCall, out: Tensor | None = None) -> None:
        """Add the causal maps of a layer's queries and keys; the output is not needed."""
        for query, key in zip(call.query, call.key, strict=True):
            for maps in maps_of(query, key, call.scale, call.softcap):
                features = maps.whole.flatten(1)  # [H, R * S]
                self.grams[call.layer] += (features @ features.T).double().cpu()
                del maps, features  # their memory serves the next ones


@torch.no_grad()
def observe(
    model: PreTrainedModel,
    windows: Tensor,
    watchers: Sequence[Callback],
    *,
    batch_size: int,
    start: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Run ``windows [N, S]`` of tokens through the model and show every layer to ``watchers``.

    The first ``start`` windows are left out: they were shown before. ``progress`` is called with
    (sequences done, sequences in all) after every batch, of ``batch_size`` windows or, where they
    are long, fewer. What watchers compute, they compute in
    the dtypes they choose, whatever ``torch.autocast`` is in force.
    """

    def show(call: AttentionCall, out: Tensor) -> None:
        with torch.autocast(call.query.device.type, enabled=False):
            for watcher in watchers:
                watcher(call, out)

    decoder = model.base_model  # the vocabulary's logits are not needed
    with evaluating(model), capture(model, show):
        done = start
        for batch in windows[start:].split(rows_at_once(batch_size, windows.shape[1])):
            if not len(batch):  # all were shown before
                break
            decoder(batch.to(model.device), use_cache=False)
            done += batch.shape[0]
            if progress is not None:
                progress(done, windows.shape[0])


def cosine_similarity(gram: Tensor) -> Tensor:
    """``[..., H, H]`` cosine similarity of the points of a Gram matrix."""
    norm = gram.diagonal(dim1=-2, dim2=-1).clamp_min(1e-30).sqrt()
    return gram / (norm[..., :, None] * norm[..., None, :])


def rounded(table: Tensor | None, digits: int) -> tuple[tuple[tuple[float, ...], ...], ...] | None:
    """``[L, H, H]`` as tuples of numbers with so many significant digits."""
    if table is None:
        return None
    return tuple(
        tuple(tuple(float(f"{x:.{digits}g}") for x in row) for row in layer)
        for layer in torch.as_tensor(table).tolist()
    )
