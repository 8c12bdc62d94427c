"""How far a task is: one bar for all its parts and steps, and the words that go with it. Imports nothing heavy.

Nodes and commands show what one `Progress` says, so that both count and estimate in the same way.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .long_video import LongVideoRequest

# What happens while no step runs, and what makes a first step long.
STARTING, CHECKING = "starting", "checking the input"
LOADING_TEXT, ENCODING, LOADING = "loading the text encoder", "encoding", "loading the model"
LOADING_AUDIO = "loading the audio encoder"
DECODING, SAVING, COMPILING = "decoding", "saving", "compiling, once"
# What happens while steps run, and beside decoding.
FIRST_STEP, STEPS, WRITING = "first step", "steps", "writing the file"
# How many steps tell the share of those that a cache supplied, and how many of the latest tell the seconds.
SHARE, RECENT = 64, 16
# Steps that take less than this share of the long ones come from a cache.
SHORT = 0.25
UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def duration(seconds: float) -> str:
    """Seconds in words: 0.042 s, 3.1 s, 45 s, 2 min 40 s, 14 min, 2 h 5 min, 31 h."""
    if seconds < 9.95:
        return f"{max(seconds, 0.001):.2g} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if seconds < 595:
        minutes, rest = divmod(10 * round(seconds / 10), 60)
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(round(seconds / 60), 60)
    if not hours:
        return f"{minutes} min"
    if hours >= 10 or not minutes:
        return f"{round(seconds / 3600)} h"
    return f"{hours} h {minutes} min"


def amount(done: int, of: int) -> str:
    """Bytes of all in words: "3.1 of 27.2 GB"."""
    unit, size = next(((unit, size) for unit, size in UNITS if of >= size), UNITS[-1])
    return f"{done / size:.1f} of {of / size:.1f} {unit}"


@dataclass(frozen=True)
class Part:
    """A part of a task that is sampled on its own, such as a segment.

    steps: of its sampling. kind: parts of one kind take equally long; a kind without times of its own is estimated by
    the latest one that has some.
    """

    steps: int
    kind: str = ""


def sampled(mode: str | None, steps: int | None, kind: str = "") -> Part:
    """The part that samples with this schedule. Raises LongCatError as `make_schedule`."""
    from ..sampling.schedules import make_schedule

    assert mode is not None and steps is not None, "filled in"
    return Part(len(make_schedule(mode, steps)), kind)


def segments_of(request: LongVideoRequest) -> list[Part]:
    """The segments of a filled request; only the later ones start from given frames."""
    segments = [request.segment(number) for number in range(len(request.prompts))]
    return [sampled(each.schedule, each.steps, "later" if number else "") for number, each in enumerate(segments)]


def average_step(times: Sequence[float]) -> float:
    """The seconds of a step, from those of the last ones: a median, so that one slow step does not count.

    Steps that a cache supplied take a fraction of the others. Each of the two sorts has its own median, and their
    shares weight them.
    """
    from statistics import median

    long = sorted(times)[int(0.9 * (len(times) - 1))]
    sorts = [s for s in times if s < SHORT * long], [s for s in times if s >= SHORT * long]
    return sum(len(sort) * median(sort[-RECENT:]) for sort in sorts if sort) / len(times)


class Progress:
    """The state of a task whose parts run one after the other; `show` is called with it whenever it changes.

    done, total: the bar, which only grows. A step counts 1, and so does what ends a part (decoding and saving), if
    `closing`. what: a part in words, such as "segment". unit: a step in words. label: words in front of all others.
    """

    def __init__(
        self,
        parts: Sequence[Part] = (),
        show: Callable[[Progress], None] | None = None,
        *,
        what: str = "",
        unit: str = "step",
        closing: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.parts, self.what, self.unit, self.closing = list(parts), what, unit, int(closing)
        self.label = self.current = ""
        # Bytes of weights that are there, and those of all, while they are loaded.
        self.loaded: tuple[int, int] | None = None
        # Frames that left the decoder.
        self.frames = 0
        # What other threads did meanwhile, and its seconds.
        self.beside: dict[str, float] = {}
        self._show, self._clock = show, clock
        # The part that runs, the steps that it has done, how many parts were there already, and all steps that ran.
        self.number = self.index = self.reused = self.ran = 0
        self._started = self._part_began = self._last = clock()
        self._times: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=SHARE))
        self._latest: str | None = None
        # Seconds before the first step and after the last step of finished parts.
        self._before: list[float] = []
        self._after: list[float] = []
        # Whether something happened since the last step that does not happen again.
        self._once = True

    # --- what happens ------------------------------------------------------------------------------------------------

    def phase(self, name: str) -> None:
        """Something begins that is not a step. name: what, such as DECODING; "": the steps."""
        self._once = self._once or name == COMPILING
        self._begins(name)
        self._changed()

    def load(self, name: str, done: int, of: int) -> None:
        """Weights are loaded. name: LOADING_TEXT, LOADING_AUDIO or LOADING; done, of: bytes that are there and all."""
        self._begins(name, (done, of) if of else None)
        self._changed()

    def decoded(self, frames: int) -> None:
        """So many more frames left the decoder."""
        self.frames += frames
        self._changed()

    def worked_beside(self, name: str, seconds: float) -> None:
        """Another thread worked so long while this one did something else, or waited for it."""
        self.beside[name] = self.beside.get(name, 0.0) + seconds

    def step(self, done: int, steps: int | None = None) -> None:
        """One or more steps of the current part are finished. done: how many are; steps: how many there are, if that
        changed."""
        if self.number == len(self.parts):
            return
        part = self.parts[self.number]
        if steps is not None and steps != part.steps:
            part = self.parts[self.number] = Part(steps, part.kind)
        now, count = self._clock(), max(1, done - self.index)
        if self.index and not self._once:
            self._times[part.kind].append((now - self._last) / count)
            self._latest = part.kind
        elif not self.index and not self._once and self._times.get(part.kind):
            self._before.append(max(0.0, now - self._part_began - (self.each() or 0.0)))
        self.ran += count
        self.index, self._last, self._once = done, now, False
        self._begins("")
        self._changed()

    def finish(self, *, reused: bool = False) -> None:
        """The current part is finished; the next one begins. reused: it was there already."""
        if self.number == len(self.parts):
            return
        now = self._clock()
        if reused:
            self.reused += 1
        elif self.index:
            self._after.append(now - self._last)
        self.number, self.index = self.number + 1, 0
        self._begins("")
        self._part_began = self._last = now
        self._changed()

    def drop(self, kind: str) -> None:
        """The parts of this kind that are not finished are left out."""
        rest = [part for part in self.parts[self.number :] if part.kind != kind]
        self.parts[self.number :], self.index = rest, 0
        self._changed()

    def _begins(self, name: str, loaded: tuple[int, int] | None = None) -> None:
        self.current, self.loaded, self.frames = name, loaded, 0

    def _changed(self) -> None:
        if self._show is not None:
            self._show(self)

    # --- what it says ------------------------------------------------------------------------------------------------

    @property
    def total(self) -> int:
        return sum(part.steps + self.closing for part in self.parts)

    @property
    def done(self) -> int:
        return sum(part.steps + self.closing for part in self.parts[: self.number]) + self.index

    def each(self, kind: str | None = None) -> float | None:
        """Seconds of a step of this kind, by default the current one; None before any was measured."""
        if kind is None:
            kind = self.parts[self.number].kind if self.number < len(self.parts) else self._latest
        times = self._times.get(kind or "") or self._times.get(self._latest or "")
        return average_step(times) if times else None

    def left(self) -> float | None:
        """Seconds until everything is done, as far as measured parts tell; None before any step was measured."""
        if self.each() is None:
            return None
        from statistics import median

        before, after = (median(seconds) if seconds else 0.0 for seconds in (self._before, self._after))
        seconds = 0.0
        for number, part in enumerate(self.parts[self.number :], self.number):
            current = number == self.number
            steps = part.steps - self.index if current else part.steps
            seconds += steps * (self.each(part.kind) or 0.0)
            seconds += before if steps == part.steps else 0.0
            seconds += max(0.0, after - (self._clock() - self._last)) if current and not steps else after
        return seconds

    @property
    def words(self) -> str:
        """What happens and how long it takes: "segment 2 of 10, step 12 of 50, 3.1 s each, about 14 min left"."""
        if self.number == len(self.parts):
            return ", ".join(filter(None, (self.label, self.current, self._count)))
        return ", ".join(filter(None, (self.label, self.place, *self._figures())))

    @property
    def place(self) -> str:
        """The part, and the step that runs or what happens instead."""
        number = min(self.number + 1, len(self.parts))
        part = f"{self.what} {number} of {len(self.parts)}" if self.what and len(self.parts) > 1 else ""
        steps = self.parts[self.number].steps if self.number < len(self.parts) else 0
        step = f"{self.unit} {min(self.index + 1, steps)} of {steps}" if steps else ""
        if self.current and self.current != COMPILING:
            step = ""
        return ", ".join(filter(None, (part, step, self.current, self._count)))

    @property
    def stage(self) -> str:
        """A name for what happens now; "" between two."""
        if self.current and self.current != COMPILING:
            return self.current
        if self.number == len(self.parts):
            return ""
        return STEPS if self.index else FIRST_STEP

    @property
    def _count(self) -> str:
        """How much of it is there: "3.1 of 27.2 GB", "45 frames"."""
        if self.loaded is None:
            return f"{self.frames} frame{'s' if self.frames > 1 else ''}" if self.frames else ""
        return amount(*self.loaded)

    def _figures(self) -> tuple[str, ...]:
        each, left = self.each(), self.left()
        if each is None or left is None:
            return ()
        rest = (f"about {duration(left)} left",) if left >= 1 else ()
        return rest if self.current else (f"{duration(each)} each", *rest)

    def summary(self) -> str:
        """What the finished task took: "10 segments, 500 steps of 3.1 s, 31 min in all"."""
        took = duration(self._clock() - self._started)
        if not self.parts:
            return f"{self.current} took {took}"
        count = f"{len(self.parts)} {self.what}s" if self.what and len(self.parts) > 1 else ""
        if not self.ran:
            return f"{count or 'everything'} already there"
        each = self.each(self._latest)
        steps = f"{self.ran} {self.unit}{'s' if self.ran > 1 else ''}"
        steps += "" if each is None else f" of {duration(each)}"
        there = f"{self.reused} already there" if self.reused else ""
        return ", ".join(filter(None, (count, there, steps, f"{took} in all")))

    def stopped(self, how: str) -> str:
        """Where the task ended early. how: such as "interrupted"."""
        return f"{how} at {place}" if (place := self.place) else how
