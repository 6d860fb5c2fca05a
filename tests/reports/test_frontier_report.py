"""A frontier's table, its ratios to the paper's recipe, and its plot."""

import importlib.util
import math
import re

import pytest

from chai_attention.cli.tables import render
from chai_attention.errors import ChaiError
from chai_attention.evaluation.points import FrontierError, Point
from chai_attention.reports.frontier import axis_ticks, frontier_plot, frontier_table, paper_ratio


def point(recipe, saved, rise, error=0.001, **changes):
    values = {
        "recipe": recipe,
        "settings": {},
        "asked": "save",
        "budget": 0.1,
        "text": "t.txt",
        "digest": "abc",
        "context": 256,
        "windows": 16,
        "removed": 0.2,
        "saved": saved,
        "at_least": False,
        "baseline": 28.7,
        "rise": rise,
        "standard_error": error,
        "seconds": 61.7,
    }
    return Point(**{**values, **changes})


PAPER = [point("paper", 0.05, 0.10), point("paper", 0.15, 0.60), point("paper", 0.15, 0.50)]


def test_the_same_bytes_are_compared_as_they_are():
    assert paper_ratio(point("a", 0.05, 0.02), PAPER) == pytest.approx(0.2)
    # of two of the paper's with the same bytes, the better one
    assert paper_ratio(point("a", 0.15, 0.25), PAPER) == pytest.approx(0.5)
    assert paper_ratio(point("a", 0.05, -0.01), PAPER) == pytest.approx(-0.1)


def test_other_bytes_are_interpolated_on_the_log_of_perplexity():
    paper = math.exp(0.75 * math.log(1.1) + 0.25 * math.log(1.5)) - 1
    assert paper_ratio(point("a", 0.075, 0.03), PAPER) == pytest.approx(0.03 / paper)


@pytest.mark.parametrize(
    "other",
    [
        point("a", 0.049, 0.02),  # nothing is extrapolated
        point("a", 0.151, 0.02),
        point("a", 0.05, 0.02, context=512),
        point("a", 0.05, 0.02, text="u.txt"),
        point("a", 0.05, 0.02, digest="def"),
        PAPER[0],
    ],
)
def test_no_ratio_where_the_paper_was_not_measured(other):
    assert paper_ratio(other, PAPER) is None


@pytest.mark.parametrize("paper", [(0.02, 0.011), (-0.02, 0.001), (0.0, 0.0)])
def test_no_ratio_to_a_rise_within_its_error(paper):
    points = [point("paper", 0.05, *paper), *PAPER[1:]]
    for saved in (0.05, 0.1):
        assert paper_ratio(point("a", saved, 0.01), points) is None


def test_the_table_has_a_row_per_point():
    points = [
        *PAPER,
        point("gradient+recent+refit", 0.05, 0.0213, 0.0042, budget=0.05, context=1024),
        point("gradient+recent+refit", 0.05, 0.0213, 0.0042, budget=0.05),
        point("p.json", 0.3, 2.404, 0.31, asked=None, budget=None, seconds=0.0, at_least=True),
    ]
    text = render(frontier_table(points))
    lines = [line.strip() for line in text.split("Perplexity without")[0].splitlines()]
    rows = [re.split(" {2,}", line) for line in lines if line.endswith(" s")]
    assert len(rows) == len(points)
    assert rows[3] == [
        "gradient+recent+refit", "5.0%", "1024", "20.0%", "5.0%", "+2.13% ±0.42%", "-", "62 s",
    ]  # fmt: skip
    assert rows[4][2] == "256"
    assert rows[4][6] == "0.21"
    assert rows[5][:2] == ["p.json", "-"]
    assert rows[5][4:6] == ["≥ 30.0%", "+240% ±31%"]
    flat = " ".join(text.split())
    assert "28.70 on 16 sequences of 256 tokens of t.txt" in flat
    assert "a share of the K,V bytes" in flat


def test_the_table_names_the_texts_if_there_are_several():
    text = render(frontier_table([PAPER[0], point("a", 0.1, 0.1, text="u.txt", asked="removed")]))
    assert "u.txt" in text.split("Perplexity")[0]
    assert "Asked" not in text
    only = render(frontier_table([point("a", 0.1, 0.1, asked="removed")]))
    assert "t.txt" not in only.split("Perplexity")[0]
    assert "a share of the heads" in " ".join(only.split())


