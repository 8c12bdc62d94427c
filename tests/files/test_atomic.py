"""Folders that are replaced whole, and locks; atomic files are tested with those who write them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from longcat_core.errors import LongCatError
from longcat_core.files.atomic import atomic_folder, leftovers
from longcat_core.files.locks import held


def contents(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


def put(folder: Path, text: str) -> None:
    with atomic_folder(folder) as new:
        (new / "a").write_text(text)


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    put(tmp_path / "x", "old")
    (tmp_path / "x" / "b").write_text("old")
    put(tmp_path / "x", "new")
    assert contents(tmp_path) == {"x/a": "new"} and os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("error", [OSError, LongCatError, KeyboardInterrupt])
def test_a_folder_that_fails_leaves_the_old_one(tmp_path: Path, error: type[BaseException]) -> None:
    put(tmp_path / "x", "old")
    with pytest.raises(error), atomic_folder(tmp_path / "x") as new:
        (new / "a").write_text("half")
        raise error
    assert contents(tmp_path) == {"x/a": "old"} and os.listdir(tmp_path) == ["x"]


def test_a_failed_second_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "x", "old")
    rename = os.rename

    def refusing(source: Any, target: Any) -> None:
        if Path(source).suffix == ".new":
            raise PermissionError(13, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refusing)
    with pytest.raises(PermissionError):
        put(tmp_path / "x", "new")
    assert contents(tmp_path) == {"x/a": "old"} and os.listdir(tmp_path) == ["x"]


def test_leftovers_are_those_of_the_name(tmp_path: Path) -> None:
    for name in (".x-1.new", ".x-2.old", ".y-1.new", "x-1", ".x-1.tmp"):
        (tmp_path / name).mkdir()
    assert sorted(path.name for path in leftovers(tmp_path, "x-*")) == [".x-1.new", ".x-2.old"]


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with held(lock, "busy; wait"), pytest.raises(LongCatError, match=r"^busy; wait$"), held(lock, "busy; wait"):
        pytest.fail("the lock was taken twice")
    with held(lock, "busy; wait", remove=True):
        assert lock.exists()
    assert not lock.exists()
    (tmp_path / "file").touch()
    with pytest.raises(OSError), held(tmp_path / "file" / "lock", "busy; wait"):
        pytest.fail("a lock was made in a file")
