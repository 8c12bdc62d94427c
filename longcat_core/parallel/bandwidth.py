"""How fast the ranks of a group exchange data, measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

# Large enough that latency does not count: heads that ranks exchange in one block are as large.
GPU_BYTES, CPU_BYTES = 64 << 20, 1 << 20
RUNS = 3


class Bandwidth(NamedTuple):
    """What ranks exchange: bytes per second that each sends to the others in an all-to-all, and that all receive of the
    first; and the seconds of an all-to-all of one byte to each."""

    all_to_all: float
    broadcast: float
    latency: float


def measured(device: torch.device, size: int, group: dist.ProcessGroup | None = None) -> Bandwidth:
    """Of a group of `size` ranks, or the default group. A few milliseconds.

    All ranks of the default group call this, with groups of one size, which exchange at the same time; the result is
    the same on all.
    """
    share = (GPU_BYTES if device.type == "cuda" else CPU_BYTES) // size
    given = torch.zeros(size, share, dtype=torch.uint8, device=device)
    taken = torch.empty_like(given)

    few = given[:, :1].contiguous()

    def all_to_all() -> None:
        dist.all_to_all_single(taken, given, group=group)

    def broadcast() -> None:
        dist.broadcast(given, group=group, group_src=0)

    def latency() -> None:
        dist.all_to_all_single(torch.empty_like(few), few, group=group)

    runs = all_to_all, broadcast, latency
    seconds = torch.tensor([_fastest(run, device) for run in runs], dtype=torch.float64)
    # The slowest rank counts, and all must choose the same.
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    exchanging, sending, empty = seconds.tolist()
    return Bandwidth(share * (size - 1) / exchanging, given.numel() / sending, empty)


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
