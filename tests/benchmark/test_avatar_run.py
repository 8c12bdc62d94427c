"""`longcat bench avatar_run`: a whole run of an avatar, and the video that is calculated from it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longcat_core.benchmark.parts import avatar_run, run
from longcat_core.cli import main as cli
from longcat_core.files.media import write_video
from longcat_core.generate.segments import RECORD
from longcat_core.measure.results import read

from ..support.sounds import sweep

SMALL = ["--size", "64x96", "--frames", "25", "--overlap", "5", "--device", "cpu", "--steps", "1", "--schedule", "base",
         "--guidance", "1", "--audio-guidance", "1", "--no-text-cache"]  # fmt: skip
WORDS = ["a red circle face talks on a blue background", "--audio", "speech.mkv", *SMALL]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sound(seconds: float) -> None:
    write_video("speech.mkv", np.zeros((1, 16, 16, 3), np.uint8), 1 / seconds, sweep(seconds, 1))


def test_a_video_is_calculated_from_three_segments(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sound(4.2)
    # As if saving ended at these seconds after the start.
    ends = {"segment-001": 10.0, "segment-002": 13.0, "segment-003": 17.0}
    called: list[list[str]] = []

    def started(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        assert command[1:4] == ["-m", "longcat_core", "avatar"]
        called.append(command[3:])
        assert all(Path(env[name]).is_relative_to(here) for name in ("XDG_CACHE_HOME", "TRITON_CACHE_DIR"))
        code = cli.main(command[3:])
        for path in Path(command[command.index("--folder") + 1]).rglob(RECORD):
            at = clock.first + ends.pop(path.parent.name)
            os.utime(path, (at, at))
        return subprocess.CompletedProcess(command, code, "", "")

    class Clock:
        """Of the part alone: at the start of the process, and 20 s later."""

        first = 1e9
        times = iter((first, first + 20.0))

        def time(self) -> float:
            return next(self.times)

    clock = Clock()
    monkeypatch.setattr(run, "start", started)
    monkeypatch.setattr(avatar_run, "time", clock)
    assert cli.main(["bench", "avatar_run", "--output", "found", "--", *WORDS]) == 0
    assert [words[words.index("--segments") + 1] for words in called] == ["3"] and not ends
    found = read(here / "found" / "avatar_run.json")
    (row,) = found["rows"]
    # 25 frames, and 20 more of each further segment, at 25 a second.
    assert (row["segments"], row["several"], row["name"]) == (5, 3, "4 s of speech")
    assert [row[name] for name in ("measured_s", "first_s", "segment_s", "file_s")] == [20.0, 10.0, 3.5, 3.0]
    assert row["wall_s"] == 10 + 4 * 3.5 + 3
    assert (found["inputs"]["model"], found["inputs"]["size"]) == ("nano", "64x96x25")
    assert sorted(path.name for path in (here / "found").iterdir()) == ["avatar_run.json"]
    assert cli.main(["bench", "report", "found", "--output", "page.md"]) == 0
    page = (here / "page.md").read_text(encoding="utf-8")
    assert "## A minute of speech" in page and "10.0 + 4 x 3.5 + 3.0 = 27" in page and "<=" not in page


def test_a_minute_has_a_target(here: Path) -> None:
    row = {"name": "60 s of speech", "status": "ok", "seconds": 60.2, "segments": 19, "several": 3}
    row |= {"measured_s": 66.0, "first_s": 23.0, "segment_s": 20.0, "file_s": 3.0, "wall_s": 402.0}
    inputs = {"size": avatar_run.AIMED, "steps": 8, "fp8": True}
    results: dict[str, Any] = {"machine": {"gpu": "one"}, "inputs": inputs, "rows": [row]}
    assert "402 s (<= 420 s: met)" in avatar_run.table(results)
    late = json.loads(json.dumps(results))
    late["rows"][0]["wall_s"] = 421
    assert "421 s (<= 420 s: missed)" in avatar_run.table(late)
    for other in ({"steps": 50}, {"fp8": False}, {"size": "64x96x25"}):
        assert "<=" not in avatar_run.table(results | {"inputs": inputs | other})


def test_what_cannot_be_timed_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def started(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 2, "", "longcat: note: a\nlongcat: error: the disk is full\n")

    monkeypatch.setattr(run, "start", started)
    sound(1.0)
    assert cli.main(["bench", "avatar_run", "--", *WORDS]) == cli.BAD_INPUT
    assert "speech.mkv takes one segment, and a second one is timed; give a longer sound" in capsys.readouterr().err
    sound(4.2)
    assert cli.main(["bench", "avatar_run", "--output", "found", "--", *WORDS]) == cli.BAD_INPUT
    assert capsys.readouterr().err == "longcat: error: the disk is full\n"
    assert not list((here / "found").iterdir())
