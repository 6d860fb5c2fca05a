"""The summary at the top of a page: what was saved, its cost and its gain, each on what data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from chai_attention.calibration.settings import DEFAULT
from chai_attention.evaluation.points import Point
from chai_attention.evaluation.profiled import PROFILE
from chai_attention.profile import ClusterProfile
from chai_attention.reports.bench import case_of
from chai_attention.reports.head_kinds import KEEP, kind_numbers

SAVES, COSTS, GAINS = "saves", "costs", "gains"
# where an answer comes from, for a page that lacks it
MEASURED_BY = {
    SAVES: "a profile of chai calibrate",
    COSTS: "a profile of chai calibrate --max-loss, chai frontier or chai eval",
    GAINS: "chai bench model --profile or chai bench attention --profile",
}
WITHIN = 0.01  # rise of perplexity, which chai calibrate promises by default

CHAI = "chai"

Answer = tuple[str, str]  # one of the three above, and a sentence


def profile_answer(profile: ClusterProfile) -> list[Answer]:
    """What a profile's promise says; without one, how many heads give something up."""
    found = profile.promise
    if found is None or "rise" not in found:
        heads = (profile.model or {}).get("heads")
        if not isinstance(heads, int):
            return []
        kept = sum(row[KEEP] for row in kind_numbers(profile, heads))
        whole = heads * len(profile.clusters)
        return [(SAVES, f"far K of {whole - kept} of {whole} heads; its bytes were not counted")]
    parts = [part for part in (found, found.get("longer")) if isinstance(part, Mapping)]
    text = (profile.provenance or {}).get("text")
    on = "held-out text" + (f" of {text}" if text else "")
    answers = []
    for p in parts:  # a profile of another origin need not say all of it
        windows = f"{p['windows']} sequences of " if "windows" in p else ""
        tokens = f"{p['length']:,} tokens" if "length" in p else ""
        if "saved" in p:
            answers.append((SAVES, f"{p['saved']:.1%} of the K,V cache at {tokens}"))
        lost = rise(p["rise"], p.get("standard_error"))
        answers.append((COSTS, f"perplexity {lost}, {windows}{tokens or 'sequences'} of {on}"))
    recall = found.get("recall")
    if isinstance(recall, Mapping) and "fall" in recall:
        fall, error = 100 * recall["fall"], 100 * recall["standard_error"]
        answers.append((COSTS, f"{fall:.1f} ±{error:.1f} points fewer facts recalled, {on}"))
    return answers


def frontier_answer(points: Sequence[Point]) -> list[Answer]:
    """The most that was saved within the default promise, for each text and context."""
    answers = []
    for text, context in dict.fromkeys((point.text, point.context) for point in points):
        here = [p for p in points if (p.text, p.context) == (text, context) and p.rise <= WITHIN]
        on = f"{context:,} tokens of {text}"
        if here:
            best = max(here, key=lambda point: point.saved)
            answers.append((
                SAVES,
                f"{best.saved:.1%} of the K,V cache with recipe {best.recipe} at perplexity "
                f"{rise(best.rise, best.standard_error)}, {on}: the most within {WITHIN:.0%}",
            ))  # fmt: skip
        else:
            answers.append((COSTS, f"perplexity rises by more than {WITHIN:.0%} on {on} always"))
    return answers


def eval_answer(table: Mapping[str, Any]) -> list[Answer]:
    """What the profile (else the default recipe) loses in tasks beside the full model."""
    rows = {str(row["comparator"]): row for row in table["rows"]}
    name = next((name for name in (PROFILE, DEFAULT, CHAI) if name in rows), None)
    if name is None:
        return []
    row = rows[name]
    cells = row["tasks"]
    if row["average"] is not None:
        cells = {f"average of {', '.join(table['average_of'])}": row["average"]}
    answers = []
    for task, cell in cells.items():
        if cell["acc_diff"] is None:
            lost = f"{cell['nll_diff']:+.4f} ±{cell['nll_diff_se']:.4f} nats a token"
        else:
            lost = f"{100 * cell['acc_diff']:+.2f} ±{100 * cell['acc_diff_se']:.2f} points"
        kept = row if cell is row["average"] else cell  # each task has a length of its own
        saved = f"{1 - kept['kv_share']:.1%} of K,V saved at {kept['kv_length']:.0f} tokens"
        answers.append((COSTS, f"{lost} in {task} ({name}; {saved})"))
    return answers


def attention_answer(rows: Sequence[Mapping[str, Any]], machine: str) -> list[Answer]:
    """The best and the worst speed-up of one layer's attention, by kind of work."""
    answers = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        part = sorted((row for row in rows if row["kind"] == kind), key=lambda r: r["speedup"])
        told = [
            f"{row['speedup']:.2f}x ({case_of(row)}, {row['clusters']} clusters, {row['dtype']}; "
            f"ideal {row['ideal_speedup']:.2f}x)"
            for row in ([part[0], part[-1]] if len(part) > 1 else part)
        ]
        answers.append((GAINS, f"one layer's attention {' to '.join(told)}, {machine}"))
    return answers


def model_answer(rows: Sequence[Mapping[str, Any]], machine: str) -> list[Answer]:
    """Gains of the clustered run over the fastest one without clusters, by case."""
    answers = []
    for row in rows:
        told = [
            f"{what} {row[f'{name}_vs_fused']:.2f}x (ideal {row[f'ideal_{name}_vs_fused']:.2f}x)"
            for name, what in (("ttft", "first token"), ("tpot", "time per token"))
            if row[f"{name}_vs_fused"] is not None
        ]
        if told:
            answers.append((GAINS, f"{case_of(row)}: {', '.join(told)}, {machine}"))
    return answers


def rise(value: float, error: float | None) -> str:
    """A relative rise with its standard error, where it is known."""
    return f"{value:+.2%}" + ("" if error is None else f" ±{error:.2%}")
