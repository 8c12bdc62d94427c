"""The segments of one take, kept in a folder so that an interrupted run resumes.

    segment-001/latents.safetensors   normalized latents, fp32
    segment-001/frames.mkv            all frames, lossless
    segment-001/segment.json          settings, checksums and the previous segment's: see `Record`
    segment-001-v2/                   another version, made with other settings or from another segment before it

A segment is written under a temporary name, flushed to disk and renamed, so it exists whole or not at all. It is found
by its content: its checksums match, its settings equal the current ones, and it was made from the segment before it.
If a regenerated segment comes out the same, the segments after it are kept. Nothing finished is replaced: only a
segment with the very same settings whose files are damaged is made again in its place.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import LongCatError
from ..files.atomic import atomic_folder, foreign, reason, recover, working_folders
from ..files.media import open_video, read_video, write_video
from ..files.places import bytes_in_words
from ..files.records import parse_record
from ..files.regular import check_regular, read_bytes
from ..files.safetensors_io import read_tensors, write_safetensors
from ..sampling.conditioning import LARGE_SEED
from .takes import Settings, matches

VERSION = 1
LATENTS, FRAMES, RECORD = "latents.safetensors", "frames.mkv", "segment.json"
# Files that file managers write into the folders they show.
LEFT_BY_BROWSING = (".DS_Store", "Thumbs.db", "desktop.ini")
OURS = (LATENTS, FRAMES, RECORD, *LEFT_BY_BROWSING)
NAME = re.compile(r"segment-(\d{3})(?:-v([1-9]\d*))?")
# What killed runs leave of a segment's folder.
LEFT = re.compile(rf"\.({NAME.pattern})\.(?:new|old)")
# Free space that must remain on the disk beside a segment's own.
SPARE_BYTES = 16 << 20
# What tells that a file is the one that was checked: its number on the disk, its size and its time of change.
Signature = tuple[int, int, int]


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


class Take:
    """The segments of one take, numbered from 0, each in one version or more.

    notes: the type of a record's notes; a record with others counts as damaged. Reading needs no lock.
    """

    def __init__(self, path: Path, notes: type = Settings) -> None:
        self.path = path
        self.notes = notes
        # Folders of the versions that this run found or made, and what was checked of their files, by path.
        self._used: dict[int, Path] = {}
        self._checked: dict[Path, tuple[Signature, str]] = {}
        self._read: dict[Path, tuple[Signature, Record | None]] = {}

    def place(self, number: int) -> Path:
        """The folder of a segment, in the version that this run found or made, else the first."""
        return self._used.get(number, self.path / _name(number))

    def versions(self, number: int) -> list[tuple[int, Path]]:
        """All that stands under a name of this segment: version and path, in order."""
        start = _name(number)
        names = [name for name in self._names() if name.startswith(start)]
        return sorted((int(name[2] or 1), self.path / name[0]) for name in map(NAME.fullmatch, names) if name)

    def _names(self) -> list[str]:
        try:
            return os.listdir(self.path)
        except OSError:
            return []

    def records(self, number: int) -> list[tuple[Path, Record]]:
        """The versions of a segment whose record can be read."""
        found = ((path, self._record(path)) for _, path in self.versions(number))
        return [(path, record) for path, record in found if record is not None]

    @property
    def is_empty(self) -> bool:
        """Whether nothing stands under the name of a segment."""
        return not any(map(NAME.fullmatch, self._names()))

    def matching(
        self, number: int, settings: Settings, before: str | None, any_lossy: bool = False
    ) -> list[tuple[Path, Record]]:
        """The versions of a segment with these settings, made from the content `before`; None: from any.

        any_lossy: also those that differ in lossy settings, after the others. Looks at records, not at files.
        """
        first = number == 0
        found = [pair for pair in self.records(number) if before in (None, pair[1].before)]
        same = [pair for pair in found if matches(pair[1].settings, settings, first)]
        if any_lossy:
            same += [pair for pair in found if pair not in same and matches(pair[1].settings, settings, first, True)]
        return same

    def known(self, settings: Sequence[Settings], any_lossy: bool = False) -> int:
        """How many of the first segments are there, by their records."""
        content = ""
        for number, wanted in enumerate(settings):
            found = self.matching(number, wanted, content, any_lossy)
            if not found:
                return number
            content = found[0][1].content
        return len(settings)

    def find(self, number: int, settings: Settings, before: str, any_lossy: bool = False) -> Record | None:
        """The record of an intact version with these settings, made from the content `before`; None without one."""
        for path, record in self.matching(number, settings, before, any_lossy):
            if all(self._checksum(path / name) == record.files.get(name) for name in (LATENTS, FRAMES)):
                self._used[number] = path
                return record
        return None

    def count(self, number: int) -> int:
        """How many frames the version in use has. Raises LongCatError if it is gone."""
        check_there(self.place(number) / FRAMES)
        record = self._record(self.place(number))
        if record is None:
            raise LongCatError(f"{self.place(number)} is damaged; run the same task again to make it again")
        return record.count

    def load(self, number: int) -> Segment:
        """Read the version in use. Raises LongCatError if it does not hold what its record says."""
        folder = self.place(number)
        frames = self.frames(number)
        latents = read_tensors(folder / LATENTS).get("latents")
        record = self._record(folder)
        if record is None or latents is None or checksum(latents.float().numpy(), frames) != record.content:
            raise LongCatError(f"{folder} is damaged; delete it and run the same command again")
        # A copy: the file may be replaced while its tensors are in use.
        return Segment(frames, latents.clone(), record.content)

    def frames(self, number: int, skip: int = 0) -> np.ndarray:
        """The frames of the version in use, without the first `skip`: uint8 [F, H, W, 3]."""
        file = self.place(number) / FRAMES
        check_there(file)
        return read_video(file)[0][skip:]

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
        """Save a version of a segment, which is then the one in use; it is on disk when this returns.

        It replaces a version with the same settings, and stands beside all others. Raises LongCatError if it cannot be
        written; what was there then stays.
        """
        latents = latents.detach().to("cpu", torch.float32).contiguous()
        self.check_there()
        folder = self._place_for(number, settings, before)
        try:
            with atomic_folder(folder, OURS) as new:
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
            self.check_there()
            cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
            raise LongCatError(
                f"segment {number + 1} could not be written to {self.path} ({reason(cause)}); the earlier segments are "
                "kept, so free some space and run the same command again to resume"
            ) from error
        self._used[number] = folder
        return record

    def check_room(self, number: int, bytes_needed: int) -> None:
        """Raise LongCatError unless a segment of `bytes_needed` fits on the disk."""
        self.check_there()
        free = shutil.disk_usage(self.path).free
        if free < bytes_needed + SPARE_BYTES:
            needed, spare, there = (bytes_in_words(count) for count in (bytes_needed, SPARE_BYTES, free))
            raise LongCatError(
                f"segment {number + 1} may take {needed} and {spare} must stay free, but {self.path} has {there} free; "
                "the earlier segments are kept, so free some space and run the same command again to resume"
            )

    def check_there(self) -> None:
        """Raise LongCatError if the folder has disappeared while it is in use."""
        if not self.path.is_dir():
            raise LongCatError(
                f"{self.path} was deleted or renamed while this run was writing to it; run the same command again to "
                "begin there again, or put the folder back to resume"
            )

    @property
    def has_leftovers(self) -> bool:
        """Whether killed runs left something."""
        return any(map(LEFT.fullmatch, self._names()))

    def recover(self) -> None:
        """Remove what killed runs left; the take is locked. What is not ours stays."""
        for name in {match[1] for match in map(LEFT.fullmatch, self._names()) if match}:
            with suppress(OSError):
                recover(self.path / name, OURS)

    def _place_for(self, number: int, settings: Settings, before: str) -> Path:
        """The folder that a segment is written to: of a version with the same settings, or one where nothing stands."""
        for path, _ in self.matching(number, settings, before):
            if not path.is_symlink() and _is_free(path):
                return path
        version = max([version for version, _ in self.versions(number)], default=0) + 1
        while not _is_free(path := self.path / _name(number, version)):
            version += 1
        return path

    def _checksum(self, file: Path) -> str:
        """SHA-256 of a file; "" if it cannot be read. One that has not changed is not read again."""
        try:
            found = signature(file)
            if file not in self._checked or self._checked[file][0] != found:
                check_regular(file)
                with open(file, "rb") as stream:
                    self._checked[file] = found, hashlib.file_digest(stream, "sha256").hexdigest()
        except (LongCatError, OSError):
            return ""
        return self._checked[file][1]

    def _record(self, folder: Path) -> Record | None:
        """A segment's record; None if it is missing, damaged or of another version."""
        path = folder / RECORD
        try:
            found = signature(path)
        except OSError:
            return None
        if path not in self._read or self._read[path][0] != found:
            self._read[path] = found, _read_record(path, self.notes)
        return self._read[path][1]


