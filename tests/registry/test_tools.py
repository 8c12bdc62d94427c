"""Tools on the package: comfy-cli validates and packs it, comfy-test reads its sources, comfy-import-guard binds what
they take from ComfyUI to a checkout."""

from __future__ import annotations

import json
import os
import subprocess
import warnings
import zipfile
from pathlib import Path

import pytest

from ..nodes.checkout import Checkout
from .packing import copy, packed, tool, tracked


def run(folder: Path, home: Path, name: str, *arguments: str, rc: int = 0) -> subprocess.CompletedProcess[str]:
    """A run of a tool in this folder that ends with `rc`; the test skips where the tool is not installed."""
    command = tool(name)
    if command is None:
        pytest.skip("make test-registry installs the tools")
    # They keep settings in the home directory, and would ask about sending statistics.
    environment = {**os.environ, "HOME": str(home), "DO_NOT_TRACK": "1", "NO_COLOR": "1", "COLUMNS": "200"}
    done = subprocess.run([command, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == rc, done.stdout + done.stderr
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


def test_every_name_and_call_of_comfyui_exists_in_the_checkout(tmp_path):
    try:
        checkout = Checkout.find()
        if not (checkout.path / ".git").exists():
            raise FileNotFoundError(f"{checkout.path} is not a git checkout")
    except FileNotFoundError as error:
        warnings.warn(f"ComfyUI's names are not checked by comfy-import-guard: {error}", stacklevel=1)
        pytest.skip(str(error))
    # Where it looks for a clone of ComfyUI; offline it makes none.
    (tmp_path / "ComfyUI").symlink_to(checkout.path, target_is_directory=True)
    pack = copy(packed(), tmp_path / "custom_nodes" / "longcat-video")
    options = ("--offline", "--json", "--cache-dir", str(tmp_path), "check", "--strict", "--target", "HEAD")

    def check(rc: int = 0) -> dict:
        guard = run(tmp_path, tmp_path, "comfy-import-guard", *options, "--comfy-dir", str(pack.parent), rc=rc)
        (found,) = json.loads(guard.stdout)["packs"]
        return found

    found = check()
    assert found["verdict"] == "SAFE" and found["references"] > 100
    (pack / "nodes" / "broken.py").write_text("from comfy.utils import no_such_name\n", encoding="utf-8")
    assert "no_such_name" in json.dumps(check(rc=1))
