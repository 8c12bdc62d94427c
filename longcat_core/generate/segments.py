"""A folder that keeps the finished segments of a video, so that an interrupted run resumes.

    segment-001/latents.safetensors   normalized latents, fp32
    segment-001/frames.mkv            all frames, lossless
    segment-001/segment.json          settings, checksums and the previous segment's: see `Record`

A segment is written under a temporary name, flushed to disk and renamed, so it exists whole or not at all. It is reused
only while its checksums match, its settings equal the current ones, and it was made from the segment before it. Content
decides that, not the file: if a regenerated segment comes out the same, the segments after it are kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import LongCatError
from ..files.atomic import atomic_folder, foreign, reason, recover, working_folders
from ..files.differences import as_read, differences, differences_in_words
from ..files.locks import held
from ..files.media import read_video, write_video
from ..files.places import bytes_in_words
from ..files.records import parse_record
from ..files.regular import check_regular, read_bytes
from ..files.safetensors_io import read_tensors, write_safetensors
from ..sampling.conditioning import LARGE_SEED

VERSION = 1
LATENTS, FRAMES, RECORD, LOCK = "latents.safetensors", "frames.mkv", "segment.json", ".lock"
# Files that file managers write into the folders they show.
LEFT_BY_BROWSING = (".DS_Store", "Thumbs.db", "desktop.ini")
OURS = (LATENTS, FRAMES, RECORD, *LEFT_BY_BROWSING)
# What killed runs leave of a segment's folder.
LEFT = re.compile(r"\.(segment-\d{3})\.(?:new|old)")
# Free space that must remain on the disk beside a segment's own.
SPARE_BYTES = 16 << 20

Settings = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """The content of segment.json. Settings are JSON values, checksums SHA-256.

    content: checksum of latents and frames. before: that of the previous segment, "" for the first. files: checksums
    by name. notes: measurements, for reports, and the number of threads, on which the last bits depend on a CPU.
    """

    settings: Settings
    before: str
    content: str
    count: int
    files: dict[str, str]
    notes: Settings


@dataclass(frozen=True)
class _Stored(Record):
    """segment.json. checksum: of the rest."""

    version: int
    checksum: str

    @property
    def record(self) -> Record:
        return Record(**{name: value for name, value in vars(self).items() if name not in ("version", "checksum")})


@dataclass(frozen=True)
class Segment:
    """frames: uint8 [F, H, W, 3]; latents: [1, C, T, H/8, W/8] fp32 on the CPU; content: checksum of both."""

    frames: np.ndarray
    latents: Tensor
    content: str


def checksum(*parts: bytes | np.ndarray | str) -> str:
    """SHA-256 in hexadecimal over a fixed number of parts; arrays count with their shape and dtype."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            total.update(f"{part.dtype.str}{part.shape}".encode())
            total.update(np.ascontiguousarray(part).data)
        else:
            data = part.encode() if isinstance(part, str) else part
            total.update(f"{len(data)}:".encode() + data)
    return total.hexdigest()


def seed_settings(seed: int) -> Settings:
    """The seed, and a mark for seeds of which earlier code read only 32 bits: their folders are refused by name."""
    return {"seed": seed, "seed_bits": 64} if seed >= LARGE_SEED else {"seed": seed}


# Makes a segment from its number and the previous segment: frames, latents, notes.
Make = Callable[[int, Segment | None], tuple[np.ndarray, Tensor, Settings]]


