"""Check that a file can be written to a place, before heavy work."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

from ..errors import LongCatError
from .atomic import reason, resolved, temporary_path


def check_suffix(path: Path, suffixes: Sequence[str], what: str = "output", why: str = "") -> None:
    """Raise LongCatError unless the name of `path` ends in one of `suffixes`, in small or capital letters.

    what: what the user calls the file; why: the end of the sentence.
    """
    if path.suffix.lower() not in suffixes:
        raise LongCatError(f"{what} {str(path)!r} must end in {', '.join(suffixes)}{why}")


def check_place(path: Path, estimated_bytes: int = 0) -> None:
    """Raise LongCatError unless a file of about `estimated_bytes` can be written to `path`."""
    target = resolved(path)
    folder = target.parent
    try:
        is_folder, is_other = path.is_dir(), path.exists() and not path.is_file()
        free = shutil.disk_usage(folder).free if folder.is_dir() else None
    except (OSError, ValueError) as error:
        raise LongCatError(f"{path} cannot be written ({reason(error)}); choose another name") from error
    if is_folder:
        raise LongCatError(
            f"{path} is a folder; give the name of a file in it, such as {path / ('name' + path.suffix)}"
        )
    if is_other:
        raise LongCatError(f"{path} is not a regular file; choose another name")
    if free is None:
        raise LongCatError(f"{path}: the folder {folder} does not exist; create it or choose another place")
    _try_names(path, target)
    if free < estimated_bytes:
        raise LongCatError(
            f"{path} may take {bytes_in_words(estimated_bytes)} but {folder} has {bytes_in_words(free)} free; "
            "make room or choose another place"
        )


def _try_names(path: Path, target: Path) -> None:
    """Create and remove an empty file under the temporary name, and one under a name like that of `target`.

    Permissions alone do not reveal a read-only file system, nor which names it takes. The name itself is left alone,
    because somebody may be waiting for it to appear.
    """
    like = target.with_name("~" * len(os.fsencode(target.name[:1])) + target.name[1:])
    for trial in (temporary_path(target, path.suffix, secrets.token_hex(4)), like):
        try:
            os.close(os.open(trial, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
            os.unlink(trial)
        except FileExistsError:
            # The file system takes such names.
            continue
        except OSError as error:
            raise LongCatError(
                f"{path}: {target.parent} takes no file of that name ({reason(error)}); choose another place or name"
            ) from error


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
