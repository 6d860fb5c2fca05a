"""`ClusterProfile`: what calibration found for a model, as a readable JSON file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chai_attention.atomic_write import write_whole
from chai_attention.errors import ProfileError
from chai_attention.profile_checks import misfits, problems_of, tuples
from chai_attention.profile_files import EXPORTED, load_corrections, save_corrections
from chai_attention.strict_json import load_json

if TYPE_CHECKING:
    from torch import Tensor

# 1: neither streaming heads nor ranks; 2: no ranks. The lowest that says all is written
SCHEMA_VERSION = 3
ONLINE, STATIC, BLEND = "online", "static", "blend"
DEFAULT_WINDOW = 32
FOR_EVER = 10**9  # tokens of a context in which a recent window counts for nothing
_TABLES = ("representatives", "streaming", "error", "similarity", "costs", "offsets")

# layers x clusters, as published for CHAI (ICML 2024, https://arxiv.org/abs/2403.08058)
PUBLISHED: dict[str, tuple[int, tuple[tuple[int, int], ...]]] = {
    "llama-7b": (32, ((18, 32), (14, 4))),
    "llama-33b": (52, ((18, 48), (8, 36), (6, 24), (2, 8), (26, 6))),
}

# not of every profile, so that simple ones stay readable
_LATER = ("probe_start", "features", "blend", "recent", "sinks", "tensor_parallel")
_SINCE = {"streaming": 2, "tensor_parallel": 3}  # the schema version that brought a key


@dataclass(frozen=True)
class ModelShape:
    """The attention of a model.

    Attributes:
        architecture: the config's ``model_type``.
        layers: number of decoder layers.
        heads: H, query heads per layer.
        kv_heads: G, K/V heads per layer; divides H.
        head_dim: D.
        clusterable: per layer, False for sliding-window layers, which are left as they are.
        hidden_size: size of the hidden states, None if the config does not say.
        sliding_window: tokens that a sliding-window layer holds at most, None if there is none.
    """

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    clusterable: tuple[bool, ...]
    hidden_size: int | None = None
    sliding_window: int | None = None

    @property
    def group_size(self) -> int:
        """Query heads per K/V head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class ClusterProfile:
    """How many clusters of heads each layer of a model needs.

    One written by hand, for two layers of four heads, and a published schedule:

    >>> members = [[0, 0, 2, 2], [0, 1, 2, 3]]
    >>> ClusterProfile.from_json(
    ...     {"clusters": [2, 4], "membership": "static", "representatives": members}
    ... ).representatives
    ((0, 0, 2, 2), (0, 1, 2, 3))
    >>> ClusterProfile.published("llama-7b").clusters[16:20]
    (32, 32, 4, 4)
    >>> ClusterProfile((2, 0))
    Traceback (most recent call last):
    chai_attention.errors.ProfileError: bad profile: ...

    Attributes:
        clusters: k per layer, the number of representatives. Streaming heads are none; a layer
            whose heads all stream has 0.
        membership: "online" clusters the heads of every request on its first tokens (CHAI, 3.3);
            "static" uses ``representatives`` for all requests; "blend" adds ``blend`` times the
            static ``costs`` to what the first tokens say.
        window: tokens whose scores decide an online or blended membership (5 in the paper).
        probe_start: real tokens of a sequence before its probe tokens, such as those of a chat
            template, which are the same in every request.
        features: what of the window is compared: "scores", the attention maps, or "value", the
            heads' outputs if they used each other's maps (blended memberships only).
        blend: weight of ``costs`` against the distances of the window, both relative to their
            means; blended memberships only.
        costs: per layer, ``H x H``: what it costs that head h (row) uses the scores of head r
            (column); blended memberships only.
        target: "scores" clusters query heads; a K/V head of a grouped-query model is dropped if
            no representative reads it, so that an online profile keeps *at most* ``min(k, G)`` K
            heads per layer. "k-bytes" chooses the K/V heads that keep their K; all their query
            heads represent themselves, so that k is a multiple of H / G.
        representatives: per layer, the head whose scores each head uses; static profiles only.
            A streaming head's entry is itself.
        streaming: per layer, the heads that see local keys only: the exact recent window and the
            sinks (schema 2). None if all see far keys.
        recent: w, the last keys that every head attends to with its own scores; 0 for none.
        sinks: s, the first keys that it does; only with a recent window.
        tensor_parallel: N, ranks that heads were chosen for (schema 3): no cluster crosses them,
            and in every layer all of them keep as many K heads and V heads as each other. So it is
            with every number of ranks that divides N, too. Static profiles only, above 1.
        offsets: per layer, ``H x H``: added to the log-sum-exp of head r's scores of all other
            keys when head h uses them; None for zeros. Only with a recent window.
        refit: corrections of the weights that go with the profile: kind ("output" or "bias"),
            file (safetensors, beside the profile) and its sha256.
        corrections: the refit's tensors, ``layers.N.weight [out, in]`` or ``layers.N.bias [out]``;
            saved beside the JSON file, not in it.
        promise: what was measured on held-out text: max_loss or saving asked for, perplexity rise
            with its standard error, share of K,V bytes saved.
        model: what identifies the model: architecture, layers, heads, kv_heads, head_dim.
        provenance: how the profile was found: method, features, text, sizes, seed, version.
        error: per layer, the clustering error for k = 1, 2, ... relative to one cluster. For
            "k-bytes" for 1, 2, ... kept K/V heads.
        similarity: per layer, cosine similarity of the heads' attention maps, ``H x H``.
    """

    clusters: tuple[int, ...]
    membership: str = ONLINE
    window: int = DEFAULT_WINDOW
    target: str = "scores"
    representatives: tuple[tuple[int, ...], ...] | None = None
    streaming: tuple[tuple[int, ...], ...] | None = None
    probe_start: int = 0
    features: str = "scores"
    blend: float = 0.0
    costs: tuple[tuple[tuple[float, ...], ...], ...] | None = None
    recent: int = 0
    sinks: int = 0
    tensor_parallel: int = 1
    offsets: tuple[tuple[tuple[float, ...], ...], ...] | None = None
    refit: Mapping[str, str] | None = None
    corrections: Mapping[str, Tensor] | None = field(default=None, compare=False, repr=False)
    promise: Mapping[str, Any] | None = None
    model: Mapping[str, str | int] | None = None
    provenance: Mapping[str, Any] | None = None
    error: tuple[tuple[float, ...], ...] | None = None
    similarity: tuple[tuple[tuple[float, ...], ...], ...] | None = None

    def __post_init__(self) -> None:
        for name in ("clusters", *_TABLES):
            object.__setattr__(self, name, tuples(getattr(self, name)))
        problems = problems_of(self)
        if problems:
            raise ProfileError("bad profile: " + "; ".join(problems))

    # ---- files

    @classmethod
    def resolve(cls, name: ClusterProfile | str | Path) -> ClusterProfile:
        """Return a published schedule by its name, or load a file; a profile is returned as it is.

        Raises:
            ProfileError: neither a known name nor a readable profile.
        """
        if isinstance(name, ClusterProfile):
            return name
        name = str(name)
        if name in PUBLISHED:
            return cls.published(name)
        known = ", ".join(PUBLISHED)
        if not name.strip():
            raise ProfileError(f"the name of a profile is empty: give a file or one of {known}")
        if os.path.isdir(name):
            folder = Path(name) / EXPORTED
            if not os.path.lexists(folder):
                raise ProfileError(
                    f"cannot read a profile from the folder {name}, which holds no {EXPORTED}: "
                    "give the file of a profile (chai calibrate --out FILE), the name of a "
                    "published schedule, or a folder that chai export wrote"
                )
            return cls.load(folder)
        if not os.path.lexists(name):
            raise ProfileError(f"no profile {name!r}: give a file or one of {known}")
        return cls.load(name)

    @classmethod
    def published(cls, name: str) -> ClusterProfile:
        """Return the schedule published for ``name`` with the paper's window of 5 tokens."""
        heads, schedule = PUBLISHED[name]
        clusters = tuple(k for layers, k in schedule for _ in range(layers))
        model = {"layers": len(clusters), "heads": heads, "kv_heads": heads}
        return cls(
            clusters, window=5, model=model, provenance={"method": "published", "schedule": name}
        )

    @classmethod
    def load(cls, path: str | Path) -> ClusterProfile:
        """Read a profile; a file with nothing but ``{"clusters": [...]}`` is one.

        Raises:
            ProfileError: unreadable, not JSON, of an unknown schema, or with bad contents.
        """
        try:
            data = load_json(path)
        except OSError as error:
            raise ProfileError(f"cannot read {path}: {error.strerror}") from error
        except ValueError as error:
            raise ProfileError(f"{path} is not JSON that can be used: {error}") from error
        try:
            profile = cls.from_json(data)
        except ProfileError as error:
            raise ProfileError(f"{path}: {error}") from error
        if profile.refit is None:
            return profile
        if not {"file", "sha256"} <= set(profile.refit):
            raise ProfileError(f"{path}: 'refit' needs kind (output or bias), file and sha256")
        tensors = load_corrections(Path(path), profile.refit)
        return replace(profile, corrections=tensors)

    @classmethod
    def from_json(cls, data: Any) -> ClusterProfile:
        """Build a profile from parsed JSON."""
        if not isinstance(data, dict):
            raise ProfileError("a profile is a JSON object with at least a list 'clusters'")
        data = dict(data)
        version = data.pop("schema_version", SCHEMA_VERSION)
        if type(version) is not int or not 1 <= version <= SCHEMA_VERSION:
            raise ProfileError(
                f"schema version {version!r} is unknown; this release reads 1 to {SCHEMA_VERSION}"
            )
        early = [name for name in data if _SINCE.get(name, 1) > version]
        if early:
            raise ProfileError(f"'{early[0]}' needs schema version {_SINCE[early[0]]}")
        known = {item.name for item in dataclass_fields(cls)} - {"corrections"}
        unknown = sorted(set(data) - known)
        if unknown:
            raise ProfileError(
                f"unknown keys {', '.join(unknown)}; known are {', '.join(sorted(known))}"
            )
        if "clusters" not in data:
            raise ProfileError("a profile needs 'clusters', a list with one number per layer")
        return cls(**data)

    def to_json(self) -> str:
        """Return the profile as JSON, one line per layer and key; defaults are left out."""
        version = 3 if self.tensor_parallel > 1 else 1 if self.streaming is None else 2
        lines = [f'"schema_version": {version}']
        for item in dataclass_fields(self):
            value = getattr(self, item.name)
            if value is None or item.name == "corrections":
                continue
            if item.name in _LATER and value == item.default:
                continue
            if item.name in _TABLES:
                rows = ",\n  ".join(json.dumps(row, allow_nan=False) for row in value)
                text = f"[\n  {rows}\n ]"
            else:
                text = json.dumps(
                    dict(value) if isinstance(value, Mapping) else value, allow_nan=False
                )
            lines.append(f'"{item.name}": {text}')
        return "{\n " + ",\n ".join(lines) + "\n}\n"

    def save(self, path: str | Path) -> None:
        """Write the profile; a file that was there stays whole unless all is written.

        The tensors of a refit go into a file of their own beside it.

        Raises:
            ProfileError: the file cannot be written.
        """
        path, profile = Path(path), self
        if self.refit is not None:
            if self.corrections is None:
                raise ProfileError("this profile has a refit but not its tensors: load it anew")
            entry = save_corrections(path, self.refit["kind"], self.corrections)
            profile = replace(self, refit=entry)
        write_whole(path, profile.to_json().encode(), ProfileError)

    # ---- use with a model

    def check(self, shape: ModelShape) -> None:
        """Compare the profile with a model.

        Raises:
            ProfileError: lists everything that differs.
        """
        if problems := misfits(self, shape):
            raise ProfileError("profile does not fit the model: " + "; ".join(problems))

    def streaming_heads(self, layer: int) -> tuple[int, ...]:
        """Heads of a layer that see local keys only."""
        return () if self.streaming is None else self.streaming[layer]

    def far_representatives(self, layer: int) -> set[int]:
        """Representatives of a layer with a static membership: those that see far keys."""
        assert self.representatives is not None
        return set(self.representatives[layer]) - set(self.streaming_heads(layer))

    def kept_keys(self, layer: int, shape: ModelShape) -> int:
        """K heads that layer keeps; for online "scores" with grouped queries, the most it can."""
        k, group = self.clusters[layer], shape.group_size
        if self.target == "k-bytes":
            return k // group
        if self.representatives is not None:
            return len({head // group for head in self.far_representatives(layer)})
        return min(k, self.kept_values(layer, shape))

    def keeps_at_most(self, shape: ModelShape) -> bool:
        """Whether `kept_keys` is a bound: the number of kept K heads depends on the request."""
        grouped = shape.kv_heads < shape.heads
        return self.representatives is None and self.target == "scores" and grouped

    def kept_values(self, layer: int, shape: ModelShape) -> int:
        """V heads that layer keeps for all tokens: those that some far-seeing head reads."""
        group = shape.group_size
        sees = set(range(shape.heads)) - set(self.streaming_heads(layer))
        return len({head // group for head in sees})

    def error_of(self, layer: int) -> float | None:
        """Relative clustering error of a layer at its number of clusters; None if unknown."""
        if self.error is None or self.similarity is None or self.streaming_heads(layer):
            return None
        curve, heads = self.error[layer], len(self.similarity[layer])
        return curve[self.clusters[layer] * len(curve) // heads - 1]

    def bytes_per_token(self, shape: ModelShape, element_size: int) -> tuple[int, int]:
        """K,V bytes per token in all layers that hold every token: (full cache, with clusters).

        On top come, once per sequence, the exact recent window (`window_bytes`) and layers with
        sliding windows (`sliding_bytes`).
        """
        head = shape.head_dim * element_size
        growing = [layer for layer, free in enumerate(shape.clusterable) if free]
        full = 2 * len(growing) * shape.kv_heads * head
        kept = sum(
            self.kept_keys(layer, shape) + self.kept_values(layer, shape) for layer in growing
        )
        return full, kept * head

    def window_bytes(self, shape: ModelShape, element_size: int) -> int:
        """Bytes per sequence of the local keys of heads whose K, or V, is dropped."""
        dropped = sum(
            2 * shape.kv_heads - self.kept_keys(layer, shape) - self.kept_values(layer, shape)
            for layer in range(shape.layers)
        )
        return dropped * (self.recent + self.sinks) * shape.head_dim * element_size

    @property
    def probe_end(self) -> int:
        """Tokens that a sequence needs before a membership of its own is decided."""
        return self.probe_start + self.window

    def decides(self, layer: int, shape: ModelShape) -> bool:
        """Whether every sequence decides which heads of a layer share."""
        own = self.clusters[layer] + len(self.streaming_heads(layer))
        return self.representatives is None and own < shape.heads

    def held(self, shape: ModelShape, tokens: int) -> tuple[int, int, int]:
        """Vectors of K and V that a sequence of ``tokens`` tokens holds, in all layers.

        With Transformers, where a layer that `decides` keeps all heads until the window is full;
        vLLM's pages hold no more of such a sequence than of others. First tokens that are among
        the last ones, too, count once.

        Returns:
            (in a full cache, of heads that are kept for all tokens, local ones of other heads).
        """
        full = far = local = 0
        for layer, grows in enumerate(shape.clusterable):
            length = tokens if grows else min(tokens, shape.sliding_window or tokens)
            heads = kept = 2 * shape.kv_heads
            if tokens >= self.probe_end or not self.decides(layer, shape):
                kept = self.kept_keys(layer, shape) + self.kept_values(layer, shape)
            full += heads * length
            far += kept * length
            local += (heads - kept) * min(tokens, self.recent + self.sinks)
        return full, far, local

    def saved(self, shape: ModelShape, tokens: int) -> float:
        """Share of the K,V bytes of ``tokens`` tokens that is not held, see `held`."""
        full, far, local = self.held(shape, tokens)
        return 1 - (far + local) / full


def sliding_bytes(shape: ModelShape, element_size: int, tokens: int = FOR_EVER) -> int:
    """K,V bytes of a sequence of ``tokens`` tokens in layers with sliding windows.

    They hold the same with any profile: all heads of the last tokens, a window of them at most.
    """
    layers = shape.layers - sum(shape.clusterable)
    held = min(tokens, shape.sliding_window or tokens)
    return 2 * layers * shape.kv_heads * held * shape.head_dim * element_size
