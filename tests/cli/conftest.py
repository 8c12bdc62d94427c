"""What tests of commands share: a folder in which no model may be loaded, and commands that fail there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longcat_core.cli import main as cli
from longcat_core.cli import models as commands

from ..support.folders import state


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder; loading a model fails the test."""

    def load(*_: Any, **__: Any) -> None:
        pytest.fail("a model was loaded before the input was checked")

    monkeypatch.setattr(commands, "load_pipeline", load)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must print one sentence and leave every file as it was; returns the sentence."""

    def files() -> dict[str, Any]:
        # Without the folder itself: a trial write changes its time.
        return {name: found for name, found in state(folder).items() if name != str(folder)}

    def run(*arguments: str) -> str:
        capsys.readouterr()
        before = files()
        assert cli.main(list(arguments)) == cli.BAD_INPUT
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("longcat: error: ") and err.count("\n") == 1 and err.endswith("\n"), err
        assert files() == before
        return err

    return run