class SegmentFolder:
    """The segments of one video, numbered from 0.

    changing: settings that may differ between segments and between runs; if one does, the segment is regenerated. Any
    other difference is an error, and nothing is touched. notes: the type of a record's notes; a record with others is
    damaged. Reading needs no lock; `open` takes it for `save`.
    """

    def __init__(self, path: str | Path, changing: tuple[str, ...] = (), notes: type = Settings) -> None:
        self.path = Path(path)
        self.changing = changing
        self.notes = notes

    def check(self, settings: Mapping[int, Settings] | list[Settings]) -> None:
        """Raise LongCatError if the folder holds segments with other settings, or foreign files under their names.

        settings: of every segment, by number, as they will be saved.
        """
        if self.path.exists() and not self.path.is_dir():
            raise LongCatError(f"{self.path} is not a folder; name a folder to keep the segments in")
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
                    f"{self.path} holds segments with other settings ({words}); give the same ones to resume, or "
                    "another folder to start over"
                )

    @contextmanager
    def open(self) -> Iterator[None]:
        """Lock the folder for writing and create it if necessary; if it stays empty, remove it afterwards.

        Raises LongCatError if another run holds the lock.
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
                for name in {match[1] for match in map(LEFT.fullmatch, os.listdir(self.path)) if match}:
                    # What is not ours stays; if it is in the way, `check` has said so.
                    with suppress(OSError):
                        recover(self.path / name, OURS)
                yield
        finally:
            with suppress(OSError):
                if made and {entry.name for entry in self.path.iterdir()} <= {LOCK}:
                    (self.path / LOCK).unlink(missing_ok=True)
                    self.path.rmdir()

    def find(self, number: int, settings: Settings, before: str) -> Record | None:
        """The record of an intact segment with these settings, made from the content `before`; None without one."""
        record = self._record(number)
        if record is None or differences(record.settings, as_read(settings)) or record.before != before:
            return None
        folder = self._folder(number)
        for name in (LATENTS, FRAMES):
            try:
                check_regular(folder / name)
                with open(folder / name, "rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
            except (LongCatError, OSError):
                return None
            if found != record.files.get(name):
                return None
        return record

    def load(self, number: int) -> Segment:
        """Read a segment that `find` returned. Raises LongCatError if it does not hold what its record says."""
        folder = self._folder(number)
        frames, _ = read_video(folder / FRAMES)
        latents = read_tensors(folder / LATENTS).get("latents")
        record = self._record(number)
        if record is None or latents is None or checksum(latents.float().numpy(), frames) != record.content:
            raise LongCatError(f"{folder} is damaged; delete it and run the same command again")
        # A copy: the file may be replaced while its tensors are in use.
        return Segment(frames, latents.clone(), record.content)

    def frames(self, number: int, skip: int = 0) -> np.ndarray:
        """A segment's frames without the first `skip`: uint8 [F, H, W, 3]."""
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
        """Save a segment in place of an older one; it is on disk when this returns.

        Raises LongCatError if it cannot be written; the older segments then stay.
        """
        latents = latents.detach().to("cpu", torch.float32).contiguous()
        try:
            with atomic_folder(self._folder(number), OURS) as new:
                write_safetensors(new / LATENTS, {"latents": latents})
                write_video(new / FRAMES, frames, fps)
                files = {}
                for name in (LATENTS, FRAMES):
                    with open(new / name, "rb") as file:
                        files[name] = hashlib.file_digest(file, "sha256").hexdigest()
                content = checksum(latents.numpy(), frames)
                notes = notes | {"threads": torch.get_num_threads()}
                record = Record(settings, before, content, len(frames), files, notes)
                (new / RECORD).write_text(_dumps(record), encoding="utf-8")
        except (LongCatError, OSError) as error:
            cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
            raise LongCatError(
                f"segment {number + 1} could not be written to {self.path} ({reason(cause)}); the earlier segments are "
                "kept, so free some space and run the same command again to resume"
            ) from error
        return record

    def fill(
        self, settings: Sequence[Settings], make: Make, *, fps: float, room: Sequence[int]
    ) -> Iterator[tuple[int, Record, bool]]:
        """Go through the segments: reuse those that match, make the others from the previous segment and save them.

        settings: of each segment. room: bytes that each may take. make: from a segment's number and the previous
        segment (None for the first) to its frames, latents and notes. Yields number, record, and whether it was reused,
        once it is on disk. Raises what `check`, `open`, `check_room`, `save` and `make` raise.
        """
        self.check(list(settings))
        with self.open():
            before: Segment | None = None
            content, threads = "", None
            for number, wanted in enumerate(settings):
                record = self.find(number, wanted, content)
                reused = record is not None
                if record is None:
                    self.check_room(number, room[number])
                    self._note_threads(threads, wanted)
                    if number and before is None:
                        before = self.load(number - 1)
                    frames, latents, notes = make(number, before)
                    record = self.save(number, frames, latents, settings=wanted, before=content, fps=fps, notes=notes)
                    before = Segment(frames, latents, record.content)
                else:
                    before, threads = None, record.notes.get("threads")
                content = record.content
                yield number, record, reused

    def check_room(self, number: int, bytes_needed: int) -> None:
        """Raise LongCatError unless a segment of `bytes_needed` fits on the disk."""
        free = shutil.disk_usage(self.path).free
        if free < bytes_needed + SPARE_BYTES:
            needed, spare, there = (bytes_in_words(count) for count in (bytes_needed, SPARE_BYTES, free))
            raise LongCatError(
                f"segment {number + 1} may take {needed} and {spare} must stay free, but {self.path} has {there} free; "
                "the earlier segments are kept, so free some space and run the same command again to resume"
            )

    def _note_threads(self, threads: int | None, settings: Settings) -> None:
        """Warn if the segment before was made with another number of threads."""
        now = torch.get_num_threads()
        if threads not in (None, now) and settings.get("device", "cpu") == "cpu":
            warnings.warn(
                f"{self.path} was begun with {threads} threads and goes on with {now}, so that the last bits of its "
                f"numbers may differ; set OMP_NUM_THREADS={threads} to get the same ones",
                stacklevel=3,
            )

    def _folder(self, number: int) -> Path:
        return self.path / f"segment-{number + 1:03}"

    def _check_own(self, number: int) -> None:
        """Raise LongCatError if the segment's folder, or one that saving it takes, holds what is not ours."""
        folder = self._folder(number)
        for place in (folder, *working_folders(folder)):
            if name := foreign(place, OURS):
                raise LongCatError(f"{place} is not a segment of a video ({name} is in it); name another folder")

    def _record(self, number: int) -> Record | None:
        """A segment's record; None if it is missing or damaged."""
        path = self._folder(number) / RECORD
        try:
            stored = parse_record(read_bytes(path), _Stored, str(path), "a record")
            record = stored.record
            parse_record(json.dumps(record.notes), self.notes, str(path), "a record")
        except (LongCatError, ValueError):
            return None
        whole = stored.version == VERSION and stored.checksum == checksum(_plain(asdict(record)))
        return record if whole else None


def _plain(content: Settings) -> str:
    return json.dumps(content, sort_keys=True, ensure_ascii=True)


def _dumps(record: Record) -> str:
    content = asdict(record)
    return json.dumps({"version": VERSION, "checksum": checksum(_plain(content)), **content}, indent=1) + "\n"
