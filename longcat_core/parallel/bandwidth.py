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
    """In bytes per second: what each rank sends to the others in an all-to-all, and what all receive of rank 0."""

    all_to_all: float
    broadcast: float


def measured(device: torch.device, size: int) -> Bandwidth:
    """Of the default group, which has `size` ranks that all call this; the same result on all. A few milliseconds."""
    share = (GPU_BYTES if device.type == "cuda" else CPU_BYTES) // size
    given = torch.zeros(size, share, dtype=torch.uint8, device=device)
    taken = torch.empty_like(given)

    def all_to_all() -> None:
        dist.all_to_all_single(taken, given)

    def broadcast() -> None:
        dist.broadcast(given, 0)

    seconds = torch.tensor([_fastest(all_to_all, device), _fastest(broadcast, device)], dtype=torch.float64)
    # The slowest rank counts, and all must choose the same.
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return Bandwidth(share * (size - 1) / float(seconds[0]), given.numel() / float(seconds[1]))


def _fastest(run: Callable[[], None], device: torch.device) -> float:
    found = []
    # The first run sets up connections.
    for _ in range(1 + RUNS):
        dist.all_reduce(torch.zeros(1))
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - begin)
    return min(found[1:])
