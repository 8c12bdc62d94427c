"""`--again`: what was right is kept with its commit and date, and only the rest runs."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from . import again, report, suites
from .test_report import ABOUT, ran, row
from .test_suites import given as given

BEFORE = ABOUT | {"commit": "abc1234", "date": "2026-11-27", "identity": "before", "planned": {"pairs": 2, "stock": 1}}
NOW = ABOUT | {"commit": "def5678", "date": "2026-11-28", "identity": "now"}
OLD = "abc1234, 2026-11-27"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a run of another commit left: a wrong row, one of a tree before it, and a failed test."""
    folder = tmp_path / "output"
    folder.mkdir()
    (folder / report.ABOUT).write_text(json.dumps(BEFORE))
    rows = [row("a", identity="before"), row("b", "wrong", identity="before"), row("c", identity="older")]
    (folder / report.ROWS).write_text("".join(json.dumps(each) + "\n" for each in rows))
    for part, failures in (("tests", [["test_x", "no"]]), ("nodes", [])):
        (folder / f"{part}.json").write_text(json.dumps(ran(part, failures) | {"identity": "before"}))
    (folder / report.SPEED).write_text(
        json.dumps({"identity": "before", "of": 1, "rows": [{"name": "A, B", "text": "equal"}]})
    )
    return folder


def test_what_was_right_stays_with_its_commit(folder):
    machine = dict(NOW)
    again.adopt(folder, machine)
    assert machine["planned"] == BEFORE["planned"]
    assert {name: kept["run"] for name, kept in report.read_rows(folder, "now").items()} == {"a": OLD, "b": OLD}
    assert [file["run"] for file in again.kept(folder, "nodes")] == [OLD] and again.kept(folder, "tests") == []
    with (folder / report.ROWS).open("a") as file:
        file.writelines(json.dumps(row(name, identity="now")) + "\n" for name in ("b", "c"))
    (folder / "tests.json").write_text(json.dumps(ran("tests") | {"identity": "now"}))
    (folder / report.ABOUT).write_text(json.dumps(machine))
    made = report.write(folder)
    said = "Results of several runs: 1 file of tests, 2 rows again at def5678, 2026-11-28; 1 file of tests, 1 row, "
    said += f"1 figure of speed at {OLD}."
    assert said in report.page(made) and said in report.comfyui(f"{report.START}{report.END}", made)
    assert [each.get("run") for each in made["rows"]] == [OLD, None, None] and report.good(made, report.PARTS, False)


def test_results_keep_the_commit_that_they_had_first(folder):
    again.adopt(folder, dict(NOW))
    again.adopt(folder, NOW | {"commit": "fff", "identity": "later"})
    assert {kept["run"] for kept in report.read_rows(folder, "later").values()} == {OLD}


def test_the_same_commit_and_day_are_one_run(folder):
    again.adopt(folder, dict(BEFORE))
    assert report.runs(report.gather(folder)) == ""


@pytest.mark.parametrize("name", ["gpu", "torch"])
def test_another_machine_or_version_is_refused(folder, name):
    before = (folder / report.ROWS).read_bytes()
    with pytest.raises(SystemExit, match=f"has {name} .* instead of other; leave out --again"):
        again.adopt(folder, NOW | {name: "other"})
    assert (folder / report.ROWS).read_bytes() == before
    with pytest.raises(SystemExit, match="holds no earlier run"):
        again.adopt(folder / "empty", dict(NOW))


def test_only_files_with_a_failure_or_without_a_result_run(given, capsys):
    (given / "test_dead.py").unlink()
    suites.main(suites.TESTS, "cpu", 2, time.monotonic() + 60, given, "before")
    (given / "test_bad.py").write_text("def test_c(): pass\n")
    (given / "test_new.py").write_text("def test_d(): pass\n")
    (given / "test_good.py").write_text("def test_a(): assert False, 'runs again'\n")
    kept = [*again.kept(given, suites.TESTS), {"file": "test_gone.py", "failures": []}]
    capsys.readouterr()
    assert suites.main(suites.TESTS, "cpu", 2, time.monotonic() + 60, given, "now", kept)
    assert "tests: 2 passed, 0 skipped, 0 failed in 2 of 2 files" in capsys.readouterr().out
    found = json.loads((given / "tests.json").read_text())
    assert [file["file"] for file in found["files"]] == ["test_bad.py", "test_good.py", "test_new.py"]
    assert found["of"] == 3 and found["identity"] == "now"
