"""Files read by threads before their numbers are asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

# Enough for a fast disk.
THREADS = 3


class ReadAhead:
    """Results of jobs in their order, worked on by threads before they are asked for.

    A disk is kept busy while what came from it is converted. Results lie in buffers that serve again.
    """

    def __init__(self, jobs: Iterable[tuple[Hashable, Callable[[Tensor], Tensor]]], count: int, size: int) -> None:
        """jobs: (what is asked for, what reads it into a buffer). count: how many are read, or lie ready, at a time;
        size: bytes of the buffers, into which not everything has to fit."""
        self._jobs, self._waiting = iter(jobs), deque()
        self._buffers = [torch.empty(size, dtype=torch.uint8) for _ in range(count)]
        self._pool = ThreadPoolExecutor(THREADS, "longcat-read")
        self._taken: Tensor | None = None
        for buffer in self._buffers:
            self._begin(buffer)

    def _begin(self, buffer: Tensor) -> None:
        job = next(self._jobs, None)
        if job is not None:
            self._waiting.append((job[0], self._pool.submit(job[1], buffer), buffer))

    def take(self, wanted: Hashable) -> Tensor | None:
        """The result of the next job, if that is what is wanted; valid until the next call. Raises what it raised."""
        if not self._waiting or self._waiting[0][0] != wanted:
            return None
        if self._taken is not None:
            self._begin(self._taken)
        _, future, self._taken = self._waiting.popleft()
        return future.result()

    def close(self) -> None:
        """Drop what nobody asked for."""
        self._waiting.clear()
        self._pool.shutdown(cancel_futures=True)
