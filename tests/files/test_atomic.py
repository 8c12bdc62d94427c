"""Folders that are replaced whole, and locks; atomic files are tested with those who write them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from longcat_core.errors import LongCatError
from longcat_core.files.atomic import atomic_folder, atomic_path, name_with, recover, temporary_path
from longcat_core.files.claims import claimed
from longcat_core.files.locks import Busy, held


def contents(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


def put(folder: Path, text: str) -> None:
    with atomic_folder(folder, "ab") as new:
        (new / "a").write_text(text)


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    put(tmp_path / "x", "old")
    (tmp_path / "x" / "b").write_text("old")
    put(tmp_path / "x", "new")
    assert contents(tmp_path) == {"x/a": "new"} and os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("error", [OSError, LongCatError, KeyboardInterrupt])
def test_a_folder_that_fails_leaves_the_old_one(tmp_path: Path, error: type[BaseException]) -> None:
    put(tmp_path / "x", "old")
    with pytest.raises(error), atomic_folder(tmp_path / "x", "ab") as new:
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


@pytest.mark.parametrize("place", [".x.new", ".x.old"])
@pytest.mark.parametrize("name", ["diary.txt", "a/b.txt", ".hidden"])
def test_a_folder_that_is_not_ours_is_never_deleted(tmp_path: Path, place: str, name: str) -> None:
    put(tmp_path / "x", "old")
    theirs = tmp_path / place / name
    theirs.parent.mkdir(parents=True)
    theirs.write_text("precious")
    with pytest.raises(OSError, match="not from this program"):
        put(tmp_path / "x", "new")
    assert contents(tmp_path) == {"x/a": "old", f"{place}/{name}": "precious"}


@pytest.mark.parametrize("killed", ["after", "between"])
def test_what_a_killed_run_left_is_recovered(tmp_path: Path, killed: str) -> None:
    put(tmp_path / (".x.old" if killed == "between" else "x"), "old")
    put(tmp_path / ".x.new", "half")
    (tmp_path / ".x.new" / ".a.12345678").write_text("temporary")
    recover(tmp_path / "x", "ab")
    assert contents(tmp_path) == {"x/a": "old"} and os.listdir(tmp_path) == ["x"]


def write(path: Path, text: str = "new") -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text)


@pytest.mark.parametrize(
    "stem", ["a" * 251, "\U0001f600" * 62, "\u6f22" * 83, os.fsdecode(b"caf\xe9"), ".", "a.b.c", "-"]
)
def test_any_name_that_the_system_takes_is_written(tmp_path: Path, stem: str) -> None:
    with claimed(tmp_path / f"{stem}.mp4", "busy"):
        write(tmp_path / f"{stem}.mp4")
        write(tmp_path / f"{stem}.mp4", "again")
    assert os.listdir(tmp_path) == [f"{stem}.mp4"] and (tmp_path / f"{stem}.mp4").read_text() == "again"
    assert len(os.fsencode(name_with(tmp_path / f"{stem}.mp4", "-refined").name)) <= 255
    temporary_path(tmp_path / f"{stem}.mp4", ".mp4", "12345678").name.encode()


def test_a_link_is_written_through_in_the_form_of_its_own_ending(tmp_path: Path) -> None:
    (tmp_path / "link.webp").symlink_to("plain")
    with atomic_path(tmp_path / "link.webp") as temporary:
        assert temporary.suffix == ".webp"
        temporary.write_text("new")
    assert (tmp_path / "link.webp").is_symlink() and (tmp_path / "plain").read_text() == "new"


def test_a_file_that_cannot_be_replaced_costs_no_work(tmp_path: Path) -> None:
    said = r"o\.mp4 cannot be replaced .*complete and lies in .*o-2\.mp4$"
    with pytest.raises(LongCatError, match=said), atomic_path(tmp_path / "o.mp4") as temporary:
        temporary.write_text("work")
        (tmp_path / "o.mp4").mkdir()
    assert sorted(os.listdir(tmp_path)) == ["o-2.mp4", "o.mp4"] and (tmp_path / "o-2.mp4").read_text() == "work"


def test_a_name_is_held_by_one_and_frees_what_a_killed_run_left(tmp_path: Path) -> None:
    path = tmp_path / "o.mp4"
    for name in (".o.mp4", ".o.12345678.mp4", "o.tmp", ".other.12345678.mp4"):
        (tmp_path / name).write_text("theirs")
    theirs = sorted(os.listdir(tmp_path))
    with claimed(path, "busy; wait"):
        with atomic_path(path) as first, atomic_path(path, ".tmp") as second:
            left = [first.name, second.name]
            first.write_text("half")
            second.write_text("half")
        (tmp_path / "link.mp4").symlink_to("o.mp4")
        for same in (path, tmp_path / "link.mp4", tmp_path / "." / "o.mp4"):
            with pytest.raises(Busy, match=r"^busy; wait$"), claimed(same, "busy; wait"):
                pytest.fail("the name was held twice")
    for name in left:
        (tmp_path / name).write_text("of a killed run")
    with claimed(path, "busy; wait"):
        assert not {*left} & {*os.listdir(tmp_path)}
    assert sorted(os.listdir(tmp_path)) == sorted([*theirs, "link.mp4", "o.mp4"])


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with held(lock, "busy; wait"), pytest.raises(LongCatError, match=r"^busy; wait$"), held(lock, "busy; wait"):
        pytest.fail("the lock was taken twice")
    with held(lock, "busy; wait"):
        assert lock.exists()
    assert not lock.exists()
    (tmp_path / "file").touch()
    with pytest.raises(OSError), held(tmp_path / "file" / "lock", "busy; wait"):
        pytest.fail("a lock was made in a file")
