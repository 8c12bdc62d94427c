"""A folder with the takes of a video: each set of settings that changes the result from the first segment on has one.

    segment-001/ ...        the segments of the first take: see `segments`
    take.json               the settings of its first segment, from its beginning on
    take-002/               a further take: its own take.json and segments

A run finds its take by the settings of the first segment; what only matters later makes another version of a segment in
the same take. Nothing finished is deleted or replaced. A take that is complete is read without writing anything.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import LongCatError, check_choice
from ..files.atomic import flush, foreign, reason
from ..files.differences import as_read
from ..files.locks import Busy, held
from ..files.media import open_video
from ..files.places import bytes_in_words
from ..files.records import read_record
from .footage import Footage
from .options import LOSSY_CHANGES
from .segments import (
    FRAMES,
    OURS,
    SPARE_BYTES,
    VERSION,
    Record,
    Segment,
    Take,
    _plain,
    checksum,
    read_frames,
    signature,
)
from .takes import Settings, matches, nearest

LOCK, PICKING, TAKE = ".lock", ".takes.lock", "take.json"
NAME = re.compile(r"take-(\d{3,})")
# Seconds that a run waits for another that picks its take.
PATIENCE = 20.0

# Makes a segment from its number and the previous segment: frames, latents, notes.
Make = Callable[[int, Segment | None], tuple[np.ndarray, Tensor, Settings]]


@dataclass(frozen=True)
class _Begun:
    """take.json. settings: of the take's first segment. checksum: of the settings."""

    version: int
    checksum: str
    settings: Settings


