"""The ratio of two settings' times: its range by ranks, and when two settings are distinguishable."""

from __future__ import annotations

import itertools
import random

import pytest

from longcat_core.measure.ratio import _dropped, _orders, ratio_of


def test_separate_ranges_of_three_are_distinguishable_and_overlapping_ones_are_not():
    ratio = ratio_of([100, 101, 102], [150, 151, 156])
    assert ratio.distinguishable and ratio[:3] == pytest.approx((151 / 101, 150 / 102, 156 / 100), rel=1e-2)
    assert (ratio.least, ratio.most) == (150 / 102, 156 / 100)
    assert not ratio_of([100, 101, 105], [104, 108, 110]).distinguishable
    assert not ratio_of([100, 101, 102], [102, 108, 110]).distinguishable, "ranges that touch"


def test_fewer_than_three_are_never_distinguishable():
    ratio = ratio_of([1.0, 1.1], [5.0, 5.1, 5.2])
    assert ratio.least > 4 and not ratio.enough and not ratio.distinguishable


def test_one_outlier_among_many_does_not_hide_a_difference():
    a, b = [100 + i / 10 for i in range(12)], [110 + i / 10 for i in range(12)]
    assert ratio_of(a, [*b[:-1], 90.0]).distinguishable
    assert not ratio_of(a, [100.05 + i / 10 for i in range(12)]).distinguishable


@pytest.mark.parametrize(("a", "b"), [(1, 1), (3, 3), (2, 5), (4, 3)])
def test_orders_are_counted(a, b):
    counts = [0] * (a * b + 1)
    for places in itertools.combinations(range(a + b), a):
        counts[sum(p > q for p in places for q in {*range(a + b)} - {*places})] += 1
    assert counts == _orders(a, b)


def test_as_many_are_dropped_as_in_tables_of_the_test():
    """Critical values of U, two-sided at 10 %, for equal sizes from 3 to 20."""
    table = [0, 1, 4, 7, 11, 15, 21, 27, 34, 42, 51, 61, 72, 83, 96, 109, 123, 138]
    assert [_dropped(size, size) for size in range(3, 21)] == table


def test_equal_settings_are_found_apart_in_at_most_one_of_ten_measurements():
    numbers = random.Random(1)

    def times(count: int) -> list[float]:
        return [numbers.lognormvariate(0, 0.1) for _ in range(count)]

    for count in (3, 5, 9):
        apart = sum(ratio_of(times(count), times(count)).distinguishable for _ in range(2000))
        assert 0.04 < apart / 2000 < 0.125
