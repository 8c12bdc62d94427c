"""A folder that keeps finished segments of a video, so that a run that was cut off goes on where it was.

    segment-001/latents.safetensors   normalized latents, fp32
    segment-001/frames.mkv            all of its frames, lossless
    segment-001/segment.json          settings, checksums, what it was made from: see `Record`

A segment is written under another name, forced to the disk and then renamed, so it is there whole or not at all. It
counts only as long as its checksums hold, its settings are those of now, and the segment before is the one that it was
made from. What a segment was made from is told by content, not by file: one that is made anew and comes out the same
keeps those after it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import LongCatError
from ..files.atomic import atomic_folder, leftovers
from ..files.differences import as_read, differences_in_words
from ..files.locks import held
from ..files.media import read_video, write_video
from ..files.places import bytes_in_words
from ..files.safetensors_io import read_tensors, write_safetensors

VERSION = 1
LATENTS, FRAMES, RECORD, LOCK = "latents.safetensors", "frames.mkv", "segment.json", ".lock"
# What file managers write into folders that are looked at.
LEFT_BY_BROWSING = (".DS_Store", "Thumbs.db", "desktop.ini")
# Room that must be left on the disk beside a segment's own.
SPARE_BYTES = 16 << 20

Settings = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """What segment.json holds. Settings are plain JSON values.

    content: of latents and frames, before: of the segment before, "" for the first; files: checksums by name;
    notes: what was measured, for people and for reports. All checksums are SHA-256.
    """

    settings: Settings
    before: str
    content: str
    count: int
    files: dict[str, str]
    notes: Settings


@dataclass(frozen=True)
class Segment:
    """frames: uint8 [F, H, W, 3]; latents: [1, C, T, H/8, W/8] fp32 on the CPU; content: checksum of both."""

    frames: np.ndarray
    latents: Tensor
    content: str


def checksum(*parts: bytes | np.ndarray | str) -> str:
    """SHA-256, hexadecimal, over parts of a known number; arrays with their shape and type."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            total.update(f"{part.dtype.str}{part.shape}".encode())
            total.update(np.ascontiguousarray(part).data)
        else:
            data = part.encode() if isinstance(part, str) else part
            total.update(f"{len(data)}:".encode() + data)
    return total.hexdigest()


# A segment's number and the one before -> frames, latents, notes.
Make = Callable[[int, Segment | None], tuple[np.ndarray, Tensor, Settings]]


