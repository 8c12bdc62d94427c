"""`longcat bench avatar_run`: whole runs of an avatar, and the video that is calculated from them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longcat_core.benchmark.parts import avatar_run, run
from longcat_core.cli import main as cli
from longcat_core.files.media import write_video
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


def test_a_video_is_calculated_from_two_runs(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sound(4.2)
    called: list[list[str]] = []
    caches = set()

    def started(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        assert command[1:4] == ["-m", "longcat_core", "avatar"]
        called.append(command[3:])
        caches.update((env["XDG_CACHE_HOME"], env["TRITON_CACHE_DIR"]))
        code = cli.main(command[3:])
        assert Path(command[-1]).exists()
        return subprocess.CompletedProcess(command, code, "", "")

    monkeypatch.setattr(run, "start", started)
    assert cli.main(["bench", "avatar_run", "--output", "found", "--", *WORDS]) == 0
    assert [words[words.index("--segments") + 1] for words in called] == ["1", "3"] and len(caches) == 4
    found = read(here / "found" / "avatar_run.json")
    (row,) = found["rows"]
    # 25 frames, and 20 more of each further segment, at 25 a second.
    assert (row["segments"], row["several"], row["name"]) == (5, 3, "4 s of speech")
    assert row["several_s"] == pytest.approx(row["first_s"] + 2 * row["segment_s"])
    assert row["wall_s"] == pytest.approx(row["first_s"] + 4 * row["segment_s"])
    assert (found["inputs"]["model"], found["inputs"]["size"]) == ("nano", "64x96x25")
    assert sorted(path.name for path in (here / "found").iterdir()) == ["avatar_run.json"]
    assert cli.main(["bench", "report", "found", "--output", "page.md"]) == 0
    page = (here / "page.md").read_text(encoding="utf-8")
    assert "## A minute of speech" in page and "+ 4 x" in page and "<=" not in page


def test_a_minute_has_a_target(here: Path) -> None:
    row = {"name": "60 s of speech", "status": "ok", "seconds": 60.2, "segments": 19, "several": 3}
    row |= {"first_s": 42.0, "several_s": 82.0, "segment_s": 20.0, "wall_s": 402.0}
    inputs = {"size": avatar_run.AIMED, "steps": 8, "fp8": True}
    results: dict[str, Any] = {"machine": {"gpu": "one"}, "inputs": inputs, "rows": [row]}
    assert "42.0 + 18 x 20.0 = 402" in avatar_run.table(results)
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
    assert "speech.mkv takes one segment, and two at least are timed; give a longer sound" in capsys.readouterr().err
    sound(4.2)
    assert cli.main(["bench", "avatar_run", "--output", "found", "--", *WORDS]) == cli.BAD_INPUT
    assert capsys.readouterr().err == "longcat: error: the disk is full\n"
    assert not list((here / "found").iterdir())
