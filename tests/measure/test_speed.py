"""Two settings, timed in turns: the order of the turns, what is said of them and what is drawn."""

from __future__ import annotations

import statistics

import numpy as np
import pytest

from longcat_core.measure.charts import INK
from longcat_core.measure.speed import TimedSetting, draw, text, turns, verdict
from longcat_core.optimize.switches import Optimizations


def side(name, *times_ms, **switches):
    return TimedSetting(name, Optimizations(**switches), "sdpa", 1.5, [float(ms) for ms in times_ms])


@pytest.mark.parametrize("steps", range(1, 21))
@pytest.mark.parametrize("often", [True, False])
def test_turns_are_complete_and_drift_hits_both_sides(steps, often):
    order = [side for side, count in turns(steps, often) for _ in range(count)]
    assert order.count(0) == order.count(1) == steps
    places = [statistics.fmean(i for i, one in enumerate(order) if one == side) for side in (0, 1)]
    assert abs(places[0] - places[1]) <= 1


def test_weights_are_loaded_three_times_at_most_where_each_turn_loads_them():
    assert [side for side, _ in turns(20, often=False)] == [0, 1, 0]
    assert turns(3, often=True) == [(0, 1), (1, 2), (0, 2), (1, 1)]


def test_verdict_gives_the_range_or_says_that_there_is_no_difference():
    fast, slow = side("A", 100, 101, 102), side("B", 150, 151, 156)
    assert verdict((fast, slow)) == "A is 1.50 times as fast as B (1.47 to 1.56)."
    slow, fast = side("A", 150, 151, 156), side("B", 100, 101, 102)
    assert verdict((slow, fast)) == "B is 1.50 times as fast as A (1.47 to 1.56)."
    noisy = side("A", 100, 130, 110), side("B", 105, 128, 99)
    assert verdict(noisy) == "A and B are not distinguishable: B takes 0.76 to 1.28 times as long."
    few = side("A", 100, 101), side("B", 150, 151)
    assert verdict(few) == "A and B are not distinguishable by fewer than 3 steps of each."
    close = side("A", 1000, 1001, 1002), side("B", 1003, 1004, 1005)
    assert verdict(close) == "A is 1.0030 times as fast as B (1.0010 to 1.0050)."


def test_report_and_plot_show_the_range():
    sides = side("A", 100, 140, 102), side("B", 150, 151, 156, fused_qkv=False)
    report = text(sides, "heading", "closing")
    assert "| a step (ms) | 102.00 | 151.00 |" in report and "| fused_qkv | on | off |" in report
    assert "| least to most (ms) | 100.00 to 140.00 | 150.00 to 156.00 |" in report
    assert "A: 100.00, 140.00, 102.00 ms" in report and "if it holds 1, A and B are not distinguishable" in report
    pixels = np.asarray(draw(sides, "heading", "closing"))
    plain = np.asarray(draw((side("A", 100, 100, 100), side("B", 150, 150, 150)), "heading", "closing"))

    def longest(picture):
        """The longest horizontal run of ink: of A's range."""
        ink = (picture == np.array(INK)).all(-1)
        return max(max(map(len, "".join(map(str, row.astype(int))).split("0"))) for row in ink)

    assert longest(pixels) > 150 > longest(plain)
