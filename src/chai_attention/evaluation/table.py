"""The table of an evaluation: every comparator's tasks beside MHA's, with their errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from chai_attention.errors import EvaluationError
from chai_attention.evaluation.runs import SCHEMA_VERSION, TRANSFORMERS, Result, write_text
from chai_attention.evaluation.scores import Mean, average, mean_of, paired
from chai_attention.evaluation.tasks import PAPER, facts_and_length
from chai_attention.integrations.lm_eval.items import RECALLED, TEXT, Item
from chai_attention.results import write_result

MEASURES: dict[str, Callable[[Item], float | None]] = {
    "acc": lambda item: item.acc,
    "acc_norm": lambda item: item.acc_norm,
    "nll": lambda item: item.nll,
}
SHARES = {
    "kv_length": "length",
    "kv_share": "share",
    "kv_long_length": "long_length",
    "kv_long_share": "long_share",
}


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
        shares = {
            key: sum(cells[task]["plain"][key] for task in others) / len(others) for key in SHARES
        }
        rows.append(
            {
                "comparator": name,
                "source": first.source,
                "settings": first.settings["comparator"],
                "tasks": {
                    task: cell["plain"] | _flat(cell["means"]) for task, cell in cells.items()
                },
                "average": _average([cells[task]["means"] for task in averaged]),
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
    write_text(folder / "table.md", markdown(table))


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


def _blocks(table: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, header and rows for accuracies and for likelihoods."""
    rows, tasks = table["rows"], table["tasks"]
    some = rows[0]["tasks"]
    lengths = [f"K,V kept at {round(rows[0][key])}" for key in ("kv_length", "kv_long_length")]
    counts = {task: f"{task} ({some[task]['items']})" for task in tasks}
    blocks = []
    for title, measure, scale, digits in (
        ("accuracy, %", "acc", 100.0, 2),
        ("accuracy by length-normalised likelihood, %", "acc_norm", 100.0, 2),
        ("NLL of the right answer", "nll", 1.0, 4),
    ):
        shown = [
            task
            for task in tasks
            if some[task][measure] is not None and some[task]["kind"] != RECALLED
        ]
        if not shown:
            continue
        summed = rows[0]["average"] is not None and rows[0]["average"][measure] is not None
        header = ["", *lengths, *(["average"] if summed else []), *(counts[t] for t in shown)]
        body = []
        for number, row in enumerate(rows):
            cells = [row["average"]] if summed else []
            cells += [row["tasks"][task] for task in shown]
            body.append(
                [
                    row["comparator"],
                    f"{row['kv_share']:.1%}",
                    f"{row['kv_long_share']:.1%}",
                    *(_words(cell, measure, scale, digits, number > 0) for cell in cells),
                ]
            )
        blocks.append((title, header, body))
    texts = [task for task in tasks if some[task]["kind"] == TEXT]
    if texts:
        body = [
            [
                row["comparator"],
                *(_perplexity(row["tasks"][task], len(texts) > 1) for task in texts),
            ]
            for row in rows
        ]
        blocks.append(("perplexity", ["", *(counts[task] for task in texts)], body))
    return blocks + _recall_blocks(rows, [task for task in tasks if some[task]["kind"] == RECALLED])


def _recall_blocks(
    rows: Sequence[Mapping[str, Any]], tasks: Sequence[str]
) -> list[tuple[str, list[str], list[list[str]]]]:
    """A table for every length: exact answers and their likelihood, by numbers of facts."""
    by_length: dict[int, list[tuple[int, str]]] = {}
    for task in tasks:
        facts, length = facts_and_length(task) or (0, 0)
        by_length.setdefault(length, []).append((facts, task))
    blocks = []
    for length, found in by_length.items():
        header = ["", "K,V kept"]
        for facts, task in found:
            name = f"{facts} fact{'s' * (facts > 1)}"
            count = rows[0]["tasks"][task]["items"]
            header += [f"{name}: exact, % ({count})", f"{name}: NLL"]
        body = []
        for number, row in enumerate(rows):
            cells = [row["tasks"][task] for _, task in found]
            line = [row["comparator"], f"{cells[0]['kv_share']:.1%}"]
            for cell in cells:
                line += [
                    _words(cell, "acc", 100.0, 1, number > 0),
                    _words(cell, "nll", 1.0, 4, number > 0),
                ]
            body.append(line)
        blocks.append((f"recall from {length:,} tokens", header, body))
    return blocks


def _perplexity(cell: Mapping[str, Any], states_share: bool) -> str:
    """A perplexity, and the K,V bytes kept at the length of its windows where there are several."""
    words = f"{cell['perplexity']:.3f}"
    return f"{words} ({cell['kv_share']:.1%} kept)" if states_share else words


def _words(cell: Mapping[str, Any], measure: str, scale: float, digits: int, compared: bool) -> str:
    """``61.20 ±1.10 (-0.30 ±0.20)``."""
    value, error, difference, spread = (
        cell[f"{measure}{end}"] * scale for end in ("", "_se", "_diff", "_diff_se")
    )
    text = f"{value:.{digits}f} ±{error:.{digits}f}"
    if compared:
        text += f" ({difference:+.{digits}f} ±{spread:.{digits}f})"
    return text


def _cell(result: Result, baseline: Result) -> dict[str, Any]:
    """One comparator's measures in one task: plain values, and means with their differences."""
    ours, theirs = (
        [(item.doc, item.digest) for item in found.items] for found in (result, baseline)
    )
    if ours != theirs:
        raise EvaluationError(
            f"{result.comparator} and {baseline.comparator} were scored on other items of "
            f"{result.task}: evaluate into another folder"
        )
    means: dict[str, tuple[Mean, Mean] | None] = {}
    for name, read in MEASURES.items():
        values = [value for item in result.items if (value := read(item)) is not None]
        base = [value for item in baseline.items if (value := read(item)) is not None]
        means[name] = (mean_of(values), paired(values, base)) if values else None
    plain: dict[str, Any] = {"kind": result.kind, "items": len(result.items)}
    plain["perplexity"] = result.metrics.get("perplexity") if result.kind == TEXT else None
    plain |= {key: result.kv_share[name] for key, name in SHARES.items()}
    return {"plain": plain, "means": means}


def _average(cells: Sequence[Mapping[str, tuple[Mean, Mean] | None]]) -> dict[str, Any] | None:
    """Means over tasks of each measure, over those that have it in all tasks."""
    if not cells:
        return None
    means: dict[str, tuple[Mean, Mean] | None] = {}
    for name in MEASURES:
        found = [cell[name] for cell in cells]
        known = [pair for pair in found if pair is not None]
        whole = len(known) == len(found)
        means[name] = (
            (average([own for own, _ in known]), average([diff for _, diff in known]))
            if whole
            else None
        )
    return _flat(means)


def _flat(means: Mapping[str, tuple[Mean, Mean] | None]) -> dict[str, float | None]:
    flat: dict[str, float | None] = {}
    for name, pair in means.items():
        values = (None,) * 4 if pair is None else (
            pair[0].mean, pair[0].error, pair[1].mean, pair[1].error
        )  # fmt: skip
        flat |= {
            f"{name}{end}": value
            for end, value in zip(("", "_se", "_diff", "_diff_se"), values, strict=True)
        }
    return flat
