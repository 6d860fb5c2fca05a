"""Charts as SVG text."""

import math
import re
import xml.etree.ElementTree as ET

import pytest

from chai_attention.reports import svg
from chai_attention.reports.svg import (
    Axis,
    Series,
    line_chart,
    linear_axis,
    log_axis,
    stack_chart,
    swatch,
)


@pytest.mark.parametrize(
    ("values", "zero", "texts"),
    [
        ([0, 10], True, ["0", "2", "4", "6", "8", "10"]),
        ([3, 9.5], True, ["0", "2", "4", "6", "8", "10"]),
        ([0.02, 0.19], True, ["0", "0.05", "0.1", "0.15", "0.2"]),
        ([88, 100], False, ["87.5", "90", "92.5", "95", "97.5", "100"]),
        ([-3, 1], True, ["-3", "-2", "-1", "0", "1"]),
        ([0, 12000], True, ["0", "2,500", "5,000", "7,500", "10,000", "12,500"]),
    ],
)
def test_ticks_are_round_and_hold_all_values(values, zero, texts):
    axis = linear_axis("x", values, zero=zero)
    assert [text for _, text in axis.ticks] == texts
    assert axis.low <= min(values)
    assert axis.high >= max(values)


@pytest.mark.parametrize("value", [0.0, 5.0, -2.0])
def test_one_value_is_an_axis(value):
    for zero in (True, False):
        axis = linear_axis("x", [value], zero=zero)
        assert axis.low <= value <= axis.high
        assert axis.low < axis.high
    assert log_axis("x", [4]).place(4, 100) == 0


def test_places():
    axis = Axis("x", [], 1, 100, math.log)
    assert [axis.place(v, 200) for v in (1, 10, 100)] == pytest.approx([0, 100, 200])
    assert axis.place(1000, 200) == 200  # clipped


def test_a_chart_is_xml_with_its_points_where_they_belong():
    series = [
        Series("a <b>", [(0, 0, 0.0), (5, 10, 2.5)], style=1),
        Series("thin", [(0, 1, 0.0), (5, 1, 0.0)], faint=True),
        Series("bare", [(0, 1, 0.0), (5, 1, 0.0)], marked=False, dashed=True),
    ]
    text = line_chart(
        "t & u", linear_axis("x", [0, 5]), linear_axis("y", [0, 10]), series, marks=[5.0]
    )
    root = ET.fromstring(text)
    assert root.get("aria-label") == "t & u. y against x. a <b>, bare"
    titles = [title.text for title in root.iter("title")]
    assert titles == ["a <b>: 0 at 0", "a <b>: 10 ±2.5 at 5"]
    line = next(p for p in root.iter("path") if p.get("class") == "line c1")
    numbers = [float(n) for n in re.findall(r"[\d.]+", line.get("d"))]
    right, bottom = svg.WIDTH - svg.RIGHT, svg.HEIGHT - svg.BOTTOM
    assert numbers == [svg.LEFT, bottom, right, svg.TOP]
    level = next(p for p in root.iter("path") if p.get("class") == "level")
    assert f"{(bottom + svg.TOP) / 2:.1f}H" in level.get("d")


def test_stacks():
    root = ET.fromstring(stack_chart("t", "x", "y", ["0", "1"], [[3, 1], [2, 2]]))
    boxes = [r for r in root.iter("rect") if r.get("class").startswith("box")]
    heights = [float(box.get("height")) for box in boxes]
    assert heights[0] == pytest.approx(3 * heights[1], abs=0.2)
    assert heights[2] == pytest.approx(heights[3], abs=0.2)


@pytest.mark.parametrize("style", range(svg.COLORS + 1))
def test_every_style_has_a_swatch(style):
    root = ET.fromstring(swatch(Series("a", [], style=style)))
    assert root.find("path").get("class") == f"line c{style % svg.COLORS}"
