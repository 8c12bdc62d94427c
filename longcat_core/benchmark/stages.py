"""The seconds of a run by stages, from the same marks as its progress bar. Imports nothing heavy."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from ..generate.progress import FIRST_STEP, STARTING, STEPS, Progress, amount

# What a process does between the end of its command and its own.
ENDING = "ending"
# The share of the bytes from which on something was loaded before its stage; the first tensor comes with its begin.
EARLY = 0.02


class StageClock:
    """Listens to the progress of one video: `cli.main.main` takes it as `watch`.

    began: what time.monotonic() said when the first stage began, which is STARTING. A stage ends when the GPU has done
    its work, for which this waits; only a benchmark may do that.
    """

    def __init__(self, began: float) -> None:
        self.marks: list[tuple[str, float]] = [(STARTING, began)]
        # When each step ended.
        self.steps: list[float] = []
        self.first_frames: float | None = None
        # Bytes that were loaded before their stage began, and of all.
        self.early: dict[str, tuple[int, int]] = {}
        self.beside: dict[str, float] = {}

    def __call__(self, task: Progress) -> None:
        stage, self.beside = task.stage or self.marks[-1][0], task.beside
        begins, stepped = stage != self.marks[-1][0], task.index > len(self.steps)
        if begins or stepped:
            _settle()
        now = time.monotonic()
        if stepped:
            self.steps.append(now)
        if begins:
            self.marks.append((stage, now))
            if task.loaded is not None and task.loaded[0] >= EARLY * task.loaded[1]:
                self.early[stage] = task.loaded
        if task.frames and self.first_frames is None:
            self.first_frames = now - self.marks[-1][1]

    def row(self, ended: float) -> dict[str, Any]:
        """What was measured, once the file was there at `ended`; see `row`."""
        seconds: dict[str, float] = {}
        for (stage, start), (_, end) in pairwise([*self.marks, ("", ended)]):
            seconds[stage] = seconds.get(stage, 0.0) + end - start
        beside = [{"name": name, "s": taken} for name, taken in self.beside.items()]
        for name, loaded in self.early.items():
            beside.append({"name": name, "s": None, "what": f"{amount(*loaded)} came before"})
        return row(seconds, [b - a for a, b in pairwise(self.steps)], beside, self.first_frames)


def row(
    seconds: dict[str, float], steps: Sequence[float], beside: Sequence[dict[str, Any]], first_frames: float | None
) -> dict[str, Any]:
    """The figures of one run. seconds: of each stage, in order, all of which the run waited for. steps: seconds of each
    step after the first. beside: work that other threads did meanwhile; first_frames: seconds from the start of
    decoding.

    sampling_s counts the first step as long as the others are, for what it takes longer is spent on kernels;
    less_sampling_s is everything else.
    """
    wall, first = sum(seconds.values()), seconds.get(FIRST_STEP, 0.0)
    step = statistics.median(steps) if steps else first
    sampling = min(step, first) + seconds.get(STEPS, 0.0)
    return {
        "wall_s": wall,
        "stages": [{"name": name, "s": taken} for name, taken in seconds.items()],
        "beside": list(beside),
        "first_frames_s": first_frames,
        "steps": 1 + len(steps),
        "step_s": step,
        "sampling_s": sampling,
        "less_sampling_s": wall - sampling,
    }


def _settle() -> None:
    """Wait for what this thread gave the GPU, but not for what other threads copy to it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
