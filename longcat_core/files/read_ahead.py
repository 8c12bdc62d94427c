"""Prefetch files with threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

# Enough for a fast disk.
THREADS = 3


class ReadAhead:
    """Threads run jobs ahead of the reader, who takes the results in order, so the disk stays busy meanwhile.

    Results are in buffers that are reused.
    """

    def __init__(self, jobs: Iterable[tuple[Hashable, Callable[[Tensor], Tensor]]], count: int, size: int) -> None:
        """jobs: (key, function that reads the result into a buffer). count: number of buffers; size: their bytes; a
        larger result takes memory of its own."""
        self._jobs = iter(jobs)
        self._waiting: deque[tuple[Hashable, Future[Tensor], Tensor]] = deque()
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
        """The result of the next job if its key is `wanted`, else None; valid until the next call. Raises what the job
        raised."""
        if not self._waiting or self._waiting[0][0] != wanted:
            return None
        if self._taken is not None:
            self._begin(self._taken)
        _, future, self._taken = self._waiting.popleft()
        return future.result()

    def close(self) -> None:
        """Drop the results that were not taken."""
        self._waiting.clear()
        self._pool.shutdown(cancel_futures=True)
