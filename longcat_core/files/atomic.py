"""Write files and folders under another name beside their place, then rename them: they appear whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import LongCatError


@contextmanager
def atomic_path(path: str | Path, suffix: str | None = None) -> Iterator[Path]:
    """A temporary path beside `path`, moved there on success and removed on any exception.

    suffix: of the temporary name; None keeps that of `path`, by which writers of media choose a format. A link is
    written through, not replaced. Raises LongCatError if the file system refuses (no space, no permission).
    """
    # Resolved, so that the place that was checked is the place that is written to.
    path = Path(path).resolve()
    # Not the number of the process: in a container it is the same in every run, and a killed run leaves its file.
    unique = secrets.token_hex(4)
    temporary = path.with_name(f".{path.stem[:64]}.{unique}{path.suffix if suffix is None else suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise LongCatError(f"{path} could not be written ({reason(error)}); choose another place") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path` that takes its place on success; on any exception the old one stays.

    Files directly in it are forced to the disk before the rename, so that a power cut leaves the old or the new folder.
    A killed process may leave the folders that `leftovers` lists. Raises OSError.
    """
    new, old = (path.with_name(f".{path.name}.{suffix}") for suffix in ("new", "old"))
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        yield new
        for file in sorted(new.iterdir()):
            flush(file)
        flush(new)
        replaces = path.exists()
        if replaces:
            shutil.rmtree(old, ignore_errors=True)
            os.rename(path, old)
        try:
            os.rename(new, path)
        except OSError:
            if replaces:
                os.rename(old, path)
            raise
        flush(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def leftovers(folder: Path, name: str) -> list[Path]:
    """What killed processes left in `folder` of atomic folders whose names match the pattern `name`."""
    return [*folder.glob(f".{name}.new"), *folder.glob(f".{name}.old")]


def flush(path: Path) -> None:
    """Force a file or folder to the disk, because the system may keep what was written in memory."""
    try:
        file = os.open(path, os.O_RDONLY)
    except PermissionError:
        # Windows cannot open folders.
        return
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):
            raise
    finally:
        os.close(file)


def reason(error: BaseException) -> str:
    """Why reading or writing failed, in words and on one line."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "no space left on the disk"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())
