"""Many videos of one run, a file each, and the record by which the same run resumes.

    cat-001.mp4, cat-002.mp4 ...   a video for each prompt
    cat-run.json                   settings, prompts, and the checksums of finished videos

A video has the run's seed; where its prompt stands for the second time, the next one, and so on. So it does not depend
on other prompts, and each can be made on its own.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..errors import LongCatError
from ..files.atomic import atomic_path, name_with, reason
from ..files.differences import as_read, differences_in_words
from ..files.records import read_record
from ..files.regular import check_regular
from .long_video import LongVideoRequest
from .options import MAX_SEED
from .request import FilledRequest
from .takes import Settings, matches, nearest

VERSION = 1


@dataclass(frozen=True)
class _Record:
    """settings: what decides all videos, and their rate. prompts: in order. finished: SHA-256 of files by name."""

    version: int
    settings: Settings
    prompts: list[str]
    finished: dict[str, str]


def requests_of(first: FilledRequest, prompts: Sequence[str]) -> list[FilledRequest]:
    """The requests of all videos, with their seeds; `first` has everything else."""
    before: Counter[str] = Counter()
    requests = []
    for prompt in prompts:
        requests.append(replace(first, prompt=prompt, seed=(first.seed + before[prompt]) % (MAX_SEED + 1)))
        before[prompt] += 1
    return requests


def settings_of(first: FilledRequest, model: Settings, lossy: dict[str, str]) -> Settings:
    """What decides the files of a run, beside its prompts. model, lossy: see `LongVideoRequest`."""
    settings = LongVideoRequest(first, (first.prompt,), model=model, lossy=lossy).settings(0)
    del settings["prompt"]
    return as_read(settings | {"fps": first.fps})


class Batch:
    """The videos of one run.

    name: cat.mp4 for cat-001.mp4 and so on; nobody else writes there meanwhile. settings: those of `settings_of`.
    """

    def __init__(self, name: Path, prompts: Sequence[str], settings: Settings) -> None:
        self.name, self.record = name, record_of(name)
        self.files = self._files(prompts)
        self._now = _Record(VERSION, settings, list(prompts), {})

    def check(self) -> list[int]:
        """The numbers, from 0, of the videos that are missing. Writes nothing.

        Raises LongCatError for files of another run, for files that are not of a run, and for a finished video that was
        changed.
        """
        there = self._read()
        for number, file in enumerate(self.files):
            # One without a checksum was finished when its run was killed.
            if os.path.lexists(file) and number >= len(there.prompts):
                raise LongCatError(f"{file} exists and is not of this run; name another output, or move it away")
            if os.path.lexists(file):
                check_regular(file)
            if file.exists() and there.finished.get(file.name) not in (None, _checksum(file)):
                raise LongCatError(
                    f"{file} was changed after it was made; rename it to keep it, or delete it to have it made again"
                )
        prompts = max(there.prompts, self._now.prompts, key=len)
        names = [file.name for file in self._files(prompts) if file.exists()]
        kept = {name: there.finished[name] for name in names if name in there.finished}
        self._now = replace(self._now, prompts=prompts, finished=kept)
        return [number for number, file in enumerate(self.files) if file.name not in kept]

    @property
    def finished(self) -> int:
        """How many videos are finished."""
        return sum(file.name in self._now.finished for file in self.files)

    def begin(self) -> None:
        """Write the record, before the first video. Raises LongCatError if that is not possible."""
        with atomic_path(self.record) as new:
            new.write_text(json.dumps(asdict(self._now), indent=1) + "\n", encoding="utf-8")

    def finish(self, number: int) -> None:
        """A video is there."""
        file = self.files[number]
        self._now.finished[file.name] = _checksum(file)
        self.begin()

    def end(self) -> None:
        """Delete the record if no video is there."""
        if not self._now.finished and not any(map(os.path.lexists, self.files)):
            self.record.unlink(missing_ok=True)

    def _read(self) -> _Record:
        """The record of an earlier run of these settings and prompts, or one without prompts."""
        nothing = _Record(VERSION, self._now.settings, [], {})
        if not os.path.lexists(self.record):
            return nothing
        remedy = "name another output"
        there = read_record(self.record, _Record, "the record of a run with many prompts", remedy)
        if there.version != VERSION:
            raise LongCatError(f"{self.record} is of another version of this program; {remedy}")
        # Runs whose names differ only in their endings share the record.
        files = self._files(there.prompts)
        stems = {file.stem for file in files}
        endings = {Path(name).suffix for name in there.finished if Path(name).stem in stems} | {self.name.suffix}
        if not any(os.path.lexists(file.with_suffix(ending)) for file in files for ending in endings):
            return nothing
        now = self._now
        others = sorted(endings - {self.name.suffix})
        said = f"its videos are {others[0]}, not {self.name.suffix}" if others else ""
        if not said and not matches(there.settings, now.settings, first=True):
            said = nearest([there.settings], now.settings)[1] or "other settings"
        for number, pair in enumerate(zip(there.prompts, now.prompts, strict=False), 1):
            if not said:
                old, new = ({f"prompt {number}": prompt} for prompt in pair)
                said = differences_in_words(old, new)
        if said:
            raise LongCatError(f"{self.record} is of another run ({said}); {remedy}")
        return there

    def _files(self, prompts: Sequence[str]) -> list[Path]:
        return [name_with(self.name, f"-{number:03}") for number in range(1, len(prompts) + 1)]


def record_of(name: Path) -> Path:
    """The record of a run whose videos have this name and their numbers."""
    return name_with(name, "-run", ".json")


def _checksum(file: Path) -> str:
    try:
        with open(file, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise LongCatError(f"{file} cannot be read ({reason(error)}); check its permissions") from error
