"""The time budget of LongCat-mini's training, kept over several runs."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ...errors import LongCatError
from ...files.atomic import atomic_path
from ...files.records import read_record

REMEDY = "remove the folder to begin again"
SAVE_EVERY = 120.0  # seconds
READ_EVERY, LOG_EVERY = 10, 100  # steps


class Paused(Exception):
    """This run has used its own time; what it did is saved, and the next run goes on."""


class Clock:
    """Seconds of training by stage, over all runs that share a file.

    budget: seconds of all runs together. run: seconds that this run may take, its start included. Stages that ended are
    remembered, with the sentence that says what came out.
    """

    def __init__(
        self, file: Path, budget: float, run: float = math.inf, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.file, self.budget, self.run, self.now = file, budget, run, now
        self.seconds: dict[str, float] = {}
        self.done: dict[str, str] = {}
        if file.exists():
            saved = read_record(file, dict[str, dict], "a saved training clock", REMEDY)
            self.seconds = {name: float(value) for name, value in saved.get("seconds", {}).items()}
            self.done = {name: str(value) for name, value in saved.get("done", {}).items()}
        self.started = self.last = self.saved = now()

    @property
    def spent(self) -> float:
        """Seconds of all runs, up to the last `tick`."""
        return sum(self.seconds.values())

    @property
    def share(self) -> float:
        """Share of the budget that is spent."""
        return self.spent / self.budget

    def tick(self, stage: str) -> None:
        """Count the time since the last tick for `stage`."""
        now = self.now()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self.last
        self.last = now

    @property
    def used_up(self) -> bool:
        """Whether this run must stop."""
        return self.now() - self.started > self.run

    @property
    def due(self) -> bool:
        """Whether the training state is old enough to be saved again."""
        return self.now() - self.saved > SAVE_EVERY

    def save(self) -> None:
        """Write the file; call it after the state that belongs to it."""
        self.saved = self.now()
        with atomic_path(self.file) as temporary:
            temporary.write_text(json.dumps({"seconds": self.seconds, "done": self.done}, indent=1), encoding="utf-8")

    def finish(self, stage: str, sentence: str) -> None:
        """Mark a stage as done, print what came out, and save."""
        self.tick(stage)
        self.done[stage] = sentence
        print(f"{stage}: {sentence}; {self.seconds[stage]:.0f} s of {self.spent:.0f} s", flush=True)
        self.save()
        self.pause_if_due()

    def stage(self, name: str, run: Callable[[], str]) -> None:
        """Run a stage that is not done yet, and mark it as done."""
        if name not in self.done:
            self.finish(name, run())

    def steps(
        self, name: str, done: int, take: Callable[[float, int], Callable[[], dict[str, float]]],
        save: Callable[[int], None],
    ) -> tuple[int, dict[str, float]]:  # fmt: skip
        """Training steps until the budget is used up; returns how many there are and the last losses, smoothed.

        name: of the stage. done: steps of earlier runs. take: makes a step from the share of the stage's time that is
        gone and the number of the step, from 0, and returns what reads its losses by name, which waits for the device.
        save: keeps the state after a number of steps. Raises LongCatError if a loss is not finite, and Paused when this
        run must end.
        """
        begin, first, step = self.spent - self.seconds.get(name, 0.0), done, done
        losses: dict[str, float] = {}
        while True:
            read = take((self.spent - begin) / max(1.0, self.budget - begin), step)
            step += 1
            if step % READ_EVERY == 0 or step == first + 1:
                for which, value in read().items():
                    losses[which] = value if which not in losses else 0.9 * losses[which] + 0.1 * value
                    if not math.isfinite(value):
                        raise LongCatError(f"training diverged before step {step}; try another --seed")
                self.tick(name)
            if step % LOG_EVERY == 0:
                shown = ", ".join(f"{which}: {value:.4f}" for which, value in sorted(losses.items()))
                print(f"step {step}, {self.spent:.0f} of {self.budget:.0f} s: {shown}", flush=True)
            ended = self.share >= 1
            if ended or (step % READ_EVERY == 0 and (self.due or self.used_up)):
                save(step)
                self.tick(name)
                self.save()
                if ended:
                    return step, losses
                self.pause_if_due()

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Around the stages: says where a run stopped that goes on later."""
        try:
            yield
        except Paused:
            print(f"paused after {self.spent:.0f} of {self.budget:.0f} s; run the same command to go on", flush=True)

    def pause_if_due(self) -> None:
        """Raise Paused if this run must stop. Everything must be saved."""
        if self.used_up:
            raise Paused
