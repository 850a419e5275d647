"""Curves as SVG: ticks, places, what is drawn of few and of many points."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest

from sam3.engine.report_charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Series, line_chart, running_mean, ticks


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 5, 10]),
        (0.11, 0.38, [0.1, 0.2, 0.3, 0.4]),
        (-3, 3, [-4, -2, 0, 2, 4]),
        (40, 340, [0, 100, 200, 300, 400]),
        (0, 0, [0, 0.5]),
        (7, 7, [6, 8]),
        (1e-9, 4e-9, [1e-9, 2e-9, 3e-9, 4e-9]),
    ],
)
def test_ticks_are_round_and_enclose(low: float, high: float, expected: list[float]):
    assert ticks(low, high) == pytest.approx(expected)


def test_points_lie_where_the_axes_say():
    text = line_chart([Series("a & b", [(0, 0), (10, 10)]), Series("c", [(5, 5)])], "loss <1>", "step")
    chart = ElementTree.fromstring(text)
    assert chart.get("aria-label") == "loss <1>"
    lines = chart.findall("polyline")
    assert [line.get("class") for line in lines] == ["s1", "s2"]
    assert lines[0].get("points") == f"{LEFT:.1f},{HEIGHT - BOTTOM:.1f} {WIDTH - RIGHT:.1f},{TOP:.1f}"
    middle = ((LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2)
    dots = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in chart.findall("circle")]
    assert dots == [(LEFT, HEIGHT - BOTTOM), (WIDTH - RIGHT, TOP), middle]
    assert chart.find("circle/title").text == "a & b: 0 at 0"
    assert [text.text for text in chart.findall("text")] == ["0", "5", "10", "0", "5", "10", "step"]


def test_many_points_get_a_running_mean():
    points = [(float(i), float(i % 2)) for i in range(80)]
    chart = ElementTree.fromstring(line_chart([Series("noisy", points)], "loss", "step"))
    assert [line.get("class") for line in chart.findall("polyline")] == ["s1 pale", "s1"]
    assert not chart.findall("circle")
    assert running_mean([(0, 0), (1, 3), (2, 6), (3, 0)], 1) == [(0, 1.5), (1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("points", [[], [(0, math.nan)], [(math.inf, 1)]])
def test_nothing_to_draw_is_an_error(points: list):
    with pytest.raises(ValueError, match="nothing to draw"):
        line_chart([Series("x", points)], "loss", "step")
