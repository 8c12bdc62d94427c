"""Prefetch files with threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

# Three are enough for a fast disk. From the system's cache each copies 1 to 2 GB/s, a part of what a GPU takes.
THREADS = max(3, min(12, (os.cpu_count() or 1) // 2))


class ReadAhead:
    """Threads run jobs ahead of the reader, who takes the results in order, so the disk stays busy meanwhile.

    Results are in buffers that are reused.
    """

    def __init__(
        self,
        jobs: Iterable[tuple[Hashable, Callable[[Tensor], Tensor]]],
        buffers: Sequence[Tensor],
        used: Callable[[], Callable[[], object]] | None = None,
    ) -> None:
        """jobs: (key, function that reads the result into a buffer). buffers: [bytes] uint8 each; a larger result takes
        memory of its own. used: called when the reader has done with a result; returns what waits until its buffer may
        be written again, as a copy to a GPU may still be under way.
        """
        self._jobs, self._used = iter(jobs), used
        self._waiting: deque[tuple[Hashable, Future[Tensor], Tensor]] = deque()
        self._pool = ThreadPoolExecutor(THREADS, "longcat-read")
        self._taken: Tensor | None = None
        for buffer in buffers:
            self._begin(buffer)

    def _begin(self, buffer: Tensor, free: Callable[[], object] = lambda: None) -> None:
        job = next(self._jobs, None)
        if job is not None:
            key, read = job

            def fill() -> Tensor:
                free()
                return read(buffer)

            self._waiting.append((key, self._pool.submit(fill), buffer))

    def take(self, wanted: Hashable) -> Tensor | None:
        """The result of the next job if its key is `wanted`, else None; valid until the next call. Raises what the job
        raised."""
        if not self._waiting or self._waiting[0][0] != wanted:
            return None
        if self._taken is not None:
            self._begin(self._taken, *(() if self._used is None else (self._used(),)))
        _, future, self._taken = self._waiting.popleft()
        return future.result()

    def close(self) -> None:
        """Drop the results that were not taken."""
        self._waiting.clear()
        self._pool.shutdown(cancel_futures=True)
