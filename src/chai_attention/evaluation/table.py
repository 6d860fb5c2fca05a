"""The table of an evaluation: every comparator's tasks beside MHA's, with their errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from chai_attention.atomic_write import write_whole
from chai_attention.errors import EvaluationError
from chai_attention.evaluation.runs import SCHEMA_VERSION, TRANSFORMERS, Result
from chai_attention.evaluation.scores import Mean, average, mean_of, paired
from chai_attention.evaluation.tasks import PAPER, facts_and_length
from chai_attention.integrations.lm_eval.items import RECALLED, TEXT
from chai_attention.results import write_result

MEASURES = ("acc", "acc_norm", "nll")  # fields of `Item`
ENDS = ("", "_se", "_diff", "_diff_se")
MEASURED = (  # title, measure, scale and digits of a table
    ("accuracy, %", "acc", 100.0, 2),
    ("accuracy by length-normalised likelihood, %", "acc_norm", 100.0, 2),
    ("NLL of the right answer", "nll", 1.0, 4),
)
SHARES = {
    "kv_length": "length",
    "kv_share": "share",
    "kv_long_length": "long_length",
    "kv_long_share": "long_share",
}
Row = Mapping[str, Any]
Means = Mapping[str, tuple[Mean, Mean]]  # measure -> mean, difference to the first comparator's
Block = tuple[str, list[str], list[list[str]]]


def build_table(
    run: Mapping[str, Any],
    names: Sequence[str],
    tasks: Sequence[str],
    results: Mapping[tuple[str, str], Result],
) -> dict[str, Any]:
    """Put all results of a run beside each other.

    Args:
        run: settings of the run.
        names: comparators; the first is what all are compared to.
        tasks: tasks in order.
        results: (comparator, task) -> result, for all of them.

    Returns:
        JSON values::

            {"schema_version": 1, "run": {...}, "tasks": [...],
             "average_of": [the paper's tasks among them],
             "rows": [{"comparator": str, "source": str, "settings": {...},
                       "tasks": {task: measures},
                       "average": measures or null,
                       "kv_share", "kv_length", "kv_long_share", "kv_long_length": means over tasks
                      }, ...]}

        Means over tasks leave out recall, whose tasks state their lengths, unless there is nothing
        else. Measures are, for x of acc, acc_norm and nll: "x", "x_se" (standard error),
        "x_diff" (minus the first comparator's) and "x_diff_se" (paired item by item), null where
        a task has no such measure; and of a task also "kind", "items", "perplexity" (of a text)
        and the K,V shares of `Result`. The standard error of an average takes tasks as
        independent.

    Raises:
        EvaluationError: two results of one task are not about the same items.
    """
    averaged = [task for task in tasks if task in PAPER]
    others = [task for task in tasks if facts_and_length(task) is None] or tasks
    rows = []
    for name in names:
        cells = {task: _cell(results[name, task], results[names[0], task]) for task in tasks}
        first = results[name, tasks[0]]
        shares = {key: sum(cells[task][0][key] for task in others) / len(others) for key in SHARES}
        rows.append(
            {
                "comparator": name,
                "source": first.source,
                "settings": first.settings["comparator"],
                "tasks": {task: plain | _flat(means) for task, (plain, means) in cells.items()},
                "average": _average([cells[task][1] for task in averaged]),
                **shares,
            }
        )
    return {
        "schema_version": SCHEMA_VERSION,
        "run": dict(run),
        "tasks": list(tasks),
        "average_of": averaged,
        "rows": rows,
    }


def write_table(table: Mapping[str, Any], folder: Path) -> None:
    """Write results.json and table.md.

    Raises:
        EvaluationError: they cannot be written.
    """
    write_result(folder / "results.json", table, EvaluationError, make_folder=True)
    write_whole(folder / "table.md", markdown(table).encode(), EvaluationError, make_folder=True)


def markdown(table: Mapping[str, Any]) -> str:
    """The table for people, as Markdown."""
    run = table["run"]
    versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    lines = [
        f"{run['model']} in {run['dtype']} on {run['device']} by {engine_of(run)}, batch size "
        f"{run['batch_size']}, seed {run['seed']}; {versions}.",
    ]
    for title, header, body in _blocks(table):
        aligned = ["---", *("---:" for _ in header[1:])]
        lines += ["", f"**{title}**", ""]
        lines += [f"| {' | '.join(row)} |" for row in (header, aligned, *body)]
    return "\n".join([*lines, "", LEGEND, ""])


def engine_of(run: Mapping[str, Any]) -> str:
    """What scored a run's results."""
    engine, ranks = str(run.get("engine", TRANSFORMERS)), run.get("tensor_parallel", 1)
    return engine if ranks == 1 else f"{engine} (tensor parallel {ranks})"


def rich_tables(table: Mapping[str, Any]) -> list[Table]:
    """The table for a terminal."""
    tables = []
    for title, header, body in _blocks(table):
        made = Table(title=title)
        for number, column in enumerate(header):
            made.add_column(column, justify="right" if number else "left")
        for row in body:
            made.add_row(*row)
        tables.append(made)
    return tables


LEGEND = (
    "± is one standard error; in brackets the difference to the first row, paired item by item. "
    "The average is that of the paper's tasks that were run. NLL: negative log-likelihood of the "
    "right answer, nats. Exact: greedy decoding writes the answer. K,V kept: share of MHA's bytes "
    "that a serving implementation of the method keeps, at the tasks' own mean length and at a "
    "long one."
)


def _blocks(table: Row) -> list[Block]:
    """Title, header and rows for accuracies, for likelihoods, for texts and for recall."""
    rows, tasks = table["rows"], table["tasks"]
    first = rows[0]["tasks"]
    lengths = [f"K,V kept at {round(rows[0][key])}" for key in ("kv_length", "kv_long_length")]
    heads = {task: f"{task} ({first[task]['items']})" for task in tasks}
    recalled = [task for task in tasks if first[task]["kind"] == RECALLED]
    blocks: list[Block] = []
    for title, measure, scale, digits in MEASURED:
        shown = [t for t in tasks if first[t][measure] is not None and t not in recalled]
        if not shown:
            continue
        summed = (rows[0]["average"] or {}).get(measure) is not None
        body = []
        for row in rows:
            cells = [row["average"]] * summed + [row["tasks"][task] for task in shown]
            words = [_words(cell, measure, scale, digits, row is rows[0]) for cell in cells]
            shares = [f"{row[key]:.1%}" for key in ("kv_share", "kv_long_share")]
            body.append([row["comparator"], *shares, *words])
        header = ["", *lengths, *["average"] * summed, *(heads[task] for task in shown)]
        blocks.append((title, header, body))
    if texts := [task for task in tasks if first[task]["kind"] == TEXT]:
        body = []
        for row in rows:
            cells = [row["tasks"][task] for task in texts]
            # the K,V bytes kept at the length of its windows, where there are several
            kept = [f" ({cell['kv_share']:.1%} kept)" * (len(texts) > 1) for cell in cells]
            words = [f"{cell['perplexity']:.3f}{k}" for cell, k in zip(cells, kept, strict=True)]
            body.append([row["comparator"], *words])
        blocks.append(("perplexity", ["", *(heads[task] for task in texts)], body))
    by_length: dict[int, list[tuple[int, str]]] = {}
    for task in recalled:
        facts, length = facts_and_length(task) or (0, 0)
        by_length.setdefault(length, []).append((facts, task))
    for length, found in by_length.items():
        header, body = ["", "K,V kept"], [[row["comparator"]] for row in rows]
        for facts, task in found:
            name = f"{facts} fact{'s' * (facts > 1)}"
            header += [f"{name}: exact, % ({first[task]['items']})", f"{name}: NLL"]
        for line, row in zip(body, rows, strict=True):
            line.append(f"{row['tasks'][found[0][1]]['kv_share']:.1%}")
            for _, task in found:
                for measure, scale, digits in (("acc", 100.0, 1), ("nll", 1.0, 4)):
                    line.append(_words(row["tasks"][task], measure, scale, digits, row is rows[0]))
        blocks.append((f"recall from {length:,} tokens", header, body))
    return blocks


def _words(cell: Row, measure: str, scale: float, digits: int, is_first: bool) -> str:
    """``61.20 ±1.10 (-0.30 ±0.20)``; of the first row without a difference."""
    value, error, difference, spread = (cell[f"{measure}{end}"] * scale for end in ENDS)
    text = f"{value:.{digits}f} ±{error:.{digits}f}"
    return text if is_first else f"{text} ({difference:+.{digits}f} ±{spread:.{digits}f})"


def _cell(result: Result, baseline: Result) -> tuple[dict[str, Any], Means]:
    """One comparator's measures in one task: plain values, and means with their differences."""
    ours, theirs = (
        [(item.doc, item.digest) for item in found.items] for found in (result, baseline)
    )
    if ours != theirs:
        raise EvaluationError(
            f"{result.comparator} and {baseline.comparator} were scored on other items of "
            f"{result.task}: evaluate into another folder"
        )
    means = {}
    for name in MEASURES:
        values, base = (
            [value for item in found.items if (value := getattr(item, name)) is not None]
            for found in (result, baseline)
        )
        if values:
            means[name] = mean_of(values), paired(values, base)
    plain: dict[str, Any] = {"kind": result.kind, "items": len(result.items)}
    plain["perplexity"] = result.metrics.get("perplexity") if result.kind == TEXT else None
    return plain | {key: result.kv_share[name] for key, name in SHARES.items()}, means


def _average(found: Sequence[Means]) -> dict[str, float | None] | None:
    """Means over tasks of each measure that all of them have."""
    if not found:
        return None
    whole = [name for name in MEASURES if all(name in means for means in found)]
    return _flat(
        {
            name: (
                average([means[name][0] for means in found]),
                average([means[name][1] for means in found]),
            )
            for name in whole
        }
    )


def _flat(means: Means) -> dict[str, float | None]:
    flat: dict[str, float | None] = dict.fromkeys(
        f"{name}{end}" for name in MEASURES for end in ENDS
    )
    for name, (own, difference) in means.items():
        values = (own.mean, own.error, difference.mean, difference.error)
        flat |= {f"{name}{end}": value for end, value in zip(ENDS, values, strict=True)}
    return flat