class SegmentFolder:
    """The takes of one video in a folder, and the one that a run works on.

    notes: the type of a segment's notes. lossy_change: what a run does whose settings differ from those of a take only
    in lossy ones: begin a new take, or go on in that one. say: receives `said` before the first segment is made.
    """

    def __init__(
        self,
        path: str | Path,
        notes: type = Settings,
        lossy_change: str = LOSSY_CHANGES[0],
        say: Callable[[str], None] | None = None,
    ) -> None:
        check_choice("the lossy change", lossy_change, LOSSY_CHANGES)
        self.path = Path(path)
        self.notes = notes
        self.any_lossy = lossy_change == LOSSY_CHANGES[1]
        self.say = say
        # By their paths, so that each record is read once.
        self._takes: dict[Path, Take] = {}
        # The take of the last run, at first the folder itself.
        self.take = self._take(self.path)
        # Which take the run uses and why, in a sentence; "" for the only one.
        self.said = ""

    # --- checks before the work --------------------------------------------------------------------------------------

    def check_place(self, needed: int = 0) -> None:
        """Raise LongCatError if it is known without the settings that no run can use this folder. Writes nothing.

        needed: about as many bytes as all segments take, of which some may be there already.
        """
        own = self.path.absolute()
        try:
            with suppress(FileNotFoundError, NotADirectoryError):
                # What is too long or has a null character is named here.
                own.stat()
            there = next(place for place in (own, *own.parents) if place.exists())
            is_folder = there.is_dir()
            # A finished take may be read where nothing can be written.
            read = there == own and is_folder and not all(take.is_empty for take in self.takes())
            effective = os.access in os.supports_effective_ids
            writable = read or os.access(there, os.W_OK | os.X_OK, effective_ids=effective)
        except (OSError, ValueError) as error:
            raise LongCatError(f"{self.path} cannot be used ({reason(error)}); name another folder") from error
        if not is_folder:
            raise LongCatError(f"{there} is not a folder; name a folder to keep the segments in")
        if not writable:
            raise LongCatError(f"{self.path} cannot be written to ({there} is read-only); name another folder")
        self._check_own([0])
        if needed and not read:
            self._check_free(there, needed, "the segments take")

    def check(self, settings: Sequence[Settings], room: Sequence[int] = ()) -> tuple[Take | None, int]:
        """The take of these settings, None before one has begun, and how many segments it has by its records.

        settings: of every segment. room: bytes that each may take. Reads no large files and writes nothing. Raises
        LongCatError if it is known without more that a run with these settings cannot use this folder.
        """
        self.check_place(sum(room) // 2)
        take = self._pick(settings)
        known = 0 if take is None else take.known(settings, self.any_lossy)
        if take is None or take.path == self.path:
            self._check_own(range(known, len(settings)))
        if (needed := sum(room[known:]) // 2) and self.path.exists():
            self._check_free(self.path, needed, f"the {len(settings) - known} segments that are missing take")
        return take, known

    def _check_free(self, there: Path, needed: int, what: str) -> None:
        """Raise LongCatError if the disk of the folder `there` has less than `needed` bytes free."""
        free = shutil.disk_usage(there).free
        if free < needed + SPARE_BYTES:
            about, spare, found = (bytes_in_words(count) for count in (needed, SPARE_BYTES, free))
            raise LongCatError(
                f"{what} about {about} and {spare} must stay free, but {self.path} has {found} free; free some space "
                "or name another folder"
            )

    def _check_own(self, numbers: Sequence[int]) -> None:
        """Raise LongCatError if something foreign stands under the name of a segment of the first take."""
        first = self._take(self.path)
        for number in numbers:
            place = first.path / f"segment-{number + 1:03}"
            if not first.records(number) and (name := foreign(place, OURS)):
                raise LongCatError(f"{place} is not a segment of a video ({name} is in it); name another folder")

    # --- which take --------------------------------------------------------------------------------------------------

    def _take(self, path: Path) -> Take:
        return self._takes.setdefault(path, Take(path, self.notes))

    def takes(self) -> list[Take]:
        """All takes, the first one, which is the folder itself, included."""
        try:
            found = sorted((int(name[1]), name[0]) for name in map(NAME.fullmatch, os.listdir(self.path)) if name)
        except OSError:
            found = []
        further = [self.path / name for number, name in found if number > 1 and (self.path / name).is_dir()]
        return [self._take(path) for path in (self.path, *further)]

    def _settings_of(self, take: Take) -> list[Settings]:
        """The settings that a take began with; nothing if no record says them."""
        if found := [record.settings for _, record in take.records(0)]:
            return found
        with suppress(LongCatError):
            begun = read_record(take.path / TAKE, _Begun, "the record of a take")
            if begun.version == VERSION and begun.checksum == checksum(_plain(begun.settings)):
                return [begun.settings]
        return []

    def _pick(self, settings: Sequence[Settings]) -> Take | None:
        """The take that these settings belong to; None before one has begun."""
        takes = {take.path: (take, self._settings_of(take)) for take in self.takes()}
        for any_lossy in (False, True) if self.any_lossy else (False,):
            same = [
                take
                for take, begun in takes.values()
                if any(matches(there, settings[0], True, any_lossy) for there in begun)
            ]
            if len(same) == 1:
                return same[0]
            if same:
                return max(same, key=lambda take: take.known(settings, self.any_lossy))
        # The first segment may be lost or damaged.
        for take, begun in takes.values():
            numbers = range(1, len(settings))
            if not begun and any(take.matching(number, settings[number], None) for number in numbers):
                return take
        return None

    def _describe(self, take: Take, begun: bool, settings: Settings) -> str:
        """The sentence about the take of a run. begun: it begins now."""
        others = [other for other in self.takes() if other.path != take.path]
        known = [(other, there) for other in others for there in self._settings_of(other)]
        if begun and known:
            index, differences, only_lossy = nearest([there for _, there in known], settings)
            said = f"a new take begins in {take.path}, because {known[index][0].path} has other settings"
            remedy = f"; choose '{LOSSY_CHANGES[1]}' as the lossy change to continue that one" if only_lossy else ""
            return f"{said} ({differences}){remedy}"
        if not begun and (own := self._settings_of(take)):
            _, differences, _ = nearest(own, settings)
            if differences:
                return f"the take in {take.path} goes on with other lossy settings ({differences})"
        return f"this run uses the take in {take.path}, one of {len(others) + 1}" if others else ""

    def _tell(self, take: Take, begun: bool, settings: Settings) -> None:
        self.take = take
        said = self._describe(take, begun, settings)
        if said and said != self.said and self.say is not None:
            self.say(said)
        self.said = said

    # --- writing -----------------------------------------------------------------------------------------------------

    @contextmanager
    def open(self, settings: Sequence[Settings]) -> Iterator[None]:
        """Lock the take of these settings for writing; without one, begin it. One that stays empty is removed.

        settings: of every segment. Raises LongCatError if another run holds the take, or if nothing can be written.
        """
        made = not self.path.exists()
        try:
            take, lock = self._locked_take(settings)
        except OSError as error:
            raise LongCatError(f"{self.path} cannot be written to ({reason(error)}); name another folder") from error
        try:
            yield
        finally:
            with ExitStack() as stack:
                with suppress(LongCatError, OSError):
                    stack.enter_context(self._picking())
                    if take.is_empty:
                        (take.path / TAKE).unlink(missing_ok=True)
                lock.close()
                if take.is_empty and take.path != self.path:
                    with suppress(OSError):
                        take.path.rmdir()
            if made and take.is_empty:
                with suppress(OSError):
                    self.path.rmdir()

    def _locked_take(self, settings: Sequence[Settings]) -> tuple[Take, ExitStack]:
        """The take of these settings, and what releases its lock. Raises OSError."""
        for attempt in range(3):
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                with self._picking(), ExitStack() as lock:
                    take, begun = self._pick(settings), False
                    if take is not None:
                        lock.enter_context(_alone_in(take))
                    else:
                        take, begun = self._unused(lock), True
                        self._write_settings(take, settings[0])
                    take.recover()
                    self._tell(take, begun, settings[0])
                    return take, lock.pop_all()
            except FileNotFoundError:
                # Another run ended just now and removed the folder, which it had found empty.
                if attempt == 2:
                    raise
        raise AssertionError("the last attempt returns or raises")

    def _unused(self, lock: ExitStack) -> Take:
        """A take without segments that nobody works on, or else a new one; `lock` then holds it."""
        for take in self.takes():
            left = (take.path / TAKE).exists() and not self._settings_of(take)
            if take.is_empty and not left:
                with suppress(Busy):
                    lock.enter_context(_alone_in(take))
                    return take
        numbers = [int(name[1]) for name in map(NAME.fullmatch, os.listdir(self.path)) if name]
        take = self._take(self.path / f"take-{max([1, *numbers]) + 1:03}")
        take.path.mkdir()
        lock.enter_context(_alone_in(take))
        return take

    def _write_settings(self, take: Take, settings: Settings) -> None:
        settings = as_read(settings)
        text = json.dumps({"version": VERSION, "checksum": checksum(_plain(settings)), "settings": settings}, indent=1)
        # Under one name, which the next run takes again if this one is killed here; runs pick their takes in turn.
        new = take.path / f".{TAKE}.new"
        try:
            new.write_text(text + "\n", encoding="utf-8")
            flush(new)
            os.replace(new, take.path / TAKE)
        finally:
            new.unlink(missing_ok=True)

    def _tidy(self, take: Take) -> None:
        """Remove what a killed run left in a finished take, if nobody is at work and the disk can be written to."""
        with suppress(LongCatError, OSError):
            left = (LOCK in os.listdir(take.path), PICKING in os.listdir(self.path), take.has_leftovers)
            if any(left):
                with self._picking(0), _alone_in(take):
                    take.recover()

    def _picking(self, wait: float | None = None) -> AbstractContextManager[None]:
        """Held while a take is picked, begun or removed. wait: seconds to wait for others, who take moments."""
        refusal = f"another run is picking its take in {self.path}; try again"
        return held(self.path / PICKING, refusal, wait=PATIENCE if wait is None else wait)

    def fill(
        self, settings: Sequence[Settings], make: Make, *, fps: float, room: Sequence[int]
    ) -> Iterator[tuple[int, Record, bool]]:
        """Go through the segments: reuse those that match, make the others from the previous segment and save them.

        settings: of each segment. room: bytes that each may take. make: from a segment's number and the previous
        segment (None for the first) to its frames, latents and notes. Yields number, record, and whether it was reused,
        once it is on disk. Raises what `check`, `open`, `check_room`, `save` and `make` raise.
        """
        take, known = self.check(settings, room)
        with ExitStack() as stack:
            locked = True
            if take is None or known < len(settings):
                stack.enter_context(self.open(settings))
            else:
                locked = False
                self._tell(take, False, settings[0])
                self._tidy(take)
            before: Segment | None = None
            content, threads = "", None
            for number, now in enumerate(settings):
                record = self.take.find(number, now, content, self.any_lossy)
                if record is None and not locked:
                    # Its record is there and its files are damaged.
                    stack.enter_context(self.open(settings))
                    locked = True
                    record = self.take.find(number, now, content, self.any_lossy)
                reused = record is not None
                if record is None:
                    self.take.check_room(number, room[number])
                    self._note_threads(threads, now)
                    if number and before is None:
                        before = self.take.load(number - 1)
                    frames, latents, notes = make(number, before)
                    record = self.take.save(number, frames, latents, settings=now, before=content, fps=fps, notes=notes)
                    before = Segment(frames, latents, record.content)
                else:
                    before, threads = None, record.notes.get("threads")
                content = record.content
                yield number, record, reused

    def _note_threads(self, threads: int | None, settings: Settings) -> None:
        """Warn if the segment before was made with another number of threads."""
        now = torch.get_num_threads()
        if threads not in (None, now) and settings.get("device", "cpu") == "cpu":
            warnings.warn(
                f"{self.take.path} was begun with {threads} threads and goes on with {now}, so that the last bits of "
                f"its numbers may differ; set OMP_NUM_THREADS={threads} to get the same ones",
                stacklevel=3,
            )

    # --- what the run found or made ----------------------------------------------------------------------------------

    def frames(self, number: int, skip: int = 0) -> np.ndarray:
        """A segment's frames without the first `skip`: uint8 [F, H, W, 3]."""
        return self.take.frames(number, skip)

    def file(self, number: int) -> Path:
        """The file of a segment's frames."""
        return self.take.place(number) / FRAMES

    def place(self, number: int) -> str:
        """Where a segment lies in this folder, such as take-002/segment-003-v2."""
        return self.take.place(number).relative_to(self.path).as_posix()

    def where(self, number: int) -> str:
        """The folder that a segment is in, in words: with its version, unless that is the first."""
        return in_words(self.path, self.place(number), number)

    def footage(self, parts: Sequence[tuple[int, int]], fps: float) -> Footage:
        """The frames of finished segments, read from the disk one at a time, as often as necessary.

        parts: number, and how many leading frames to leave out. Raises LongCatError for a segment that is gone; reading
        does too, and for one that was changed meanwhile.
        """
        files = [(self.file(number), skip, self.take.count(number) - skip) for number, skip in parts]
        found = [signature(file) for file, _, _ in files]
        with open_video(files[0][0]) as first:
            height, width = first.height, first.width

        def read() -> Iterator[np.ndarray]:
            for (file, skip, count), before in zip(files, found, strict=True):
                yield from read_frames(file, skip, count, before)

        return Footage(sum(count for *_, count in files), height, width, read, fps)


def in_words(folder: str | Path, place: str, number: int) -> str:
    """The folder that a segment is in, as the user named it, with its take and its version, if that is not the first.

    place: where the segment lies in `folder`.
    """
    return f"{folder}/{place}".removesuffix(f"/segment-{number + 1:03}")


def _alone_in(take: Take) -> AbstractContextManager[None]:
    """Held by the run that writes to a take. Raises Busy if another one does."""
    return held(take.path / LOCK, f"another run is writing to {take.path}; wait for its end or name another folder")
