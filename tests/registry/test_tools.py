"""The registry's own tools on the package: comfy-cli validates and packs it, comfy-test reads its sources."""

from __future__ import annotations

import json
import os
import subprocess
import zipfile
from pathlib import Path

import pytest

from .packing import copy, packed, tool, tracked


def run(folder: Path, home: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A run of a tool in this folder; the test skips where it is not installed."""
    command = tool(name)
    if command is None:
        pytest.skip("make test-registry installs the tools")
    # They keep settings in the home directory, and would ask about sending statistics.
    environment = {**os.environ, "HOME": str(home), "DO_NOT_TRACK": "1", "NO_COLOR": "1", "COLUMNS": "200"}
    done = subprocess.run([command, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A repository of the tracked files as they stand."""
    folder = copy(tracked(), tmp_path_factory.mktemp("repository"))
    for words in (("init", "-q"), ("add", "--all", "--force")):
        subprocess.run(["git", *words], cwd=folder, check=True)
    return folder


def test_comfy_validates_the_repository_and_packs_the_same_files(repository, tmp_path):
    quiet = ("--skip-prompt", "--no-enable-telemetry", "node")
    said = run(repository, tmp_path, "comfy", *quiet, "validate")
    # Its findings are printed; the exit code is 0 all the same.
    assert "All validation checks passed" in said.stdout + said.stderr and "arning" not in said.stdout, said
    run(repository, tmp_path, "comfy", *quiet, "pack")
    with zipfile.ZipFile(repository / "node.zip") as file:
        assert sorted(file.namelist()) == packed()


def test_comfy_test_finds_nothing(tmp_path):
    folder = copy(packed(), tmp_path / "longcat-video")
    found = json.loads(run(folder, tmp_path, "comfy-test", "lint", "--strict", "--json").stdout)
    assert found["passed"] and found["checks"] == ["syntax", "javascript"]
