"""Statistics of attention maps, accumulated in memory that does not grow with the text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from chai_attention.calibration.pairs import maps_of
from chai_attention.integrations.transformers.devices import input_device
from chai_attention.integrations.transformers.intervene import LayerCall, capture
from chai_attention.integrations.transformers.logits import rows_at_once
from chai_attention.integrations.transformers.modes import evaluating
from chai_attention.progress import Report, silent

Later = Callable[[], None]
Watcher = Callable[[LayerCall, Tensor], Later | None]


class GramStatistics:
    """Sums, over sequences, the inner products of all heads' attention maps, per layer.

    k-means error of any clustering of the maps follows exactly from these ``[H, H]`` matrices
    (see `clustering.kmeans`), so the maps themselves, ``[H, S, S]`` each, are never stored.
    """

    def __init__(self, layers: int, heads: int):
        self.grams = torch.zeros(layers, heads, heads, dtype=torch.float64)

    @property
    def sums(self) -> dict[str, Tensor]:
        """The sums themselves, by name."""
        return {"grams": self.grams}

    def add(self, call: LayerCall, out: Tensor | None = None) -> Later:
        """See a layer's queries and keys, not its output; what is returned adds their maps."""
        heads = call.query.shape[1]
        gram = torch.zeros(heads, heads, dtype=torch.float64, device=call.query.device)
        for query, key in zip(call.query, call.key, strict=True):
            for maps in maps_of(query, key, call.scale, call.softcap):
                features = maps.whole.flatten(1)  # [H, R * S]
                gram += (features @ features.T).double()
                del maps, features  # their memory serves the next ones

        def later() -> None:
            self.grams[call.layer] += gram.cpu()

        return later


@torch.no_grad()
def observe(
    model: PreTrainedModel,
    sequences: Tensor,
    watchers: Sequence[Watcher],
    *,
    batch_size: int,
    start: int = 0,
    progress: Report = silent,
) -> None:
    """Run ``sequences [N, S]`` of tokens through the model and show every layer to ``watchers``.

    The first ``start`` sequences are left out: they were shown before. ``progress`` is called with
    (sequences done, sequences in all) after every batch, of ``batch_size`` sequences or, where they
    are long, fewer. What watchers compute, they compute in the dtypes they choose, whatever
    ``torch.autocast`` is in force. What they return is called behind the batch: there the host
    waits for the layers' devices, not for each layer.
    """
    left: list[Later] = []

    def show(call: LayerCall, out: Tensor) -> None:
        with torch.autocast(call.query.device.type, enabled=False):
            for watcher in watchers:
                if (later := watcher(call, out)) is not None:
                    left.append(later)

    decoder = model.base_model  # the vocabulary's logits are not needed
    device = input_device(model)
    with evaluating(model), capture(model, show):
        done = start
        for batch in sequences[start:].split(rows_at_once(batch_size, sequences.shape[1])):
            if not len(batch):  # all were shown before
                break
            decoder(batch.to(device), use_cache=False)
            done += batch.shape[0]
            for later in left:
                later()
            left.clear()
            progress(done, sequences.shape[0])


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
