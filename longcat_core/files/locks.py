"""A lock for a file or folder that one process at a time works on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import LongCatError


class Busy(LongCatError):
    """Another process holds the lock."""


@contextmanager
def held(lock: Path, refusal: str, *, wait: float = 0) -> Iterator[None]:
    """Hold the lock file `lock` while the block runs; it is deleted afterwards. wait: seconds to wait for another.

    Raises Busy with the sentence `refusal` if another process holds it, OSError if it cannot be created.
    """
    # Imported here: it imports asyncio, which `longcat --help` does not need.
    from filelock import FileLock, Timeout

    file = FileLock(lock, timeout=wait)
    try:
        file.acquire()
        while not lock.exists():
            # Its holder deleted the file after this process had opened it.
            file.release()
            file.acquire()
    except Timeout as error:
        raise Busy(refusal) from error
    try:
        yield
    finally:
        # Windows does not delete an open file; it does so when the file is released.
        with suppress(OSError):
            lock.unlink()
        file.release()
