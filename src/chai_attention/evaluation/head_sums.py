"""What the redundancy study keeps of attention maps: sums over entries, never the maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from chai_attention.calibration.pairs import maps_of
from chai_attention.integrations.transformers.intervene import LayerCall


class HeadSums:
    """Sums over the causal entries of all heads' maps, by request and stretch of queries.

    Stretch i holds the queries from ``lengths[i - 1]`` (0 for the first) to ``lengths[i]``, so
    that sums over the first n tokens, for every n of ``lengths``, are cumulative sums.

    Args:
        layers: layers to watch.
        heads: H.
        lengths: ascending, the last the length of a request.
    """

    def __init__(self, layers: Sequence[int], heads: int, lengths: Sequence[int]):
        self._place = {layer: place for place, layer in enumerate(layers)}
        self._bounds = list(zip([0, *lengths], lengths, strict=False))
        self._seen = [0] * len(layers)
        self._grams: list[list[Tensor]] = [[] for _ in layers]
        # of all requests: inner products and sums of probabilities on the first key
        self._first_gram = torch.zeros(len(layers), heads, heads, dtype=torch.float64)
        self._first_sum = torch.zeros(len(layers), heads, dtype=torch.float64)

    def __call__(self, call: LayerCall, out: Tensor) -> None:
        """Add a batch of whole requests; the layer's output is not needed."""
        place = self._place.get(call.layer)
        if place is None:
            return
        heads = call.query.shape[1]
        for query, key in zip(call.query, call.key, strict=True):
            grams = torch.zeros(len(self._bounds), heads, heads, dtype=torch.float64)
            for maps in maps_of(query, key, call.scale, call.softcap):
                for stretch, (start, stop) in enumerate(self._bounds):
                    rows = slice(max(0, start - maps.rows.start), max(0, stop - maps.rows.start))
                    part = maps.whole[:, rows].flatten(1)  # [H, rows * S]
                    if part.shape[1]:
                        grams[stretch] += (part @ part.T).double().cpu()
                first = maps.whole[:, :, 0]
                self._first_gram[place] += (first @ first.T).double().cpu()
                self._first_sum[place] += first.sum(1).double().cpu()
                del maps, first  # their memory serves the next ones
            self._grams[place].append(grams.cumsum(0))
            self._seen[place] += query.shape[1]

    def grams(self, place: int) -> Tensor:
        """``[N, lengths, H, H]``: inner products of the maps of the first n queries."""
        return torch.stack(self._grams[place])

    def first_share(self, place: int) -> float:
        """Mean probability that the heads give to the first key of a request."""
        return float(self._first_sum[place].mean() / self._seen[place])

    def correlation(self, place: int, without_first: bool = False) -> Tensor:
        """``[H, H]`` Pearson correlation of the heads' maps over all requests.

        Entries are those a query can see (key <= query); the zeros above the diagonal, which all
        heads share, are no entries. Heads whose map never varies get 0.

        Args:
            place: which of the watched layers.
            without_first: leave the first key of every request out, which many heads attend to
                for want of something better.
        """
        gram = self.grams(place)[:, -1].sum(0)
        requests = len(self._grams[place])
        length = self._bounds[-1][1]
        entries = requests * length * (length + 1) / 2
        # the probabilities of a query sum to 1
        total = torch.full((gram.shape[0],), float(self._seen[place]), dtype=torch.float64)
        if without_first:
            gram = gram - self._first_gram[place]
            total = total - self._first_sum[place]
            entries -= requests * length
        covariance = gram / entries - torch.outer(total, total) / entries**2
        deviation = covariance.diagonal().clamp_min(0).sqrt()
        scale = torch.outer(deviation, deviation)
        flat = scale <= 1e-12
        found = (covariance / torch.where(flat, 1.0, scale)).clamp(-1, 1)
        return torch.where(flat, 0.0, found).fill_diagonal_(1.0)
