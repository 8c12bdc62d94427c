"""Files of tests in processes of their own: counts, failures, and what a process that dies leaves."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from . import suites

FILES = {
    "test_good.py": "import pytest\n\ndef test_a(): pass\n\n@pytest.mark.skip\ndef test_b(): pass\n",
    "test_bad.py": "def test_a(): pass\n\ndef test_c():\n    assert 1 == 2, 'one is not two'\n",
    "test_dead.py": "import os\n\ndef test_a(): os._exit(3)\n",
}


@pytest.fixture
def given(tmp_path, monkeypatch) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(suites, "PACK", tmp_path)
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    monkeypatch.setattr(suites, "files", lambda part: sorted(tmp_path.glob("test_*.py")))
    return tmp_path


def test_a_file_that_dies_takes_no_other_along(given, capsys):
    assert not suites.main(suites.TESTS, "cpu", 2, time.monotonic() + 60, given, "here")
    kept = json.loads((given / "tests.json").read_text())
    found = {file["file"]: (file["passed"], file["skipped"], len(file["failures"])) for file in kept["files"]}
    assert found == {"test_good.py": (1, 1, 0), "test_bad.py": (1, 0, 1), "test_dead.py": (0, 0, 1)}
    assert kept["of"] == 3 and kept["identity"] == "here"
    out = capsys.readouterr().out
    assert "FAILED test_c: AssertionError: one is not two" in out
    assert "tests: 2 passed, 1 skipped, 2 failed in 3 of 3 files" in out


def test_after_the_deadline_nothing_is_begun_and_that_is_not_good(given):
    (given / "test_bad.py").unlink()
    (given / "test_dead.py").unlink()
    assert not suites.main(suites.TESTS, "cpu", 1, time.monotonic(), given, "here")
    assert suites.main(suites.TESTS, "cpu", 1, time.monotonic() + 60, given, "here")


def test_every_file_of_tests_belongs_to_one_part():
    tests, nodes = (set(suites.files(part)) for part in (suites.TESTS, suites.NODES))
    assert tests and nodes and not tests & nodes
    folder = suites.PACK / "tests"
    left = {path.relative_to(folder).parts[0] for path in set(folder.rglob("test_*.py")) - tests - nodes}
    # Their own commands; and the file that runs those of `nodes`.
    assert left == {"comfyui", "registry", "nodes"}
