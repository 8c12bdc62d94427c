"""The names of the files that a command writes, held from before its work until it ends."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

from ..files.atomic import name_with, resolved
from ..files.claims import claimed
from ..files.locks import Busy


class Outputs(ExitStack):
    """Holds names until it is closed; `longcat` gives each command one, as `args.outputs`."""

    def __init__(self) -> None:
        super().__init__()
        self._held: set[Path] = set()
        # Names that nobody gave, which must not replace a file.
        self._new: set[Path] = set()
        # About names with numbers, for when nothing is left to be refused.
        self.notes: list[str] = []

    def hold(self, path: Path, option: str = "--output") -> None:
        """Hold a name that the user gave to `option`.

        Raises LongCatError if another run holds it, or if nothing can be written there.
        """
        if resolved(path) not in self._held:
            refusal = f"another run is writing {path}; wait for its end or give another name to {option}"
            self.enter_context(claimed(path, refusal))
            self._held.add(resolved(path))

    def default(self, path: Path, *, new: bool = True) -> Path:
        """Hold a name that the user did not give: `path`, or with the first number from 2 on that is free.

        new: whether nothing may stand there. A number is one of `notes`.
        """
        number, name = 1, path
        while not self._is_free(name, new):
            number += 1
            name = name_with(path, f"-{number}")
        if number > 1:
            self.notes.append(f"{path} is taken; this run writes {name}")
        if new:
            self._new.add(name)
        return name

    def settled(self, path: Path) -> Path:
        """The name to write to after the work: `path`, or a free one if something appeared there that is not ours."""
        return self.default(path) if path in self._new and os.path.lexists(path) else path

    def _is_free(self, name: Path, new: bool) -> bool:
        if new and os.path.lexists(name):
            return False
        try:
            self.hold(name)
        except Busy:
            return False
        # The run that held it may have finished in between.
        return not (new and os.path.lexists(name))
