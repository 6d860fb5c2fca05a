"""Panels: one drawing for files and for a page."""

import json
import xml.etree.ElementTree as ET

import pytest

from chai_attention.errors import ChaiError
from chai_attention.reports.drawing import (
    COLORS,
    Panel,
    bars,
    curve,
    panel_svg,
    save_panels,
    values_as_ticks,
)

matplotlib = pytest.importorskip("matplotlib", reason="needs the extra plots")


def draw(axes):
    curve(axes, [(1, 0, 0.0), (4, 10, 2.5)], "a <b>$", 1, line="--")
    curve(axes, [(1, 1, 0.0), (4, 1, 0.0)], "_hidden", 2, marked=False)
    values_as_ticks(axes, [4, 1])
    axes.set_xlabel("x")
    axes.set_ylabel("y")


def test_a_page_gets_svg_with_its_colours_tooltips_and_a_legend():
    svg, keys = panel_svg(Panel("t & u", draw))
    root = ET.fromstring(svg)
    assert root.get("aria-label") == "t & u. y against x. a <b>$"
    assert root.get("class") == "chart"
    assert [e.text for e in root.iter("title")] == ["a <b>$: 0 at 1", "a <b>$: 10 ±2.5 at 4"]
    assert "var(--c1)" in svg
    assert COLORS[1] not in svg
    assert {"1", "4"} <= {e.text for e in root.iter("text")}
    assert not any(e.get("id") for e in root.iter("g"))
    (key,) = keys
    assert (key.name, key.color, key.mark) == ("a <b>$", "c1", "╌■")


def test_two_panels_of_a_page_share_no_name():
    first, second = (panel_svg(Panel(title, draw))[0] for title in "ab")
    names = [{e.get("id") for e in ET.fromstring(svg).iter() if e.get("id")}
             for svg in (first, second)]  # fmt: skip
    assert names[0]
    assert not names[0] & names[1]


def test_bars_carry_their_texts_and_ideals():
    def panel(axes):
        bars(axes, ["x", "CHAI"], [2.0, 1.0], ["2 s", "1 s"], [None, 0.5], "CHAI")

    svg, keys = panel_svg(Panel("t", panel))
    texts = {e.text for e in ET.fromstring(svg).iter("text")}
    assert {"x: 2 s", "CHAI: 1 s"} <= texts
    assert [key.name for key in keys] == ["ideal"]


def test_the_style_is_ours_whatever_the_users(tmp_path):
    before = panel_svg(Panel("t", draw))[0]
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 30}):
        assert panel_svg(Panel("t", draw))[0] == before


def test_files_by_their_names(tmp_path):
    panels = [Panel("one", draw), Panel("two", draw, own_legend=True)]
    assert save_panels(panels, tmp_path / "new" / "a.png", ChaiError, "t").read_bytes()[:4] == (
        b"\x89PNG"
    )
    text = save_panels(panels, tmp_path / "a.svg", ChaiError, "a $title").read_text()
    for said in ("a $title", "one", "two"):
        assert said in text
    assert json.dumps(["x"]) not in text
    with pytest.raises(ChaiError, match="cannot write"):
        save_panels(panels, tmp_path, ChaiError, "t")
