"""Time and memory of a function on a device, within a budget; a failure is a result like any other."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import torch

from ..errors import LongCatError

GIB = 1 << 30
# The status of a row of results.
OK, FAILED, NOT_RUN, UNAVAILABLE = "ok", "failed", "not run", "unavailable"


class Budget:
    """Seconds that a run may take (None: any number); nothing new starts once they are used up."""

    def __init__(self, seconds: float | None = None) -> None:
        self.ends = math.inf if seconds is None else time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.ends - time.monotonic()

    @property
    def used_up(self) -> bool:
        return self.left <= 0


@dataclass
class Timing:
    """first_s: seconds of the first call, compilation included; times_ms: milliseconds of each later call; peak_gib:
    peak memory of the later calls, weights included, and first_peak_gib that of the first; None where the device does
    not report it."""

    first_s: float
    times_ms: list[float] = field(default_factory=list)
    peak_gib: float | None = None
    first_peak_gib: float | None = None

    @property
    def ms(self) -> float:
        """Median of the later calls, or the first call where the budget allowed only that."""
        return statistics.median(self.times_ms) if self.times_ms else 1000 * self.first_s

    def as_row(self) -> dict[str, Any]:
        return {"ms": self.ms} | asdict(self)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float | None:
    """Peak memory since `reset_peak`; None where the device does not report it."""
    return torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else None


def clean_up(device: torch.device) -> None:
    """Free what the last variant left behind, compiled graphs included."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        with suppress(RuntimeError):
            torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


class Laps:
    """Times between calls of `mark`; on CUDA by the device's own clock, so that nothing waits."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def mark(self, *_: Any) -> None:
        """End a lap, or start the first. Takes any arguments, so that it serves as a callback."""
        if self.cuda:
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record()
        else:
            self._marks.append(time.perf_counter())

    def times_ms(self) -> list[float]:
        """Milliseconds of every lap: one fewer than calls of `mark`."""
        if self.cuda and self._marks:
            self._marks[-1].synchronize()
        return [a.elapsed_time(b) if self.cuda else 1000 * (b - a) for a, b in pairwise(self._marks)]


def timed(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, from an idle device to an idle device."""
    synchronize(device)
    laps = Laps(device)
    laps.mark()
    function()
    laps.mark()
    return laps.times_ms()[0] / 1000


def measure(
    function: Callable[[], Any], device: torch.device, repeats: int, budget: Budget, warm_up: int = 1
) -> Timing:
    """Call `function` 1 + warm_up + repeats times, or fewer when the budget runs out. repeats 0: one call in all."""
    reset_peak(device)
    synchronize(device)
    started = time.perf_counter()
    function()
    synchronize(device)
    timing = Timing(time.perf_counter() - started, first_peak_gib=peak_gib(device))
    if budget.used_up or not repeats:
        timing.peak_gib = timing.first_peak_gib
        return timing
    reset_peak(device)
    for _ in range(warm_up):
        if budget.left < 3 * timing.first_s:
            break
        function()
    for _ in range(repeats):
        if timing.times_ms and budget.used_up:
            break
        timing.times_ms.append(1000 * timed(function, device))
    timing.peak_gib = peak_gib(device)
    return timing


def attempt(row: dict[str, Any], budget: Budget, run: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """`row` completed by `run(*args)`, or by the reason it was not: one failing variant must not end the others."""
    if budget.used_up:
        return row | {"status": NOT_RUN, "reason": "the budget was used up"}
    try:
        return row | {"status": OK} | run(*args)
    except LongCatError as error:
        # This machine lacks a backend or a module; the error says which.
        return row | {"status": UNAVAILABLE, "reason": str(error)}
    except Exception as error:  # a compiler or a kernel may raise anything
        sentence = " ".join(str(error).split())[:500]
        if is_out_of_memory(error):
            sentence = f"out of memory: {sentence}"
        return row | {"status": FAILED, "reason": f"{type(error).__name__}: {sentence}"}


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "out of memory" in str(error)
