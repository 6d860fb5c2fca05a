"""Profiles and measurements as text tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from chai_attention.profile import ClusterProfile, ModelShape, sliding_bytes

if TYPE_CHECKING:  # they import torch, which chai inspect does without
    from chai_attention.calibration.estimate import Estimate
    from chai_attention.evaluation.demo import DemoResult
    from chai_attention.integrations.transformers.timed_generation import Written


def render(table: Table, width: int = 100) -> str:
    """Return a rich table as plain text."""
    # names and texts of others are shown as they are: no markup, no emoji codes
    console = Console(width=width, markup=False, emoji=False, highlight=False)
    with console.capture() as captured:
        console.print(table)
    return captured.get().rstrip("\n")


def profile_table(profile: ClusterProfile, shape: ModelShape | None) -> str:
    """One row per layer: what its heads do with far keys, and the K and V heads that are kept."""
    table = Table(title=_title(profile))
    names = ["layer", "clusters"]
    if profile.streaming is not None:
        names += ["streaming heads"]
    names += ["error"] if profile.error is not None else []
    names += ["K heads kept", "V heads kept"] if shape is not None else []
    for name in names:
        table.add_column(name, justify="right")
    for layer, k in enumerate(profile.clusters):
        row = {"layer": str(layer), "clusters": str(k), "error": _error(profile, layer)}
        if shape is not None and not shape.clusterable[layer]:
            row["layer"] += ", sliding window"
        row["streaming heads"] = _ranges(profile.streaming_heads(layer))
        if shape is not None:
            others = shape.heads - len(profile.streaming_heads(layer))
            row["clusters"] = f"{k} of {others}"
            kept, values = profile.kept_keys(layer, shape), profile.kept_values(layer, shape)
            bound = profile.keeps_at_most(shape) and 1 < kept < shape.kv_heads
            row["K heads kept"] = f"{'at most ' if bound else ''}{kept} of {shape.kv_heads}"
            row["V heads kept"] = f"{values} of {shape.kv_heads}"
        table.add_row(*(row[name] for name in names))
    return render(table)


def _ranges(heads: Sequence[int]) -> str:
    """Heads as people write them: 0-3, 7."""
    parts: list[list[int]] = []
    for head in heads:
        if parts and parts[-1][-1] == head - 1:
            parts[-1].append(head)
        else:
            parts.append([head])
    spans = (f"{p[0]}-{p[-1]}" if len(p) > 1 else f"{p[0]}" for p in parts)
    return ", ".join(spans) or "-"


def summary_line(profile: ClusterProfile, shape: ModelShape, element_size: int) -> str:
    """K,V bytes per token before and after."""
    full, kept = profile.bytes_per_token(shape, element_size)
    bound = "at least " if profile.keeps_at_most(shape) else ""
    line = (
        f"K,V cache: {full:,} bytes per token, {kept:,} with clusters: "
        f"{bound}{1 - kept / max(1, full):.1%} saved"
    )
    window = profile.window_bytes(shape, element_size)
    if window:
        what = "local K and V" if any(profile.streaming or ()) else "local K"
        line += f"; and once per sequence {window:,} bytes of {what}"
    if not all(shape.clusterable) and shape.sliding_window:
        sliding = sliding_bytes(shape, element_size)
        line += f"; layers with sliding windows hold at most {sliding:,} bytes of a sequence"
    if any(profile.decides(layer, shape) for layer in range(shape.layers)):
        line += f"; sharing saves from {profile.probe_end} tokens on, with vLLM from the first"
    return f"{line} ({8 * element_size}-bit)"


def measured_lines(profile: ClusterProfile) -> list[str]:
    """What was measured on held-out text, and what it costs to serve several ranks."""
    lines = [] if profile.promise is None else [_promise_line(profile.promise)]
    return lines + ([] if profile.tensor_parallel == 1 else [_ranks_line(profile)])


def _promise_line(found: Mapping[str, Any]) -> str:
    line = f"perplexity on {_counted(found, 'windows')} held-out sequences"
    line += f": {_percent(found, 'rise', '+')} ±{_percent(found, 'standard_error')}"
    if "max_loss" in found:
        line += f" (asked: at most {_percent(found, 'max_loss')})"
    for name, what in (("save", "of the K,V bytes"), ("removed", "of the heads")):
        if name in found:
            line += f" (asked: {_percent(found, name, digits=1)} {what})"
    line += _saved(found)
    longer = found.get("longer")
    if isinstance(longer, Mapping):
        line += f"; on {_counted(longer, 'windows')} longer ones {_percent(longer, 'rise', '+')} "
        line += f"±{_percent(longer, 'standard_error')}{_saved(longer)}"
    recall = found.get("recall")
    if isinstance(recall, Mapping):
        line += f"\n{_recall_line(recall, found.get('max_recall_loss'))}"
    return line


def _ranks_line(profile: ClusterProfile) -> str:
    ranks, found = profile.tensor_parallel, profile.provenance or {}
    line = f"made for {ranks} tensor-parallel ranks, and their divisors: all of them save the same"
    if "predicted_rise" in found:
        line += (
            f"; costs predict {_percent(found, 'predicted_rise', '+')} perplexity, and "
            f"{_percent(found, 'predicted_rise_one_rank', '+')} if one rank saved as much"
        )
    return line


def _recall_line(recall: Mapping[str, Any], most: object) -> str:
    """How many facts hidden in held-out text are recalled."""
    line = "facts recalled in held-out text: "
    if "fall" in recall:
        line += (
            f"{_points(recall.get('fall'))} points fewer ±{_points(recall.get('standard_error'))}"
        )
        if most is not None:
            line += f" (asked: at most {_points(most)})"
        tasks = recall.get("tasks")
        told = [
            f"{_counted(task, 'clustered')} of {_counted(task, 'cases')}, full model "
            f"{_counted(task, 'full')}, with {_counted(task, 'facts')} hidden in "
            f"{_counted(task, 'length')} tokens"
            for task in (tasks if isinstance(tasks, Sequence) else ())
            if isinstance(task, Mapping)
        ]
        line += f": {'; '.join(told)}" if told else ""
    else:
        line += "not measured"
    return f"{line}; {recall['note']}" if "note" in recall else line


def _points(value: object) -> str:
    """A share in points."""
    return f"{100 * value:.1f}" if isinstance(value, int | float) else "unknown"


def _saved(found: Mapping[str, Any]) -> str:
    saved, length = _percent(found, "saved", digits=1), _counted(found, "length")
    return f", {saved} of the K,V bytes saved at {length} tokens"


def estimate_lines(found: Estimate) -> str:
    """What a calibration will take."""
    lines = [
        f"text: {found.windows} sequences of {found.length} tokens to learn from, {found.held_out} "
        "to measure on"
    ]
    lines += [f"{name}: {_duration(seconds)}" for name, seconds in found.seconds.items()]
    if found.tries:
        each = _duration(found.seconds_per_try)
        lines.append(f"profiles measured: at most {found.tries}, {each} each")
    gib = 1 << 30
    return "\n".join(
        [
            *lines,
            f"in all: at most {_duration(found.at_most)}",
            f"memory at the peak: {found.memory / gib:.1f} GiB, of which the weights are "
            f"{found.weights / gib:.1f} GiB",
            "nothing is written: leave out --dry-run to calibrate",
        ]
    )


def _duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 1 else "less than 1 s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _percent(found: Mapping[str, Any], name: str, sign: str = "", digits: int = 2) -> str:
    """An entry as percent; a profile of another origin need not have it."""
    value = found.get(name)
    return f"{value:{sign}.{digits}%}" if isinstance(value, int | float) else "unknown"


def _counted(found: Mapping[str, Any], name: str) -> str:
    """An entry that counts something."""
    value = found.get(name)
    return f"{value}" if isinstance(value, int) else "an unknown number of"


def _error(profile: ClusterProfile, layer: int) -> str:
    """Clustering error of a layer at its number of clusters, if the profile has a curve."""
    error = profile.error_of(layer)
    return "-" if error is None else f"{error:.3f}"


def _title(profile: ClusterProfile) -> str:
    """What the profile is, in a line."""
    text = f"{profile.membership} membership"
    if profile.membership != "static":
        text += f" from {profile.window} tokens"
        text += f" behind the first {profile.probe_start}" if profile.probe_start else ""
    if profile.recent:
        text += f", exact for the last {profile.recent} and first {profile.sinks} tokens"
    if profile.tensor_parallel > 1:
        text += f", for {profile.tensor_parallel} tensor-parallel ranks"
    if profile.refit is not None:
        text += f", {profile.refit['kind']} refit"
    source = (profile.provenance or {}).get("text")
    return text + (f", calibrated on {source}" if source else "")


def generation_table(runs: dict[str, Written]) -> str:
    """Tokens, times and K,V bytes of one or several generations."""
    table = Table()
    local = any(run.memory.recent_bytes for run in runs.values())
    held = ["K bytes", "V bytes", *(["local K,V bytes"] if local else [])]
    for name in ("", "tokens", "TTFT", "per token", *held, "of a full cache"):
        table.add_column(name, justify="right" if name else "left")
    for name, run in runs.items():
        memory = run.memory
        table.add_row(
            name,
            str(run.tokens),
            f"{run.ttft * 1e3:.0f} ms",
            "-" if run.tpot is None else f"{run.tpot * 1e3:.1f} ms",
            f"{memory.key_bytes:,}",
            f"{memory.value_bytes:,}",
            *([f"{memory.recent_bytes:,}"] if local else []),
            f"{memory.total_bytes / memory.full_bytes:.1%}",
        )
    return render(table)


def compared_line(plain: Written, clustered: Written) -> str:
    """How far two texts agree, and what the second costs of the first's time and bytes."""
    if plain.text == clustered.text:
        line = "both texts are the same"
    else:
        pairs = zip(plain.text, clustered.text, strict=False)
        same = next((at for at, (one, other) in enumerate(pairs) if one != other), None)
        length = min(len(plain.text), len(clustered.text)) if same is None else same
        line = f"the texts differ after {length} characters"
    if plain.tpot and clustered.tpot:
        line += f"; time per token {clustered.tpot / plain.tpot:.2f}x of the full model's"
    return f"{line}; K,V bytes {clustered.memory.total_bytes / clustered.memory.full_bytes:.2f}x"