class SegmentFolder:
    """Segments of one video, by number from 0. changing: settings that may differ from segment to segment and from run
    to run: where one does, the segment is made anew; any other difference is an error, and nothing is touched.

    Reading needs no lock; `open` takes it and must be around every `save`.
    """

    def __init__(self, path: str | Path, changing: tuple[str, ...] = ()) -> None:
        self.path = Path(path)
        self.changing = changing

    def check(self, settings: Mapping[int, Settings] | list[Settings]) -> None:
        """Raise LongCatError where segments of other settings are in the folder, or something that is none.

        settings: of every segment by number, as they will be saved.
        """
        if self.path.exists() and not self.path.is_dir():
            raise LongCatError(f"{self.path} is no folder; name a folder to keep the segments in")
        wanted = dict(enumerate(settings)) if isinstance(settings, list) else dict(settings)
        for number, now in wanted.items():
            self._check_own(number)
            record = self._record(number)
            if record is None:
                continue
            kept = {name: value for name, value in record.settings.items() if name not in self.changing}
            now = {name: value for name, value in as_read(now).items() if name not in self.changing}
            if words := differences_in_words(kept, now):
                raise LongCatError(
                    f"{self.path} holds segments of other settings ({words}); give the same ones to continue, or "
                    "another folder to start over"
                )

    @contextmanager
    def open(self) -> Iterator[None]:
        """Hold the folder, made if need be, for writing; one that was made and stayed empty is gone afterwards.

        Raises LongCatError where another run holds it.
        """
        made = not self.path.exists()
        busy = f"another run is writing to {self.path}; wait for its end or name another folder"
        stack = ExitStack()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            stack.enter_context(held(self.path / LOCK, busy))
        except OSError as error:
            raise LongCatError(f"{self.path} cannot be written to ({error.strerror}); name another folder") from error
        try:
            with stack:
                for leftover in leftovers(self.path, "segment-*"):
                    shutil.rmtree(leftover, ignore_errors=True)
                yield
        finally:
            with suppress(OSError):
                if made and {entry.name for entry in self.path.iterdir()} <= {LOCK}:
                    (self.path / LOCK).unlink(missing_ok=True)
                    self.path.rmdir()

    def find(self, number: int, settings: Settings, before: str) -> Record | None:
        """The record of a segment that is there as wanted, made from the segment with content `before`, else None."""
        record = self._record(number)
        if record is None or record.settings != as_read(settings) or record.before != before:
            return None
        folder = self._folder(number)
        for name in (LATENTS, FRAMES):
            try:
                with open(folder / name, "rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError:
                return None
            if found != record.files.get(name):
                return None
        return record

    def load(self, number: int) -> Segment:
        """A segment that `find` found."""
        folder = self._folder(number)
        frames, _ = read_video(folder / FRAMES)
        # A copy: the file may be replaced while its tensors are in use.
        latents = read_tensors(folder / LATENTS)["latents"].clone()
        record = self._record(number)
        assert record is not None, "`find` reads the record first"
        return Segment(frames, latents, record.content)

    def frames(self, number: int, skip: int = 0) -> np.ndarray:
        """A segment's frames from `skip` on, uint8 [F, H, W, 3]."""
        return read_video(self._folder(number) / FRAMES)[0][skip:]

    def save(
        self,
        number: int,
        frames: np.ndarray,
        latents: Tensor,
        *,
        settings: Settings,
        before: str,
        fps: float,
        notes: Settings,
    ) -> Record:
        """Keep a segment in place of what was there; it is on the disk when this returns.

        Raises LongCatError where it cannot be written; the segments that were there stay.
        """
        latents = latents.detach().to("cpu", torch.float32).contiguous()
        try:
            with atomic_folder(self._folder(number)) as new:
                write_safetensors(new / LATENTS, {"latents": latents})
                write_video(new / FRAMES, frames, fps)
                files = {}
                for name in (LATENTS, FRAMES):
                    with open(new / name, "rb") as file:
                        files[name] = hashlib.file_digest(file, "sha256").hexdigest()
                content = checksum(latents.numpy(), frames)
                record = Record(settings, before, content, len(frames), files, notes)
                (new / RECORD).write_text(_dumps(record), encoding="utf-8")
        except (LongCatError, OSError) as error:
            cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
            reason = cause.strerror if isinstance(cause, OSError) else str(cause)
            raise LongCatError(
                f"segment {number + 1} could not be written to {self.path} ({reason}); what was finished before is "
                "kept: make room and run the same again to go on"
            ) from error
        return record

    def fill(
        self, settings: Sequence[Settings], make: Make, *, fps: float, room: Sequence[int]
    ) -> Iterator[tuple[int, Record, bool]]:
        """Every segment in turn: what is there as wanted is kept, what is not is made of the one before and saved.

        settings: of each; room: bytes that each may take; make: a segment's number and the one before (None for the
        first) to its frames, latents and notes. Yields number, record, and whether it was there, once it is on the
        disk. Raises LongCatError as `check`, `open`, `check_room` and `save` do, and what `make` raises.
        """
        self.check(list(settings))
        with self.open():
            before: Segment | None = None
            content = ""
            for number, wanted in enumerate(settings):
                record = self.find(number, wanted, content)
                reused = record is not None
                if record is None:
                    self.check_room(number, room[number])
                    if number and before is None:
                        before = self.load(number - 1)
                    frames, latents, notes = make(number, before)
                    record = self.save(number, frames, latents, settings=wanted, before=content, fps=fps, notes=notes)
                    before = Segment(frames, latents, record.content)
                else:
                    before = None
                content = record.content
                yield number, record, reused

    def check_room(self, number: int, bytes_needed: int) -> None:
        """Raise LongCatError unless the disk has room for a segment of so many bytes."""
        free = shutil.disk_usage(self.path).free
        if free < bytes_needed + SPARE_BYTES:
            needed, spare, there = (bytes_in_words(count) for count in (bytes_needed, SPARE_BYTES, free))
            raise LongCatError(
                f"segment {number + 1} may take {needed} and {spare} must stay free, but {self.path} has {there} free; "
                "what was finished before is kept: make room and run the same again to go on"
            )

    def _folder(self, number: int) -> Path:
        return self.path / f"segment-{number + 1:03}"

    def _check_own(self, number: int) -> None:
        """What is not ours must not be replaced."""
        folder = self._folder(number)
        if not folder.exists() and not folder.is_symlink():
            return
        foreign = [folder.name] if not folder.is_dir() or folder.is_symlink() else [
            item.name for item in folder.iterdir() if item.name not in (LATENTS, FRAMES, RECORD, *LEFT_BY_BROWSING)
        ]  # fmt: skip
        if foreign:
            raise LongCatError(f"{folder} is no segment of a video ({foreign[0]} is in it); name another folder")

    def _record(self, number: int) -> Record | None:
        """None for a record that is missing or damaged."""
        try:
            content = json.loads((self._folder(number) / RECORD).read_text(encoding="utf-8"))
            if content.pop("version") != VERSION or content.pop("checksum") != checksum(_plain(content)):
                return None
            return Record(**content)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None


def _plain(content: Settings) -> str:
    return json.dumps(content, sort_keys=True, ensure_ascii=True)


def _dumps(record: Record) -> str:
    content = asdict(record)
    return json.dumps({"version": VERSION, "checksum": checksum(_plain(content)), **content}, indent=1) + "\n"
