"""The results of a redundancy study, and their JSON file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chai_attention.errors import ChaiError
from chai_attention.results import from_json, problem_of, verified, write_result

SCHEMA_VERSION = 1
KIND = "redundancy"
Matrix = list[list[float]]


class RedundancyError(ChaiError):
    """A redundancy study cannot be made as asked, or its file cannot be used."""


@dataclass(frozen=True)
class Stability:
    """Whether memberships stay while a request grows; means over requests.

    Attributes:
        agreement: ``[N, N]`` adjusted Rand index of the memberships from the first n tokens, for
            every pair of lengths.
        agreement_error: ``[N, N]`` its standard error over requests.
        kept: ``[N]`` share of heads that are still in their cluster of the first W tokens, W the
            shortest length (see `clustering.agreement.kept_share`).
        kept_error: ``[N]``.
        static: ``[N]`` adjusted Rand index with the membership from all other requests together.
        static_error: ``[N]``.
    """

    agreement: Matrix
    agreement_error: Matrix
    kept: list[float]
    kept_error: list[float]
    static: list[float]
    static_error: list[float]


@dataclass(frozen=True)
class LayerRedundancy:
    """One layer.

    Attributes:
        layer: its index in the model.
        correlation: ``[H, H]`` Pearson correlation of the heads' maps.
        without_first: ``[H, H]`` the same without the first key of every request.
        first_share: mean probability on the first key.
        inertia: k-means inertia for 1 to H clusters, per request.
        elbow: the elbow of that curve; H if it has none.
        clusters: k, which memberships here have.
        representatives: ``[H]`` of the membership from all requests.
        stability: None with k = 1 or k = H, where no membership can change.
    """

    layer: int
    correlation: Matrix
    without_first: Matrix
    first_share: float
    inertia: list[float]
    elbow: int
    clusters: int
    representatives: list[int]
    stability: Stability | None

    @property
    def sizes(self) -> list[int]:
        """Heads per cluster, largest first."""
        reps = self.representatives
        return sorted((reps.count(head) for head in set(reps)), reverse=True)

    @property
    def mean_correlation(self) -> float:
        """Mean over pairs of different heads."""
        return off_diagonal(self.correlation)


@dataclass(frozen=True)
class Prompt:
    """Maps of one text for looking at.

    Attributes:
        name: for people.
        tokens: the text, token by token.
        block: tokens per cell of a map, 1 if nothing was pooled.
        lengths: memberships were found from so many first tokens.
        representatives: ``[layers, lengths, H]``.
        maps: per layer, base64 of uint8 ``[H, C (C + 1) / 2]``: the lower triangle of C x C cells,
            row by row. A cell is ``255 sqrt(p)``, p the mean over its queries of the probability
            on its keys.
    """

    name: str
    tokens: list[str]
    block: int
    lengths: list[int]
    representatives: list[list[list[int]]]
    maps: list[str]


@dataclass(frozen=True)
class Redundancy:
    """A study of one model on one text.

    Attributes:
        model: name, architecture, layers, heads, kv_heads, head_dim, dtype.
        machine: as in the files of ``chai bench``, and the release of transformers.
        text: sources, requests, length, digest, seed.
        lengths: numbers of first tokens that memberships were found from.
        layers: those with full attention.
        stability: mean over the layers that have one.
        prompts: maps to look at.
    """

    model: Mapping[str, Any]
    machine: Mapping[str, Any]
    text: Mapping[str, Any]
    lengths: list[int]
    layers: list[LayerRedundancy]
    stability: Stability | None
    prompts: list[Prompt]

    def save(self, path: Path) -> Path:
        """Write the file in one step.

        Raises:
            RedundancyError: it cannot be written.
        """
        contents = {"schema_version": SCHEMA_VERSION, "kind": KIND, **asdict(self)}
        return write_result(path, contents, RedundancyError, make_folder=True, indent=None)


def parse_redundancy(data: Any, path: Path) -> Redundancy:
    """Check the contents of a file.

    Raises:
        RedundancyError: they are not those of a study of this release.
    """
    try:
        data = verified(data, SCHEMA_VERSION)
        if (kind := data.pop("kind")) != KIND:
            raise ValueError(f"its kind is {kind!r}")
        study = from_json(Redundancy, data)
        _check(study)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RedundancyError(
            f"{path} is no redundancy study of this release ({problem_of(error)}): make it again"
        ) from error
    if not study.layers:
        raise RedundancyError(f"{path} holds no layer: make it again")
    return study


def off_diagonal(matrix: Matrix) -> float:
    """Mean of the entries off the diagonal; 1 where there are none."""
    size = len(matrix)
    if size == 1:
        return 1.0
    return (sum(map(sum, matrix)) - sum(matrix[i][i] for i in range(size))) / (size * (size - 1))


def _check(study: Redundancy) -> None:
    """Raise a ValueError where sizes do not fit together, or a membership is none."""
    heads, lengths = study.model["heads"], len(study.lengths)
    for layer in study.layers:
        for name in ("correlation", "without_first"):
            _require_shape(getattr(layer, name), (heads, heads), name)
        _require_shape(layer.inertia, (heads,), "inertia")
        _require_membership(layer.representatives, heads)
    for stability in (study.stability, *(layer.stability for layer in study.layers)):
        for name, value in vars(stability).items() if stability is not None else ():
            square = name.startswith("agreement")
            _require_shape(value, (lengths, lengths) if square else (lengths,), name)
    for prompt in study.prompts:
        if not len(prompt.maps) == len(prompt.representatives) == len(study.layers):
            raise ValueError(f"prompt {prompt.name!r} has maps of other layers")
        cells = math.ceil(len(prompt.tokens) / prompt.block)
        size = 4 * math.ceil(heads * cells * (cells + 1) // 2 / 3)
        if any(len(maps) != size for maps in prompt.maps):
            raise ValueError(f"prompt {prompt.name!r} has maps of another size")
        for rows in prompt.representatives:
            if len(rows) != len(prompt.lengths):
                raise ValueError(f"prompt {prompt.name!r} lacks memberships")
            for row in rows:
                _require_membership(row, heads)


def _require_membership(row: list[int], heads: int) -> None:
    """``rep[rep[h]] == rep[h]``."""
    whole = len(row) == heads and all(0 <= head < heads for head in row)
    if not whole or any(row[head] != head for head in row):
        raise ValueError("a membership is none")


def _require_shape(value: list[Any], shape: tuple[int, ...], name: str) -> None:
    if len(value) != shape[0]:
        raise ValueError(f"{name} has length {len(value)}, not {shape[0]}")
    for row in value if len(shape) > 1 else ():
        _require_shape(row, shape[1:], name)
