"""`longcat bench run`: whole runs by stages, in a table, a picture and a file."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from longcat_core.benchmark import bench
from longcat_core.benchmark.parts import run
from longcat_core.cli import main as cli
from longcat_core.cli import models, timed
from longcat_core.generate.paths import ModelPaths
from longcat_core.generate.progress import DECODING, FIRST_STEP, LOADING, LOADING_TEXT, SAVING, STARTING, STEPS
from longcat_core.measure.results import read

SMALL = ["--size", "32x48", "--frames", "5", "--steps", "2", "--device", "cpu"]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder; processes that are started run in this one."""

    def started(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        if command[1:] == ["-m", "longcat_core", "--help"]:
            return subprocess.CompletedProcess(command, 0, "", "")
        assert command[1:3] == ["-m", timed.__name__]
        with monkeypatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", env["XDG_CACHE_HOME"])
            code = timed.run(json.loads(Path(command[3]).read_text(encoding="utf-8")))
        return subprocess.CompletedProcess(command, code, "", "")

    monkeypatch.setattr(models, "load_pipeline", models.load_pipeline)
    monkeypatch.setattr(run, "start", started)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_runs_are_in_a_table_a_picture_a_file_and_on_the_page(here: Path, capsys: Any) -> None:
    assert cli.main(["bench", "run", *SMALL, "--output", "found"]) == 0
    assert sorted(path.name for path in (here / "found").iterdir()) == ["run.json", "run.png"]
    assert not (here / "own").exists(), "the user's encodings are left alone"
    found = read(here / "found" / "run.json")
    assert [row["name"] for row in found["rows"]] == [run.COLD, run.WARM, run.KERNELS, run.KEPT, run.HELP]
    *runs, started = found["rows"]
    cold, warm, kernels, kept = runs
    assert LOADING_TEXT in {stage["name"] for stage in kernels["stages"]}, "its prompt is new"
    assert LOADING_TEXT not in {stage["name"] for stage in kept["stages"]}
    assert len(started["times_s"]) == run.STARTS and min(started["times_s"]) <= started["help_s"]
    assert (found["inputs"]["model"], found["inputs"]["size"], found["inputs"]["steps"]) == ("nano", "32x48x5", 2)
    names = [stage["name"] for stage in cold["stages"]]
    assert names[0] == STARTING and {LOADING, FIRST_STEP, STEPS, DECODING, SAVING, run.ENDING} <= set(names)
    assert run.ENDING not in {stage["name"] for stage in warm["stages"]}, "one process, one end"
    for row in runs:
        assert sum(stage["s"] for stage in row["stages"]) == pytest.approx(row["wall_s"])
        assert 0 < row["first_frames_s"] <= row["wall_s"] and row["steps"] == 2
    assert "the system's cache held" in cold["notes"][0] and warm["notes"] == [] != kept["notes"]
    assert "less sampling" in capsys.readouterr().out
    assert cli.main(["bench", "report", "found", "--output", "page.md"]) == 0
    page = (here / "page.md").read_text(encoding="utf-8")
    assert "## From Enter to mp4" in page and "page-run.png" in page and (here / "page-run.png").exists()


def test_the_sentence_of_a_run_that_fails_is_that_of_the_command(here: Path, capsys: Any, monkeypatch: Any) -> None:
    def started(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 2, "", "longcat: note: a\nlongcat: error: no such LoRA\n")

    monkeypatch.setattr(run, "start", started)
    assert cli.main(["bench", "run", *SMALL, "--output", "found"]) == cli.BAD_INPUT
    assert capsys.readouterr().err == "longcat: error: no such LoRA\n"
    assert cli.main(["bench", "run", "--runs", "0"]) == cli.BAD_INPUT


def test_what_is_to_be_reached_is_said_where_it_is_known() -> None:
    stages = [{"name": LOADING, "s": 9.0}, {"name": FIRST_STEP, "s": 3.0}, {"name": DECODING, "s": 2.0}]
    row = {"name": "cold", "status": "ok", "wall_s": 14.0, "stages": stages, "beside": [], "first_frames_s": 0.2}
    row |= {"sampling_s": 3.0, "less_sampling_s": 11.0}
    inputs = {"size": run.AIMED, "fp8": True, "steps": 16}
    results = {"kind": "run", "inputs": inputs, "machine": {"gpu": "H100"}, "rows": [row]}
    said = (
        "cold: less sampling 11.00 s (<= 12 s: met), decoding 2.00 s (<= 1.6 s: missed), first frames 0.20 s (<= 0.3 s:"
        " met)."
    )
    table = bench.part("run").table
    assert table(results, None).endswith(said)
    assert said not in table(results | {"machine": {"gpu": None}}, None)


def test_starts_have_bounds_of_their_own() -> None:
    stages = [{"name": run.PACK_START, "s": 0.4}]
    rows = [{"name": run.HELP, "phase": "preparation", "status": "ok", "help_s": 0.13}]
    rows += [{"name": run.IN_COMFYUI[0], "status": "ok", "stages": stages, "beside": [], "wall_s": 0.4}]
    results = {"kind": "run", "inputs": {}, "machine": {"gpu": "H100"}, "rows": rows}
    table = bench.part("run").table(results, None)
    assert "longcat --help: 0.13 s (<= 0.2 s: met).\n\nstarting: this pack: 0.40 s (<= 0.3 s: missed)." in table


def test_runs_within_less_memory_are_rows_of_few_steps(monkeypatch: Any, tmp_path: Path) -> None:
    seen: list[list[str]] = []
    kept: set[tuple[Path, Path]] = set()

    def process(
        words: list[str], prompts: list[str], place: Path, cache: Path, kernels: Path
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        seen.append(words)
        kept.add((cache, kernels))
        return [{"wall_s": 1.0}] * len(prompts), {"steps": 16}

    monkeypatch.setattr(run, "_process", process)
    monkeypatch.setattr(run, "_help_seconds", lambda: 0.1)
    rows: list[dict[str, Any]] = []
    run.measure(["--fp8"], ModelPaths(), tmp_path, 1, False, lambda row, inputs: rows.append(row), [24.0, 12.0])
    names = [run.COLD, run.WARM, run.KERNELS, "cold, 24 GiB, 4 steps", "cold, 12 GiB, 4 steps", run.HELP]
    assert [row["name"] for row in rows] == names
    assert len({cache for cache, _ in kept}) == 3 and len({kernels for _, kernels in kept}) == 1
    assert seen[2:] == [["--fp8", "--memory", gib, "--steps", "4"] for gib in ("24", "12")]


def test_less_memory_needs_a_gpu(here: Path, capsys: Any) -> None:
    assert cli.main(["bench", "run", *SMALL, "--cards", "24", "12", "--output", "found"]) == cli.BAD_INPUT
    assert "limits a GPU's memory" in capsys.readouterr().err and not (here / "found").exists()


def test_a_file_that_was_just_written_is_in_memory(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(1 << 20))
    assert run.cached_share([tmp_path / "a"]) in (1.0, None) and run.cached_share([]) is None
