"""Bars and lines: lengths, places and ticks."""

from __future__ import annotations

import numpy as np
import pytest

from longcat_core.measure import charts
from longcat_core.measure.charts import BLUE, ORANGE, Axis, Bar, Bars, Line, Panel, Stack


def columns(picture, color):
    """First and last column of a color."""
    found = np.argwhere((np.asarray(picture) == np.array(color)).all(-1))[:, 1]
    return found.min(), found.max()


def test_bars_are_as_long_as_their_values():
    picture = charts.bar_chart("title", [Bars("ms", [Bar("a", 10, BLUE, "10"), Bar("b", -5, ORANGE, "-5")])])
    (zero, end), (start, other_zero) = columns(picture, BLUE), columns(picture, ORANGE)
    assert abs(zero - other_zero) <= 1 and end - zero == pytest.approx(2 * (other_zero - start), abs=3)


def test_each_group_has_its_own_scale():
    groups = [Bars("ms", [Bar("a", 1000, BLUE, "1000")]), Bars("s", [Bar("a", 1, ORANGE, "1")])]
    picture = charts.bar_chart("title", groups, above=["small " * 60], below=["print " * 60])
    assert columns(picture, BLUE) == columns(picture, ORANGE)


def test_parts_of_a_bar_follow_one_another_on_one_scale():
    stacks = [Stack("a", [("x", 1.0), ("y", 3.0)], "4 s"), Stack("b", [("y", 2.0)], "2 s")]
    picture = charts.stacked_chart("title", stacks, {"x": BLUE, "y": ORANGE}, {"x": "one", "y": "two"})
    bars = np.asarray(picture)[66:166]
    (start, between), (_, end) = columns(bars[:50], BLUE), columns(bars[:50], ORANGE)
    assert end - start == pytest.approx(4 * (between - start), abs=4)
    other, last = columns(bars[52:], ORANGE)
    assert abs(other - start) <= 1 and last - other == pytest.approx((end - start) / 2, abs=3)


def test_a_line_rises_from_left_to_right():
    axis = Axis(0, 10, [(0, "0"), (10, "10")])
    panel = Panel("ms", 200, axis, [Line([(0, 0), (10, 10)], BLUE)])
    picture = charts.line_chart("title", [panel, panel], axis, "x", legend=[("ms", ORANGE, charts.DASH)], note="note")
    found = np.argwhere((np.asarray(picture)[: picture.height // 2] == np.array(BLUE)).all(-1))
    first, last = found[found[:, 1].argmin()], found[found[:, 1].argmax()]
    assert first[0] - last[0] > 150 and last[1] - first[1] > 700
    assert columns(picture, ORANGE)[0] == charts.MARGIN


def test_no_two_lines_of_a_plot_look_alike():
    looks = [*charts.styles(24), (charts.FLOOR_COLOR, charts.DASH)]
    assert len(set(looks)) == 25 and len(charts.styles(30)) == 30
    axis = Axis(0, 10, [])
    row, drawn = [(0, 5), (10, 5)], {}
    for color, dash in looks:
        panel = Panel("dB", 40, axis, [Line(row, color, dash)])
        picture = np.asarray(charts.line_chart("title", [panel], axis, "x", legend=[("B", color, dash)]))
        found = (picture == np.array(color)).all(-1)
        drawn[color, dash] = found[:150].tobytes(), found[150:].tobytes()
    for part in zip(*drawn.values(), strict=True):
        assert len({(color, mask) for (color, _), mask in zip(drawn, part, strict=True)}) == 25


def test_axes_hold_all_values():
    assert [label for _, label in charts.log_axis([17, 3345]).ticks] == [
        "10", "20", "50", "100", "200", "500", "1,000", "2,000", "5,000"
    ]  # fmt: skip
    assert [label for _, label in charts.even_axis(0, 11.6).ticks] == ["0", "2", "4", "6", "8", "10", "12"]
    assert Axis(0, 10, []).place(15, 100, 0) == 0 and Axis(5, 5, []).place(5, 0, 100) == 50
