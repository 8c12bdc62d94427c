"""How fast the ranks of a group exchange data, measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..optimize.kernels.put import put
from .windows import PROGRAMS, Windows

# Large enough that latency does not count: heads that ranks exchange in one block are as large.
GPU_BYTES, CPU_BYTES = 64 << 20, 1 << 20
RUNS = 3
# Exchanges that follow each other in a run, as in a pass, so that what starts one does not count.
IN_A_ROW = 8
# Bytes of a row that is written at once, as of four heads in 16 bits.
ROW = 1024
# What of the fastest writing is fast enough beside attention, which takes several times as long.
ENOUGH = 0.7


class Bandwidth(NamedTuple):
    """What ranks exchange: bytes per second that each sends to the others in an all-to-all, and that all receive of the
    first; the seconds of an all-to-all of one byte to each; and the bytes per second that each writes into the others'
    memory, 0 where they have no windows or gave them up."""

    all_to_all: float
    broadcast: float
    latency: float
    written: float = 0.0

    @property
    def exchange(self) -> float:
        """Bytes per second that each sends in the way in which passes exchange tensors exactly."""
        return self.written or self.all_to_all


def measured(
    device: torch.device, size: int, group: dist.ProcessGroup | None = None, windows: Windows | None = None
) -> Bandwidth:
    """Of a group of `size` ranks, or the default group, and its windows, if any. A few milliseconds.

    All ranks of the default group call this, with groups of one size, which exchange at the same time; the result is
    the same on all. Windows learn how many programs suffice for writing.
    """
    share = (GPU_BYTES if device.type == "cuda" else CPU_BYTES) // size // ROW * ROW
    given = torch.zeros(size, share, dtype=torch.uint8, device=device)
    taken = torch.empty_like(given)

    few = given[:, :1].contiguous()

    def all_to_all() -> None:
        for _ in range(IN_A_ROW):
            dist.all_to_all_single(taken, given, group=group)

    def broadcast() -> None:
        dist.broadcast(given, group=group, group_src=0)

    def latency() -> None:
        dist.all_to_all_single(torch.empty_like(few), few, group=group)

    def written(programs: int) -> None:
        assert windows is not None
        places = windows.of("measured", (size, share), torch.uint8)
        for _ in range(IN_A_ROW):
            for to in windows.others:
                put([(_rows(places[to][windows.rank]), _rows(given[to]))], programs)
        windows.arrived()

    runs = [all_to_all, broadcast, latency]
    if windows is not None:
        runs += [partial(written, programs) for programs in PROGRAMS]
    seconds = torch.tensor([_fastest(run, device) for run in runs], dtype=torch.float64)
    # The slowest rank counts, and all must choose the same.
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    exchanging, sending, empty, *writing = seconds.tolist()
    each = IN_A_ROW * share * (size - 1)
    if windows is not None:
        windows.release()
        windows.programs = fewest(dict(zip(PROGRAMS, writing, strict=True)))
    return Bandwidth(each / exchanging, given.numel() / sending, empty, each / min(writing) if writing else 0.0)


def fewest(seconds: Mapping[int, float]) -> int:
    """The fewest programs that write fast enough, of the seconds that each number took; attention has the others."""
    return min(count for count, taken in seconds.items() if ENOUGH * taken <= min(seconds.values()))


def _rows(x: Tensor) -> Tensor:
    return x.view(1, 1, -1, 1, ROW)


def _fastest(run: Callable[[], None], device: torch.device) -> float:
    found = []
    # The first run sets up connections.
    for _ in range(1 + RUNS):
        dist.all_reduce(torch.zeros(1))
        begin = time.perf_counter()
        run()
        synchronize(device)
        found.append(time.perf_counter() - begin)
    return min(found[1:])


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU has been given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
