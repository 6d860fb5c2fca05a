"""Profiles and measurements as dictionaries for ``--json``."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from chai_attention.profile import ClusterProfile, ModelShape, sliding_bytes

if TYPE_CHECKING:
    from chai_attention.evaluation.demo import DemoResult
    from chai_attention.integrations.transformers.timed_generation import Written

_FACTS = ("membership", "window", "probe_start", "target", "recent", "sinks", "tensor_parallel")


def profile_record(
    profile: ClusterProfile, shape: ModelShape | None, element_size: int = 2
) -> dict[str, Any]:
    """What a profile holds, without its tables of pairs of heads.

    Args:
        profile: the profile.
        shape: of the model; with it come K and V heads and bytes per token.
        element_size: bytes of a number in the cache.
    """
    record: dict[str, Any] = {name: getattr(profile, name) for name in _FACTS}
    record["refit"] = None if profile.refit is None else profile.refit["kind"]
    for name in ("promise", "model", "provenance"):
        value = getattr(profile, name)
        record[name] = None if value is None else dict(value)
    record["layers"] = [
        {
            "clusters": clusters,
            "streaming": list(profile.streaming_heads(layer)),
            "error": profile.error_of(layer),
        }
        for layer, clusters in enumerate(profile.clusters)
    ]
    if shape is not None:
        full, kept = profile.bytes_per_token(shape, element_size)
        record["bits_per_number"] = 8 * element_size
        record["kv_bytes_per_token"] = {"full": full, "clustered": kept}
        record["window_bytes"] = profile.window_bytes(shape, element_size)
        if not all(shape.clusterable) and shape.sliding_window:
            record["sliding_window_bytes"] = sliding_bytes(shape, element_size)
        record["kept_k_heads_are"] = "at most" if profile.keeps_at_most(shape) else "exact"
        for layer, row in enumerate(record["layers"]):
            row["kept_k_heads"] = profile.kept_keys(layer, shape)
            row["kept_v_heads"] = profile.kept_values(layer, shape)
    return record


def written_record(run: Written) -> dict[str, Any]:
    """One generation: its text, times in seconds, and the bytes of its cache."""
    record = asdict(run)
    record["memory"] |= {"full_bytes": run.memory.full_bytes, "saved": run.memory.saved}
    return record


def demo_record(result: DemoResult, profile: dict[str, Any]) -> dict[str, Any]:
    """Both generations of the demo, what the clusters cost, and its profile's record."""
    return {
        "profile": profile,
        "runs": {
            "full model": written_record(result.plain),
            "CHAI": written_record(result.clustered),
        },
        "perplexity": {
            "full model": result.plain_loss.perplexity,
            "CHAI": result.clustered_loss.perplexity,
        },
        "rise": {"rise": result.rise.rise, "standard_error": result.rise.standard_error},
        "calibration_seconds": result.calibration_seconds,
    }