def demo_tables(result: DemoResult, prompt: str) -> str:
    """Both texts side by side, the measurements, and what they mean."""
    texts = Table(title=f"“{prompt}”")
    texts.add_column("full model", ratio=1)
    texts.add_column("with CHAI", ratio=1)
    texts.add_row(result.plain.text.strip(), result.clustered.text.strip())
    memory = result.clustered.memory
    lines = [
        render(texts),
        generation_table({"full model": result.plain, "CHAI": result.clustered}),
        "",
        f"perplexity on held-out text ({len(result.plain_loss.per_sequence)} sequences): "
        f"{result.plain_loss.perplexity:.2f} full, {result.clustered_loss.perplexity:.2f} with "
        f"CHAI, {result.rise}",
        f"K cache of the answer: {memory.key_bytes:,} of {memory.full_key_bytes:,} bytes; K and V "
        f"together: {memory.saved:.1%} saved",
        f"calibration took {result.calibration_seconds:.0f} s",
        _verdict(result),
    ]
    return "\n".join(lines)


def _verdict(result: DemoResult) -> str:
    """Say plainly what the quality cost is."""
    rise, saved = result.rise, result.clustered.memory.saved
    if rise.rise < 2 * rise.standard_error:
        return "Quality cost: none that this amount of text can show."
    return (
        f"Quality cost: {saved:.1%} of the K,V cache is paid for with {rise.rise:.1%} higher "
        "perplexity; see docs/results/."
    )