def _read_record(path: Path, notes: type) -> Record | None:
    try:
        stored = parse_record(read_bytes(path), _Stored, str(path), "a record")
        record = stored.record
        parse_record(json.dumps(record.notes), notes, str(path), "a record")
    except (LongCatError, ValueError):
        return None
    whole = stored.version == VERSION and stored.checksum == checksum(_plain(asdict(record)))
    return record if whole else None


def signature(file: Path) -> Signature:
    """What tells whether a file is still the one that was checked. Raises OSError."""
    found = file.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def check_there(file: Path) -> None:
    """Raise LongCatError if a segment's file has disappeared."""
    if not file.is_file():
        raise LongCatError(f"{file} was deleted after this run had used it; run the same task again to make it again")


def read_frames(file: Path, skip: int, count: int, found: Signature) -> Iterator[np.ndarray]:
    """The frames of a segment from `skip` on, `count` in all, one at a time: uint8 [H, W, 3].

    found: the file's signature when it was checked. Raises LongCatError if it has changed or disappeared since.
    """
    check_there(file)
    if signature(file) != found:
        raise LongCatError(f"{file} was changed after this run had used it; run the same task again")
    with open_video(file) as video:
        yield from islice(video, skip, skip + count)


def _name(number: int, version: int = 1) -> str:
    return f"segment-{number + 1:03}" + (f"-v{version}" if version > 1 else "")


def _is_free(folder: Path) -> bool:
    """Whether a segment may be written to `folder`: it and what writing it takes hold nothing that is not ours."""
    return not any(foreign(place, OURS) for place in (folder, *working_folders(folder)))


def _plain(content: Settings) -> str:
    return json.dumps(content, sort_keys=True, ensure_ascii=True)


def _dumps(record: Record) -> str:
    content = asdict(record)
    return json.dumps({"version": VERSION, "checksum": checksum(_plain(content)), **content}, indent=1) + "\n"
