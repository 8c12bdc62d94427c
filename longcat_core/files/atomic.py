"""Write files and folders under another name beside their place, then rename them: they appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import LongCatError

# Of a name, in common file systems.
MAX_NAME_BYTES = 255
# Resolved paths that `claims.claimed` holds for this process.
CLAIMED: set[Path] = set()


@contextmanager
def atomic_path(path: str | Path, suffix: str | None = None) -> Iterator[Path]:
    """A temporary path beside `path`, moved there on success and removed on any exception.

    suffix: of the temporary name; None keeps that of `path`, by which writers of media choose a format. A link is
    written through, not replaced. If what stands at `path` cannot be replaced, the finished file stays beside it under
    a free name. Raises LongCatError if the file system refuses (no space, no permission).
    """
    given = Path(path)
    # Resolved, so that the place that was checked is the place that is written to.
    path = resolved(given)
    # A killed run leaves its file. The next run that holds the name finds it; a run that does not draws its own.
    # Not the number of the process: in a container it is the same in every run.
    unique = digest(path.name) if path in CLAIMED else secrets.token_hex(4)
    temporary = temporary_path(path, given.suffix if suffix is None else suffix, unique)
    try:
        yield temporary
        # Some errors of the disk are reported here at the earliest, and libraries do not report those of closing.
        flush(temporary)
        _take_place(temporary, path)
    except OSError as error:
        raise LongCatError(f"{path} could not be written ({reason(error)}); choose another place") from error
    finally:
        temporary.unlink(missing_ok=True)


def _take_place(temporary: Path, path: Path) -> None:
    try:
        os.replace(temporary, path)
    except OSError as error:
        if not os.path.lexists(path):
            raise
        kept = free_name(path)
        os.rename(temporary, kept)
        raise LongCatError(
            f"{path} cannot be replaced ({reason(error)}); what was to replace it is complete and lies in {kept}"
        ) from error


@contextmanager
def atomic_folder(path: Path, ours: Collection[str]) -> Iterator[Path]:
    """A new folder beside `path` that takes its place on success; on any exception the old one stays.

    Files directly in it are forced to the disk before the rename, so that a power cut leaves the old or the new folder.
    ours: names of the files in such a folder; nothing else is ever deleted. A killed process may leave the two folders
    of `working_folders`, for `recover`. Raises OSError.
    """
    new, old = working_folders(path)
    recover(path, ours)
    try:
        new.mkdir()
        yield new
        for file in sorted(new.iterdir()):
            flush(file)
        flush(new)
        replaces = path.exists()
        try:
            if replaces:
                os.rename(path, old)
            os.rename(new, path)
        except BaseException:
            if replaces and not path.exists():
                os.rename(old, path)
            raise
        flush(path.parent)
    finally:
        for folder in (new, old) if path.exists() else (new,):
            with suppress(OSError):
                remove_own(folder, ours)


def working_folders(path: Path) -> tuple[Path, Path]:
    """Where `atomic_folder` prepares the new folder, and where it keeps the old one while it renames them."""
    return path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")


def recover(path: Path, ours: Collection[str]) -> None:
    """Undo what a killed `atomic_folder` left: an old folder that lost its place gets it back. Raises OSError."""
    new, old = working_folders(path)
    if old.is_dir() and not os.path.lexists(path) and not foreign(old, ours):
        os.rename(old, path)
    for folder in (new, old):
        remove_own(folder, ours)


def foreign(folder: Path, ours: Collection[str]) -> str:
    """The name of something in `folder` that `atomic_folder` did not put there, its own if it is a file, or ""."""
    if not os.path.lexists(folder):
        return ""
    if not _is_folder(folder):
        return folder.name
    return next((item.name for item in sorted(folder.iterdir()) if not _is_own(item, ours)), "")


def remove_own(folder: Path, ours: Collection[str]) -> None:
    """Delete a folder that holds files named `ours` and their temporary files alone. Raises OSError otherwise."""
    if not os.path.lexists(folder):
        return
    if name := foreign(folder, ours):
        raise OSError(errno.ENOTEMPTY, f"{name} in it is not from this program", str(folder))
    for item in folder.iterdir():
        item.rmdir() if _is_folder(item) else item.unlink()
    folder.rmdir()


def _is_own(item: Path, ours: Collection[str]) -> bool:
    if _is_folder(item):
        return item.name in ours and not any(item.iterdir())
    # A temporary file has the start of a name of ours.
    return item.name in ours or any(item.name.startswith(f".{Path(name).stem}.") for name in ours)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


# --- names -----------------------------------------------------------------------------------------------------------


def resolved(path: Path) -> Path:
    """The absolute path without links. Raises LongCatError for links that lead in a circle."""
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise LongCatError(f"{path} cannot be followed ({reason(error)}); give another name") from error


def temporary_path(path: Path, suffix: str, unique: str) -> Path:
    """The temporary name beside `path`. It is short and valid UTF-8, although that of `path` may be neither."""
    room = MAX_NAME_BYTES - len(os.fsencode(f"..{unique}{suffix}"))
    return path.with_name(f".{shortened(path.stem, min(64, room))}.{unique}{suffix}")


def shortened(name: str, count: int) -> str:
    """The start of a name: whole characters of at most `count` bytes in all, without those that are not UTF-8."""
    return name.encode("utf-8", "ignore")[: max(0, count)].decode("utf-8", "ignore")


def digest(name: str) -> str:
    """What tells the temporary files of one name from those of another."""
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:8]


def name_with(path: Path, ending: str, suffix: str | None = None) -> Path:
    """`path` with `ending` after its stem: take.mp4 and "-2" give take-2.mp4. A name too long for that is shortened.

    suffix: instead of that of `path`.
    """
    suffix = path.suffix if suffix is None else suffix
    room = MAX_NAME_BYTES - len(os.fsencode(ending + suffix))
    stem = path.stem
    if len(os.fsencode(stem)) > room:
        stem = f"{shortened(stem, room - 9)}-{digest(path.name)}"
    return path.with_name(f"{stem}{ending}{suffix}")


def free_name(path: Path) -> Path:
    """`path`, or with the first number from 2 on under which nothing stands."""
    number, candidate = 1, path
    while os.path.lexists(candidate):
        number += 1
        candidate = name_with(path, f"-{number}")
    return candidate


# --- the disk --------------------------------------------------------------------------------------------------------


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