def figure_of(points, path, monkeypatch):
    """The figure that is drawn, and the path of its file."""
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig

    def keep(self, *args, **options):
        drawn.append(self)
        return save(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    assert frontier_plot({"m": points}, path) == path
    return drawn[0]


def test_a_panel_per_context_with_a_curve_per_recipe(tmp_path, monkeypatch):
    points = [
        *PAPER,
        point("a", 0.10, 0.02, 0.004),
        point("a", 0.05, -0.01, 0.004, at_least=True),
        point("b", 0.1, 0.05, context=1024),
    ]
    figure = figure_of(points, tmp_path / "new" / "f.png", monkeypatch)
    assert (tmp_path / "new" / "f.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    first, second = figure.axes
    assert (first.get_title(), second.get_title()) == ("256 tokens", "1024 tokens")
    assert first.get_ylabel() == "perplexity rise, %"
    assert first.get_xlabel() == second.get_xlabel() == "K,V bytes saved, %"
    assert first.get_yscale() == "symlog"
    curves = dict(zip(first.get_legend_handles_labels()[1], first.containers, strict=True))
    assert list(curves) == ["paper", "a (saves at least)"]
    line, _, bars = curves["a (saves at least)"]
    assert line.get_xdata() == pytest.approx([5, 10])
    assert line.get_ydata() == pytest.approx([-1, 2])
    assert bars[0].get_segments()[1][:, 1] == pytest.approx([1.6, 2.4])
    (legend,) = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == ["paper", "a (saves at least)", "b"]


def rows_of(points):
    return [line.split() for line in render(frontier_table(points)).splitlines() if "%" in line]


def test_points_of_other_sequences_are_not_on_one_curve_or_under_one_baseline(
    tmp_path, monkeypatch
):
    """Two runs into one folder, the second with more --windows: the text is cut anew."""
    points = [point("a", 0.1, 0.02), point("a", 0.1, 0.08, digest="def", baseline=31.2)]
    table = " ".join(render(frontier_table(points)).split())
    for said in ("28.70 on 16 sequences", "31.20 on 16 sequences", "abc", "def"):
        assert said in table
    figure = figure_of(points, tmp_path / "f.png", monkeypatch)
    assert len(figure.axes) == 2
    assert [len(axes.containers[0][0].get_xdata()) for axes in figure.axes] == [1, 1]


def test_points_of_one_recipe_with_other_settings_are_told_apart(tmp_path, monkeypatch):
    points = [
        point("default", 0.1, 0.02, settings={"context": 64}),
        point("default", 0.2, 0.08, settings={"context": 128}),
        point("share", 0.1, 0.02),
        point("share", 0.1, 0.03, asked="removed"),
        point("p.json", 0.1, 0.02, asked=None, budget=None, settings={"profile": "1f"}),
        point("p.json", 0.1, 0.03, asked=None, budget=None, settings={"profile": "2f"}),
        point("value", 0.1, 0.02, settings={"recent": 0}),
        point("value", 0.2, 0.03, settings={"recent": 0}),
    ]
    figure = figure_of(points, tmp_path / "f.png", monkeypatch)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "default (context 64)", "default (context 128)", "share (share of K,V bytes)",
        "share (share of heads)", "p.json (profile 1f)", "p.json (profile 2f)", "value",
    ]  # fmt: skip
    assert [row[0] for row in rows_of(points[-2:])[:2]] == ["value", "value"]


def test_the_paper_is_compared_with_whatever_it_is_called():
    papers = [point("paper", 0.1, 0.5, settings={"target": t}) for t in ("scores", "k-bytes")]
    table = render(frontier_table([*papers, point("a", 0.1, 0.25)]))
    assert "0.50" in next(row for row in table.splitlines() if row.split()[:1] == ["a"]).split()


def test_a_row_of_panels_per_text(tmp_path, monkeypatch):
    points = [point("a", 0.1, 0.02), point("a", 0.1, 0.02, text="u.txt")]
    figure = figure_of(points, tmp_path / "f.png", monkeypatch)
    assert [axes.get_title() for axes in figure.axes] == ["256 tokens, t.txt", "256 tokens, u.txt"]


def test_many_recipes_look_different(tmp_path, monkeypatch):
    points = [point(f"r{i}", 0.1, 0.02) for i in range(8)]
    figure = figure_of(points, tmp_path / "f.png", monkeypatch)
    looks = {(c[0].get_color(), c[0].get_marker()) for c in figure.axes[0].containers}
    assert len(looks) == 8


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.2, 4.0, [0, 0.5, 1, 2, 5]),
        (-0.7, 0.1, [-1, -0.5, 0, 0.5]),
        (3.0, 90.0, [0, 0.5, 1, 2, 5, 10, 20, 50, 100]),
        (0.0, 40_000.0, [0, 0.5, 1, 10, 100, 1000, 10_000, 100_000]),
        (0.0, 0.0, [0]),
    ],
)
def test_ticks_reach_around_the_points(low, high, ticks):
    assert axis_ticks(low, high) == ticks


def test_what_cannot_be_drawn(tmp_path, monkeypatch):
    with pytest.raises(FrontierError, match="no points"):
        frontier_plot({}, tmp_path / "f.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(FrontierError, match="cannot write"):
        frontier_plot({"m": PAPER}, tmp_path / "file" / "f.png")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ChaiError, match=r"chai-attention\[plots\]"):
        frontier_plot({"m": PAPER}, tmp_path / "f.png")
