"""Names of output files, held while a run works on what they will contain: two runs never replace each other's work."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..errors import LongCatError
from .atomic import CLAIMED, digest, reason, resolved, temporary_path
from .locks import held


@contextmanager
def claimed(path: Path, refusal: str) -> Iterator[None]:
    """Hold the name `path` while the block runs, first removing temporary files that killed runs left for it.

    The system releases the lock, a hidden file beside `path`, if the process dies. Raises Busy with the sentence
    `refusal` if another run holds the name, LongCatError if nothing can be written there.
    """
    path = resolved(path)
    with ExitStack() as stack:
        try:
            stack.enter_context(held(path.with_name(f".longcat-{digest(path.name)}.lock"), refusal))
            _remove_leftovers(path)
        except OSError as error:
            raise LongCatError(f"{path} cannot be written ({reason(error)}); choose another place") from error
        CLAIMED.add(path)
        stack.callback(CLAIMED.discard, path)
        yield


def _remove_leftovers(path: Path) -> None:
    # Only who holds the name writes to such a file, with this suffix or another.
    start = f"{temporary_path(path, '', digest(path.name)).name}."
    with os.scandir(path.parent) as entries:
        left = [Path(entry.path) for entry in entries if entry.name.startswith(start)]
    for file in left:
        if file.is_file() and not file.is_symlink():
            file.unlink()
