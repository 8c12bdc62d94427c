"""A lock for a file or folder that one process at a time works on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import LongCatError


class Busy(LongCatError):
    """Another process holds the lock."""


@contextmanager
def held(lock: Path, refusal: str, *, remove: bool = False) -> Iterator[None]:
    """Hold the lock file `lock` while the block runs. remove: delete the file afterwards.

    Raises Busy with the sentence `refusal` if another process holds it, OSError if it cannot be created.
    """
    file = FileLock(lock, timeout=0)
    try:
        file.acquire()
        while remove and not lock.exists():
            # Its holder deleted the file after this process had opened it.
            file.release()
            file.acquire()
    except Timeout as error:
        raise Busy(refusal) from error
    try:
        yield
    finally:
        if remove:
            # Windows does not delete an open file; one that stays does no harm.
            with suppress(OSError):
                lock.unlink()
        file.release()
