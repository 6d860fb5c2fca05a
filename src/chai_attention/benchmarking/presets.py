"""Shapes of the models that the paper measured, and the shape of any model or profile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import LlamaConfig, OPTConfig, PreTrainedConfig

from chai_attention.benchmarking.cases import AttentionShape, BenchmarkError
from chai_attention.profile import PUBLISHED, STATIC, ClusterProfile
from chai_attention.runtime.shape import describe

DEFAULT = "llama-7b"


def _llama(layers: int, heads: int, hidden: int, intermediate: int) -> PreTrainedConfig:
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, vocab_size=32000,
        max_position_embeddings=2048,
    )  # fmt: skip


def _opt(layers: int, heads: int, hidden: int) -> PreTrainedConfig:
    return OPTConfig(
        hidden_size=hidden, word_embed_proj_dim=hidden, ffn_dim=4 * hidden,
        num_hidden_layers=layers, num_attention_heads=heads, vocab_size=50272,
        max_position_embeddings=2048,
    )  # fmt: skip


PRESETS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama-7b": lambda: _llama(layers=32, heads=32, hidden=4096, intermediate=11008),
    "llama-33b": lambda: _llama(layers=60, heads=52, hidden=6656, intermediate=17920),
    "opt-66b": lambda: _opt(layers=64, heads=72, hidden=9216),
}


def preset_config(name: str, tokens: int) -> PreTrainedConfig:
    """Return the config of a preset, with room for ``tokens`` positions."""
    config = PRESETS[name]()
    config.max_position_embeddings = max(config.max_position_embeddings, tokens)
    return config


def resolve_attention(
    name: str | None,
    profile_name: str | None,
    profile: ClusterProfile | None,
    load_config: Callable[[str], PreTrainedConfig],
) -> AttentionShape:
    """Return one layer's attention of a preset or model, or of what a profile is for.

    Args:
        name: a preset or model; None for the profile's, or `DEFAULT`.
        profile_name: of the profile.
        profile: if there is one.
        load_config: reads a model's config.

    Raises:
        BenchmarkError: the profile does not say what model it is for, and no model is named.
        ProfileError: the profile does not fit the model.
        UnsupportedModelError: the model's attention cannot be clustered.
    """
    if name is None and profile is not None and profile_name not in PRESETS:
        return _profile_shape(str(profile_name), profile)
    if name is None:
        name = DEFAULT if profile_name is None else profile_name
    shape = describe(PRESETS[name]() if name in PRESETS else load_config(name))
    if profile is not None:
        profile.check(shape)
    return AttentionShape(Path(name).name, shape.heads, shape.kv_heads, shape.head_dim)


def _profile_shape(name: str, profile: ClusterProfile) -> AttentionShape:
    """Read it off what a profile says about its model."""
    model = profile.model or {}
    missing = [key for key in ("heads", "kv_heads", "head_dim") if key not in model]
    if missing:
        raise BenchmarkError(
            f"profile {name} does not say {', '.join(missing)} of its model: name a model or one "
            f"of {', '.join(PRESETS)} too"
        )
    heads, kv_heads, head_dim = (int(model[key]) for key in ("heads", "kv_heads", "head_dim"))
    return AttentionShape(Path(name).name, heads, kv_heads, head_dim)


@dataclass(frozen=True)
class ModelPlan:
    """What ``chai bench model`` runs.

    Attributes:
        name: for the report.
        config: of a model with random weights; None for one that is loaded.
        profile: clusters of its layers.
        profile_name: for the report.
    """

    name: str
    config: PreTrainedConfig | None
    profile: ClusterProfile
    profile_name: str


def resolve_model(
    name: str | None,
    profile_name: str | None,
    layers: int | None,
    tokens: int,
    load_config: Callable[[str], PreTrainedConfig],
) -> ModelPlan:
    """Decide on weights, layers and clusters.

    Args:
        name: a preset or model; None for `DEFAULT`.
        profile_name: a profile; None for the schedule published for ``name``.
        layers: how many to build; None for all.
        tokens: positions that a preset needs.
        load_config: reads a model's config.

    Raises:
        BenchmarkError: no profile, or too many layers.
        ProfileError: the profile cannot be read or does not fit the model.
        UnsupportedModelError: the model's attention cannot be clustered.
    """
    name = DEFAULT if name is None else name
    if profile_name is None and name not in PUBLISHED:
        raise BenchmarkError(
            f"no schedule is published for {name}: give --profile, a file (chai calibrate writes "
            f'one, {{"clusters": [...]}} is one) or one of {", ".join(PUBLISHED)}'
        )
    chosen = profile_name or name
    profile = ClusterProfile.resolve(chosen)
    config = preset_config(name, tokens) if name in PRESETS else load_config(name)
    profile.check(describe(config))
    label, schedule = Path(name).name, Path(chosen).name
    if chosen in PUBLISHED:
        schedule = f"published schedule of {chosen}"
    if layers is not None:
        label = f"{label}, {layers} of {config.get_text_config().num_hidden_layers} layers"
        config, profile = cut_config(config, layers), cut_profile(profile, layers)
    random = name in PRESETS or layers is not None
    return ModelPlan(label, config if random else None, profile, schedule)


def profile_clusters(profile: ClusterProfile) -> tuple[int, ...]:
    """Return the numbers of clusters that a profile's layers have, ascending."""
    return tuple(sorted(set(profile.clusters)))


def profile_representatives(profile: ClusterProfile) -> dict[int, tuple[int, ...]]:
    """Return a layer's membership for every number of clusters of a static profile."""
    if profile.membership != STATIC or profile.representatives is None:
        return {}
    found: dict[int, tuple[int, ...]] = {}
    for clusters, representatives in zip(profile.clusters, profile.representatives, strict=True):
        found.setdefault(clusters, representatives)
    return found


def cut_config(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """Return the config with fewer layers.

    Raises:
        BenchmarkError: more layers than the model has, or kinds of layers in a pattern.
    """
    if layers > config.num_hidden_layers:
        raise BenchmarkError(
            f"--layers {layers} is more than the {config.num_hidden_layers} of the model"
        )
    if len(set(getattr(config, "layer_types", None) or [""])) > 1:
        raise BenchmarkError("--layers needs a model whose layers are all of one kind")
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[:layers]
    return config


def cut_profile(profile: ClusterProfile, layers: int) -> ClusterProfile:
    """Return the profile of ``layers`` layers, spread evenly over those it has."""
    total = len(profile.clusters)
    if layers == total:
        return profile
    chosen = [(2 * index + 1) * total // (2 * layers) for index in range(layers)]

    def rows(table: tuple[object, ...] | None) -> tuple[object, ...] | None:
        return None if table is None else tuple(table[index] for index in chosen)

    model = {key: value for key, value in (profile.model or {}).items() if key != "layers"}
    tables = {
        name: rows(getattr(profile, name)) for name in ("representatives", "costs", "offsets")
    }
    return replace(
        profile,
        clusters=tuple(profile.clusters[index] for index in chosen),
        model=model, error=None, similarity=None, refit=None, corrections=None,
        **tables,  # type: ignore[arg-type]
    )  # fmt: skip
