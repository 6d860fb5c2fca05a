"""How redundant the heads of a model are, and whether their clusters stay.

The questions of CHAI, section 2, for any model and text: correlation of heads per layer, k-means
error against the number of clusters with its elbow, sizes of clusters, and whether the clusters
that the first tokens of a request show are those of the whole request.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chai_attention.benchmarking.timing import machine
from chai_attention.calibration.statistics import observe
from chai_attention.clustering.agreement import adjusted_rand, kept_share
from chai_attention.clustering.assign import SCORES
from chai_attention.clustering.elbow import absolute_errors, elbow
from chai_attention.clustering.kmeans import kmeans
from chai_attention.evaluation.frontier import digest_of
from chai_attention.evaluation.head_sums import HeadSums
from chai_attention.evaluation.map_pictures import MapPictures
from chai_attention.evaluation.redundancy_files import (
    LayerRedundancy,
    Prompt,
    Redundancy,
    RedundancyError,
    Stability,
)
from chai_attention.integrations.transformers.devices import input_device
from chai_attention.progress import Progress, quiet
from chai_attention.runtime.shape import ModelShape, describe

FIRST = 5  # tokens that decide a membership in the paper
NAME_LENGTH = 40  # characters of a text that name it
Shown = tuple[str, Tensor, list[str]]  # name, tokens [1, T], tokens as text


def default_lengths(length: int) -> list[int]:
    """5 (the paper's), then 16 and its doubles up to the length of a request."""
    doubled = [16 * 2**i for i in range(max(1, length).bit_length())]
    return [n for n in (FIRST, *doubled) if n < length] + [length]


def parse_lengths(text: str) -> list[int]:
    """Read ``5,32,128``.

    Raises:
        RedundancyError: no whole numbers.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise RedundancyError(
            f"lengths are whole numbers separated by commas, not {text!r}"
        ) from None


def shown_prompts(
    tokenizer: PreTrainedTokenizerBase, windows: Tensor, count: int, texts: Sequence[str], most: int
) -> list[Shown]:
    """Choose what to look at: the first requests of the study, and texts.

    Args:
        tokenizer: no special tokens are added, as in calibration text.
        windows: ``[N, S]`` requests.
        count: how many of them are shown.
        texts: texts to show too.
        most: tokens that the model can read.

    Raises:
        RedundancyError: a text of fewer than 2 tokens or more than ``most``.
    """
    chosen = [(f"request {i + 1}", window.tolist()) for i, window in enumerate(windows[:count])]
    for text in texts:
        name = text if len(text) <= NAME_LENGTH else f"{text[: NAME_LENGTH - 1]}…"
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not 2 <= len(ids) <= most:
            raise RedundancyError(
                f"{name!r} has {len(ids)} tokens: a text to look at has 2 to {most}"
            )
        chosen.append((name, ids))
    return [
        (name, torch.tensor([ids]), [str(tokenizer.decode([token])) for token in ids])
        for name, ids in chosen
    ]


@torch.no_grad()
def study(
    model: PreTrainedModel,
    windows: Tensor,
    *,
    name: str,
    text: Mapping[str, Any],
    prompts: Sequence[Shown] = (),
    lengths: Sequence[int] | None = None,
    clusters: int | None = None,
    cells: int = 48,
    batch_size: int = 4,
    progress: Progress = quiet,
) -> Redundancy:
    """Study a model on requests of equal length.

    Args:
        model: any supported model; layers with sliding-window attention are left out.
        windows: ``[N, S]`` int64 tokens, a request each.
        name: of the model, for the file.
        text: sources (their names) and seed (that the windows were chosen by), for the file.
        prompts: (name, tokens ``[1, T]``, tokens as text) whose maps are kept to look at.
        lengths: first tokens that memberships are found from, ascending, at most S; the last is
            made S. None takes `default_lengths`.
        clusters: k of every layer. None takes the elbow of each layer's curve (CHAI, 3.2).
        cells: maps of prompts are pooled to at most so many cells per side.
        batch_size: requests that run at once.
        progress: called with (what, done, in all).

    Raises:
        RedundancyError: lengths or clusters that do not fit, fewer than two requests, or no
            layer with full attention.
        UnsupportedModelError: the model's attention cannot be reached.
    """
    shape = describe(model)
    size = windows.shape[1]
    steps = _lengths(lengths, size)
    watched = [layer for layer in range(shape.layers) if shape.clusterable[layer]]
    if not watched:
        raise RedundancyError(f"no layer of {name} has full attention: there is nothing to study")
    if len(windows) < 2:
        raise RedundancyError(
            f"standard errors need at least 2 requests, not {len(windows)}: give more text, or "
            "shorter requests"
        )
    if clusters is not None and not 1 <= clusters <= shape.heads:
        raise RedundancyError(f"clusters are 1 to {shape.heads}, the heads, not {clusters}")
    sums = HeadSums(watched, shape.heads, steps)
    told = partial(progress, "attention maps")
    observe(model, windows, [sums], batch_size=batch_size, progress=told)
    layers, by_request = [], []
    for place, layer in enumerate(watched):
        progress("clusters", place, len(watched))
        found, single = _layer(sums, place, layer, clusters)
        layers.append(found)
        if single is not None:
            by_request.append(single)
    counts = {layer.layer: layer.clusters for layer in layers}
    return Redundancy(
        model={
            "name": name,
            **{
                key: getattr(shape, key)
                for key in ("architecture", "layers", "heads", "kv_heads", "head_dim")
            },
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        machine={**machine(input_device(model).type), "transformers": transformers.__version__},
        text={
            **text,
            "requests": len(windows),
            "length": size,
            "digest": digest_of(windows),
        },
        lengths=steps,
        layers=layers,
        # a request's mean over layers is the unit: layers of one request are not independent
        stability=_summary(torch.stack(by_request).mean(0)) if by_request else None,
        prompts=[
            _prompt(model, shape, prompt, counts, steps, cells, progress) for prompt in prompts
        ],
    )


def _lengths(asked: Sequence[int] | None, size: int) -> list[int]:
    """The lengths, ending with the whole request."""
    if asked is None:
        return default_lengths(size)
    steps = list(asked)
    if not steps or steps[0] < 1 or steps[-1] > size or steps != sorted(set(steps)):
        raise RedundancyError(
            f"lengths are ascending numbers of tokens, 1 to {size}, the request's, not {steps}"
        )
    return steps if steps[-1] == size else [*steps, size]


def _layer(
    sums: HeadSums, place: int, layer: int, clusters: int | None
) -> tuple[LayerRedundancy, Tensor | None]:
    """One layer, and per request what its stability is the mean of: ``[N, 3 rows, L, L]``."""
    grams = sums.grams(place)  # [N, L, H, H]
    requests, lengths, heads, _ = grams.shape
    whole = grams[:, -1]
    pooled = whole.mean(0)
    curve = absolute_errors(pooled, heads, SCORES)
    first = curve[0] or 1.0
    bend = elbow(list(range(1, heads + 1)), [error / first for error in curve])
    k = bend if clusters is None else clusters
    static = kmeans(pooled[None], k)[0]
    single = None
    if 1 < k < heads:
        member = kmeans(grams.flatten(0, 1), k).view(requests, lengths, heads)
        others = kmeans(whole.sum(0) - whole, k)  # [N, H], no request judges its own table
        single = _by_request(member, others)
    found = LayerRedundancy(
        layer=layer,
        correlation=_rounded(sums.correlation(place)),
        without_first=_rounded(sums.correlation(place, without_first=True)),
        first_share=round(sums.first_share(place), 5),
        inertia=[float(f"{error:.6g}") for error in curve],
        elbow=bend,
        clusters=k,
        representatives=static.tolist(),
        stability=None if single is None else _summary(single),
    )
    return found, single


def _by_request(member: Tensor, static: Tensor) -> Tensor:
    """``[N, L + 2, L]``: agreement of all pairs of lengths, share kept, agreement with static."""
    agreement = adjusted_rand(member[:, :, None], member[:, None, :])  # [N, L, L]
    kept = [[kept_share(rows[0], row) for row in rows] for rows in member]
    fixed = adjusted_rand(member, static[:, None])  # [N, L]
    shares = torch.tensor(kept, dtype=torch.float64)
    return torch.cat([agreement, shares[:, None], fixed[:, None]], dim=1)


def _summary(single: Tensor) -> Stability:
    """Means and standard errors over requests."""
    mean, error = single.mean(0), single.std(0) / math.sqrt(len(single))
    return Stability(
        agreement=_rounded(mean[:-2]),
        agreement_error=_rounded(error[:-2]),
        kept=_rounded(mean[-2]),
        kept_error=_rounded(error[-2]),
        static=_rounded(mean[-1]),
        static_error=_rounded(error[-1]),
    )


def _prompt(
    model: PreTrainedModel,
    shape: ModelShape,
    prompt: Shown,
    counts: dict[int, int],
    steps: Sequence[int],
    cells: int,
    progress: Progress,
) -> Prompt:
    """Maps and memberships of one prompt, by the numbers of clusters found for the text."""
    name, tokens, words = prompt
    length = tokens.shape[1]
    lengths = [*(n for n in steps if n < length), length]
    layers = list(counts)
    sums = HeadSums(layers, shape.heads, lengths)
    pictures = MapPictures(length, cells)
    told = partial(progress, f"maps of {name}")
    observe(model, tokens, [sums, pictures], batch_size=1, progress=told)
    return Prompt(
        name=name,
        tokens=words,
        block=pictures.block,
        lengths=lengths,
        representatives=[
            kmeans(sums.grams(place)[0], counts[layer]).tolist()
            for place, layer in enumerate(layers)
        ],
        maps=[pictures.encoded[layer] for layer in layers],
    )


def _rounded(values: Tensor) -> Any:
    """Nested lists with four decimals: further ones are noise and fill the file."""
    return torch.round(values.double().cpu(), decimals=4).tolist()
