"""When the frames of a clip are shown, and which frames to take at another rate.

The frame of a moment is the stored frame whose time is nearest, if that is within half an interval of the wanted rate,
and else the one that is on display then. Containers round times (GIF to 10 ms) and writers round rates (29.97), so a
clip whose rate is the wanted one, or a multiple, within that rounding is read frame for frame, without drift.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np

T = TypeVar("T")

# Relative difference of two rates that are called the same: 29.97 and 30 differ by 0.001.
SAME_RATE = 0.005
# Rounding of a frame's duration is bridged up to 10 ms, GIF's unit, and up to this share of the duration.
MAX_UNIT, MAX_ROUNDING = 0.01, 0.12
# Frames per second of an even clip that stands for one whose frames differ in duration.
USUAL_RATES = (1, 2, 3, 4, 5, 6, 7.5, 8, 10, 12, 12.5, 15, 20, 24, 25, 30, 48, 50, 60, 75, 90, 100, 120)
# A frame that would be shown for less than this share of an interval is not taken.
SHORTEST_SHARE = 0.25


@dataclass(frozen=True)
class Timeline:
    """times: float64 [N], seconds from the first frame, increasing. end: when the last frame has been shown. unit: of
    the times, seconds. nominal: seconds per frame that the container declares, for a clip of one frame."""

    times: np.ndarray
    end: float
    unit: float = 0.0
    nominal: float = 1 / 15

    @cached_property
    def interval(self) -> float:
        """Seconds between two frames, without those that are held longer."""
        if len(self.times) < 2:
            return self.nominal
        steps = np.diff(self.times)
        return float(steps[steps < 1.5 * np.median(steps)].mean())

    @cached_property
    def varies(self) -> bool:
        """Whether the frames have different durations, apart from rounding."""
        steps = np.diff(self.times)
        return bool((np.abs(steps - self.interval) > self.unit + 0.1 * self.interval).any())

    @property
    def longest(self) -> float:
        """The seconds for which the frame that is held longest is shown."""
        return float(np.diff(self.times, append=self.end).max())

    @property
    def rate(self) -> float:
        """Frames per second on average."""
        if not self.varies:
            # The declared rate is free of the rounding of times.
            same = abs(self.nominal - self.interval) <= SAME_RATE * self.interval
            return 1 / (self.nominal if same else self.interval)
        return float((len(self.times) - 1) / (self.times[-1] - self.times[0]))

    @property
    def even_rate(self) -> float:
        """Frames per second at which an even clip shows every frame of this one, apart from rare short ones."""
        if not self.varies:
            return self.rate
        if not self._uneven:
            return 1 / self.interval
        steps = np.diff(self.times)
        usual, short = float(np.median(steps)), float(np.quantile(steps, 0.1, method="lower"))
        # Phones and screen recorders miss their rate by some percent from frame to frame.
        least = 0.95 / (usual if short > 0.6 * usual else short)
        return float(next((rate for rate in USUAL_RATES if rate >= least), USUAL_RATES[-1]))

    def step(self, fps: float) -> float:
        """Seconds of this clip from one frame to the next at `fps`: 1 / fps, corrected for rounded times and rates."""
        wanted, own = 1 / fps, self.interval
        whole = own * max(1, round(wanted / own)) if own < 1.5 * wanted else own / round(own / wanted)
        if abs(whole - wanted) <= SAME_RATE * wanted:
            return whole
        rounded = self.unit if self.unit <= MAX_UNIT * 1.001 and not self._uneven else 0.0
        if abs(own - wanted) < rounded and abs(own - wanted) <= MAX_ROUNDING * wanted:
            return own
        return wanted

    @property
    def _uneven(self) -> bool:
        """Whether frames differ in duration by more than rounding, other than by whole intervals."""
        steps = np.diff(self.times) / self.interval
        return bool((np.abs(steps - np.round(steps)) * self.interval > 1.5 * self.unit).any())

    def grid(self, fps: float, *, to_last: float | None = None) -> Grid:
        """The moments of frames at `fps`, from the first frame on, or back from the moment `to_last`."""
        step = self.step(fps)
        if to_last is None:
            return Grid(0.0, step, max(1, math.ceil(self.end / step - SHORTEST_SHARE)))
        count = 1 + math.floor(to_last / step + SHORTEST_SHARE)
        return Grid(to_last - (count - 1) * step, step, count)


@dataclass(frozen=True)
class Grid:
    """`count` moments, `step` seconds apart."""

    start: float
    step: float
    count: int

    def pick(self, frames: Iterator[tuple[float, T]]) -> Iterator[T]:
        """The frames of these moments. frames: their times, seconds, increasing, and themselves."""
        number, shown = 0, next(frames, None)
        if shown is None:
            return
        for coming in frames:
            while number < self.count and (moment := self.start + number * self.step) < coming[0]:
                before, after = moment - shown[0], coming[0] - moment
                nearer = after < before - 1e-6 and after <= self.step / 2 + 1e-6
                yield (coming if nearer else shown)[1]
                number += 1
            shown = coming
        for _ in range(number, self.count):
            yield shown[1]


def even_picks(count: int, fps: float, rate: float) -> list[int]:
    """Which of `count` frames, `fps` per second, show an even clip at `rate`, back from the last one."""
    times = np.arange(count) / fps
    grid = Timeline(times, count / fps, nominal=1 / fps).grid(rate, to_last=float(times[-1]))
    return list(grid.pick((float(time), number) for number, time in enumerate(times)))
