"""How many times as fast one setting is as another, with its range, from a few timed steps of each.

The rule: divide every time of B by every time of A, and sort the quotients. The middle one is the ratio. From both ends
as many are dropped as leave the true ratio inside in at least 9 of 10 measurements, however the times are spread (the
interval of the Mann-Whitney test; Hollander and Wolfe, Nonparametric Statistical Methods, section 4.3). A and B are
distinguishable if 1 lies outside. At 3 steps each nothing can be dropped, so ranges that overlap are not
distinguishable. With fewer steps even separate ranges happen by chance too often.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

# In how many measurements of equal settings chance may set them apart once.
ONCE_IN = 10
FEWEST = 3


class Ratio(NamedTuple):
    """How many times as long B takes as A: the middle and the ends of its range. enough: FEWEST times of each."""

    middle: float
    least: float
    most: float
    enough: bool

    @property
    def distinguishable(self) -> bool:
        return self.enough and not self.least <= 1 <= self.most


def ratio_of(a: Sequence[float], b: Sequence[float]) -> Ratio:
    """The ratio of B's times to A's; at least one positive time of each."""
    quotients = sorted(y / x for x in a for y in b)
    dropped = _dropped(len(a), len(b))
    return Ratio(
        statistics.median(quotients), quotients[dropped], quotients[-1 - dropped], min(len(a), len(b)) >= FEWEST
    )


@cache
def _dropped(a: int, b: int) -> int:
    """How many quotients to drop from each end: d - 1 for the largest d with 2 P(U < d) <= 1 / ONCE_IN."""
    counts = _orders(a, b)
    d = sum(2 * ONCE_IN * sum(counts[: u + 1]) <= sum(counts) for u in range(len(counts)))
    return max(d - 1, 0)


@cache
def _orders(a: int, b: int) -> list[int]:
    """In how many orders of a + b times U, the number of pairs in which B is smaller, is 0, 1, ..., a * b."""
    if not a or not b:
        return [1]
    # The last time of all is one of A, which all of B precede, or one of B.
    last_a, last_b = [0] * b + _orders(a - 1, b), _orders(a, b - 1) + [0] * a
    return [x + y for x, y in zip(last_a, last_b, strict=True)]
