"""Check that a file can be written to a place, before heavy work."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..errors import LongCatError
from .atomic import reason


def check_suffix(path: Path, suffixes: Sequence[str], what: str = "output", why: str = "") -> None:
    """Raise LongCatError unless the name of `path` ends in one of `suffixes`, in small or capital letters.

    what: what the user calls the file; why: the end of the sentence.
    """
    if path.suffix.lower() not in suffixes:
        raise LongCatError(f"{what} {str(path)!r} must end in {', '.join(suffixes)}{why}")


def check_place(path: Path, estimated_bytes: int = 0) -> None:
    """Raise LongCatError unless a file of about `estimated_bytes` can be written to `path`."""
    folder = path.resolve().parent
    if path.is_dir():
        raise LongCatError(
            f"{path} is a folder; give the name of a file in it, such as {path / ('name' + path.suffix)}"
        )
    if path.exists() and not path.is_file():
        raise LongCatError(f"{path} is not a regular file; choose another name")
    if not folder.is_dir():
        raise LongCatError(f"{path}: the folder {folder} does not exist; create it or choose another place")
    try:
        # A trial, because permissions alone do not reveal a read-only file system.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise LongCatError(f"{path}: {folder} is not writable ({reason(error)}); choose another place") from error
    free = shutil.disk_usage(folder).free
    if free < estimated_bytes:
        raise LongCatError(
            f"{path} may take {bytes_in_words(estimated_bytes)} but {folder} has {bytes_in_words(free)} free; "
            "make room or choose another place"
        )


def check_new_folder(folder: Path, name: str) -> None:
    """Raise LongCatError unless a file `name` can be written to `folder`, which may not exist yet."""
    path = folder.absolute()
    there = next(place for place in (path, *path.parents) if place.exists())
    if not there.is_dir():
        raise LongCatError(f"cannot write results to {folder}: {there} is not a folder; choose another --output")
    check_place(there / name)


def bytes_in_words(count: int) -> str:
    """A number of bytes in MB, or in GB from 10 GB on."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e10 else f"{count / 1e6:,.1f} MB"
