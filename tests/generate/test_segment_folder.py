"""The folder of takes: each is found by its settings, runs do not disturb each other, nothing finished is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from longcat_core.errors import LongCatError
from longcat_core.files.locks import Busy
from longcat_core.generate.segment_folder import LOCK, PICKING, TAKE, SegmentFolder
from longcat_core.generate.segments import FRAMES, LATENTS, RECORD, Segment, Take, _plain, checksum

from ..support.folders import contents, state

SETTINGS = {"prompt": "ein Kreis, größer", "seed": 3, "scale": 4.5, "lora": None, "chunk": (4, 4, 4)}


def of(prompts: str = "abc", **changes: Any) -> list[dict[str, Any]]:
    """Settings of a video: a segment for each letter."""
    return [SETTINGS | {"prompt": prompt} | changes for prompt in prompts]


def make(number: int, before: Segment | None, prompt: str) -> tuple[np.ndarray, Tensor, dict[str, Any]]:
    """Noise that depends on the prompt and the segment before, as the network's output does."""
    seed = ord(prompt[0]) + (0 if before is None else int(before.content[:8], 16))
    frames = np.random.default_rng(seed).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    return frames, torch.full((1, 16, 2, 2, 2), float(number)), {}


def unwanted(*_: Any) -> Any:
    raise AssertionError("a segment was made")


def fill(folder: SegmentFolder, settings: list[dict[str, Any]], making: Any = make) -> list[str]:
    """Where the segments lie after a run."""

    def made(number: int, before: Segment | None) -> Any:
        return making(number, before, settings[number]["prompt"])

    found = folder.fill(settings, made, fps=12, room=[1000] * len(settings))
    return [folder.place(number) for number, *_ in found]


@pytest.fixture
def folder(tmp_path: Path) -> SegmentFolder:
    return SegmentFolder(tmp_path / "video")


def names(*numbers: str, take: str = "") -> list[str]:
    return [f"{take}segment-{number}" for number in numbers]


# --- takes -----------------------------------------------------------------------------------------------------------


def test_takes_side_by_side_and_back(folder):
    assert fill(folder, of()) == names("001", "002", "003") and folder.said == ""
    first = contents(folder.path)
    assert sorted(os.listdir(folder.path)) == ["segment-001", "segment-002", "segment-003", TAKE]
    assert fill(folder, of(seed=4)) == names("001", "002", "003", take="take-002/")
    assert folder.said.endswith(f"because {folder.path} has other settings (seed 3 there, 4 now)")
    assert fill(folder, of("xbc")) == names("001", "002", "003", take="take-003/")
    assert contents(folder.path) == first
    for settings, take in ((of(), ""), (of(seed=4), "take-002/"), (of("xbc"), "take-003/")):
        fresh = SegmentFolder(folder.path)
        assert fill(fresh, settings, unwanted) == names("001", "002", "003", take=take)
        place = folder.path / take if take else folder.path
        assert fresh.take.path == place and fresh.said == f"this run uses the take in {place}, one of 3"


def test_the_nearest_take_is_named(folder):
    fill(folder, of("a", seed=4, scale=2))
    fill(folder, of("a", seed=5, scale=4))
    fill(folder, of("a", seed=6, scale=4))
    assert f"because {folder.path / 'take-002'} has other settings (seed 5 there, 6 now)" in folder.said


def test_prompts_edited_back_and_forth_and_added(folder):
    fill(folder, of("abc"))
    assert fill(folder, of("axc")) == names("001", "002-v2", "003-v2")
    assert fill(folder, of("abcd")) == names("001", "002", "003", "004")
    assert fill(folder, of("axcd")) == names("001", "002-v2", "003-v2", "004-v2")
    assert fill(folder, of("ax")) == names("001", "002-v2")
    for prompts, wanted in (("abcd", ("001", "002", "003", "004")), ("axcd", ("001", "002-v2", "003-v2", "004-v2"))):
        assert fill(SegmentFolder(folder.path), of(prompts), unwanted) == names(*wanted)
    shutil.rmtree(folder.path / "segment-002")
    # A gap stays; what was made from the same content is found again.
    assert fill(folder, of("abcd")) == names("001", "002-v3", "003", "004")


def test_an_old_folder_is_gone_on_with(folder):
    """Without take.json, with keys of the command line and of ComfyUI, and with the lock that stayed."""
    old = {"dtype": "float32", "fp8": False, "attention": "auto", "compile": "blocks", "device": "cpu"}
    fill(folder, of("abc", **old))
    (folder.path / TAKE).unlink()
    (folder.path / LOCK).touch()
    fresh = SegmentFolder(folder.path)
    assert fill(fresh, of("abc"), unwanted) == names("001", "002", "003") and fresh.said == ""
    assert not (folder.path / LOCK).exists()
    assert fill(fresh, of("abcd", attention="sdpa")) == names("001", "002", "003", "004")
    assert sorted(os.listdir(folder.path)) == names("001", "002", "003", "004")


def test_a_take_is_found_without_its_first_segment(folder):
    fill(folder, of("abc"))
    fill(folder, of("abc", seed=4))
    for lost in (folder.path, folder.path / "take-002"):
        shutil.rmtree(lost / "segment-001")
        (lost / TAKE).unlink()
    assert fill(folder, of("abc", seed=4)) == names("001", "002", "003", take="take-002/")
    assert fill(folder, of("abc")) == names("001", "002", "003")


def rewrite(file: Path, **changes: Any) -> None:
    """Change a record and its checksum with it."""
    content = json.loads(file.read_text())
    version, _ = content.pop("version"), content.pop("checksum")
    content |= {name: value for name, value in changes.items() if name != "version"}
    whole = {"version": changes.get("version", version), "checksum": checksum(_plain(content)), **content}
    file.write_text(json.dumps(whole))


def test_what_a_newer_version_made_is_left_alone(folder):
    fill(folder, of("ab"))
    for name in ("segment-001", "segment-002"):
        rewrite(folder.path / name / RECORD, version=2)
    rewrite(folder.path / TAKE, version=2)
    before = contents(folder.path)
    assert fill(folder, of("ab")) == names("001", "002", take="take-002/")
    assert contents(folder.path) == before


def test_a_take_without_segments_is_used_again(folder):
    fill(folder, of("a"))
    fill(folder, of("x"))
    shutil.rmtree(folder.path / "take-002" / "segment-001")
    assert fill(folder, of("y")) == names("001", take="take-002/")
    shutil.rmtree(folder.path / "segment-001")
    assert fill(folder, of("z")) == names("001")


@pytest.mark.parametrize("foreign", ["file", "folder", "link"])
def test_what_stands_where_a_take_would_is_worked_around(folder, foreign):
    fill(folder, of("a"))
    place = folder.path / "take-002"
    if foreign == "link":
        place.symlink_to("nowhere")
    else:
        place.touch() if foreign == "file" else (place.mkdir(), (place / TAKE).write_text("mine"))
    assert fill(folder, of("x")) == names("001", take="take-003/")
    assert os.path.lexists(place) and (foreign != "folder" or (place / TAKE).read_text() == "mine")


def test_a_take_that_was_moved_to_another_disk_and_linked(folder, tmp_path):
    fill(folder, of("a"))
    fill(folder, of("x"))
    shutil.move(folder.path / "take-002", tmp_path / "elsewhere")
    (folder.path / "take-002").symlink_to(tmp_path / "elsewhere")
    assert fill(SegmentFolder(folder.path), of("x"), unwanted) == names("001", take="take-002/")
    assert fill(folder, of("xy")) == names("001", "002", take="take-002/")
    assert (tmp_path / "elsewhere" / "segment-002" / FRAMES).is_file()


def test_many_segments(folder):
    def small(number: int, *_: Any) -> tuple[np.ndarray, Tensor, dict[str, Any]]:
        return np.full((1, 16, 16, 3), number % 256, np.uint8), torch.zeros(1, 16, 1, 2, 2), {}

    settings = [SETTINGS | {"seed": number} for number in range(150)]
    assert fill(folder, settings[:3], small)[-1] == "segment-003"
    # The rest is made by hand, which is faster.
    before = folder.take.load(2).content
    for number in range(3, 150):
        shutil.copytree(folder.path / "segment-003", folder.path / f"segment-{number + 1:03}")
        rewrite(folder.path / f"segment-{number + 1:03}" / RECORD, settings=SETTINGS | {"seed": number}, before=before)
    assert fill(SegmentFolder(folder.path), json.loads(json.dumps(settings)), unwanted)[-1] == "segment-150"
    assert folder.place(998) == "segment-999"


# --- foreign files ---------------------------------------------------------------------------------------------------


def theirs(path: Path) -> None:
    path.mkdir()
    (path / "holiday.jpg").write_bytes(b"precious")


def a_link(path: Path) -> None:
    theirs(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


FOREIGN = {
    "a folder": theirs,
    "a file": lambda path: path.write_bytes(b"precious"),
    "a link": a_link,
    "a dangling link": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("number", [1, 2])
def test_foreign_files_are_rejected_and_kept(folder, name, number):
    folder.path.mkdir(parents=True)
    FOREIGN[name](folder.path / f"segment-00{number}")
    before = state(folder.path)
    with pytest.raises(LongCatError, match=rf"segment-00{number} is not a segment of a video .*; name another folder"):
        fill(folder, of("ab"), unwanted)
    assert state(folder.path) == before
    if number == 1:
        with pytest.raises(LongCatError, match="segment-001 is not a segment of a video"):
            folder.check_place()


def test_a_file_in_place_of_the_folder_is_refused(folder):
    folder.path.write_bytes(b"precious")
    for wrong in (folder, SegmentFolder(folder.path / "inside")):
        with pytest.raises(LongCatError, match=r"video is not a folder"):
            fill(wrong, of(), unwanted)
    assert folder.path.read_bytes() == b"precious"


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_names_that_the_disk_does_not_take(tmp_path, name):
    with pytest.raises(LongCatError, match="name another folder"):
        SegmentFolder(tmp_path / name).check_place()


def test_checking_writes_nothing(folder):
    folder.check_place()
    folder.check(of())
    assert not folder.path.exists()


# --- one run at a time -----------------------------------------------------------------------------------------------

RUN = """
import sys
sys.path.insert(0, sys.argv[1])
from tests.generate.test_segment_folder import *

def slow(*args):
    print("making", flush=True)
    sys.stdin.readline()
    return make(*args)

fill(SegmentFolder(sys.argv[2]), of(sys.argv[3]), slow)
print("done", flush=True)
"""


@contextmanager
def another_run(path: Path, prompts: str) -> Iterator[subprocess.Popen]:
    """A process that makes a segment for each line that it reads."""
    command = [sys.executable, "-c", RUN, str(Path(__file__).parents[2]), str(path), prompts]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "making\n"
            yield process
        finally:
            process.kill()


def test_a_take_is_held_by_one_run_and_others_go_side_by_side(folder):
    with another_run(folder.path, "ab") as process:
        busy = rf"another run is writing to {folder.path}; wait for its end or name another folder"
        with pytest.raises(Busy, match=busy):
            fill(folder, of("ab"), unwanted)
        assert fill(folder, of("xy")) == names("001", "002", take="take-002/")
        process.stdin.write("\n\n")
        process.stdin.flush()
        assert process.stdout.readline() == "making\n" and process.stdout.readline() == "done\n"
    assert fill(folder, of("ab"), unwanted) == names("001", "002")
    assert not list(folder.path.rglob(".*")), "locks do not stay"


def test_a_killed_run_is_gone_on_with_in_its_take(folder):
    fill(folder, of("x"))
    with another_run(folder.path, "ab") as process:
        assert (folder.path / "take-002" / TAKE).is_file() and (folder.path / "take-002" / LOCK).is_file()
        (folder.path / "take-002" / ".segment-001.new").mkdir()
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert fill(folder, of("ab")) == names("001", "002", take="take-002/")
    assert sorted(os.listdir(folder.path / "take-002")) == [*names("001", "002"), TAKE]


@pytest.mark.parametrize("same", [True, False])
def test_runs_that_begin_in_the_same_moment(folder, same):
    places: dict[int, list[str]] = {}
    start, held = threading.Barrier(6), threading.Barrier(6)

    def run(number: int) -> None:
        start.wait()

        def making(*args: Any) -> Any:
            with suppress(threading.BrokenBarrierError):
                held.wait(20)
            return make(*args)

        try:
            places[number] = fill(SegmentFolder(folder.path), of("a" if same else "abcdef"[number]), making)
        except Busy:
            places[number] = []
            with suppress(threading.BrokenBarrierError):
                held.wait(20)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = sorted(place for place, *_ in filter(None, places.values()))
    assert found == names("001") if same else sorted([*names("001"), *(f"take-00{n}/segment-001" for n in range(2, 7))])
    assert not list(folder.path.rglob(".*"))


@pytest.mark.parametrize("left", [None, "notes.txt"])
def test_an_error_gives_everything_back(folder, left):
    def broken(*_: Any) -> Any:
        if left is not None:
            (folder.path / left).touch()
        raise KeyError

    with pytest.raises(KeyError):
        fill(folder, of(), broken)
    assert folder.path.exists() == (left is not None)
    assert fill(folder, of("x")) == names("001")
    with pytest.raises(KeyError):
        fill(folder, of("y"), broken)
    assert sorted(os.listdir(folder.path)) == [*filter(None, [left]), "segment-001", TAKE]


def test_a_lock_that_lasts_is_named(folder, monkeypatch):
    fill(folder, of("a"))
    monkeypatch.setattr("longcat_core.generate.segment_folder.PATIENCE", 0.1)
    from filelock import FileLock

    with FileLock(folder.path / PICKING):
        with pytest.raises(Busy, match="another run is picking its take in"):
            fill(folder, of("x"), unwanted)
        assert fill(folder, of("a"), unwanted) == names("001")


# --- where nothing can be written ------------------------------------------------------------------------------------


@contextmanager
def without_rights(*paths: Path) -> Iterator[None]:
    """Another user's process, for which these folders are read-only."""
    for path in paths:
        path.chmod(0o555)
    os.setegid(65534), os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0), os.setegid(0)
        for path in paths:
            path.chmod(0o755)


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """A place that every user may enter."""
    if not hasattr(os, "seteuid") or os.geteuid():
        pytest.skip("only root can become another user")
    modes = {path: path.stat().st_mode for path in tmp_path.parents if path != Path("/")}
    for path in (tmp_path, *modes):
        path.chmod(path.stat().st_mode | 0o055)
    yield tmp_path
    for path, mode in modes.items():
        path.chmod(mode)


def test_a_finished_take_is_read_where_nothing_can_be_written(shared):
    folder = SegmentFolder(shared / "video")
    fill(folder, of("ab"))
    fill(folder, of("xy"))
    before = contents(folder.path)
    with without_rights(*(path for path in (shared, *folder.path.rglob("*"), folder.path) if path.is_dir())):
        for prompts, take in (("ab", ""), ("xy", "take-002/")):
            fresh = SegmentFolder(folder.path)
            fresh.check_place()
            assert fill(fresh, of(prompts), unwanted) == names("001", "002", take=take)
            parts = [(0, 0), (1, 2)]
            assert len(list(fresh.footage(parts, 12).read())) == 8
        for prompts in ("abc", "z"):
            with pytest.raises(LongCatError, match=r"video cannot be written to \(Permission denied\); name another"):
                fill(SegmentFolder(folder.path), of(prompts), unwanted)
        with pytest.raises(LongCatError, match=r"new cannot be written to .*; name another folder"):
            SegmentFolder(shared / "new").check_place()
    assert contents(folder.path) == before


def test_damage_where_nothing_can_be_written(shared):
    folder = SegmentFolder(shared / "video")
    fill(folder, of("ab"))
    (folder.path / "segment-002" / LATENTS).write_bytes(b"damaged")
    said = r"video cannot be written to \(Permission denied\); name another"
    with without_rights(folder.path), pytest.raises(LongCatError, match=said):
        fill(SegmentFolder(folder.path), of("ab"), unwanted)
    assert fill(folder, of("ab")) == names("001", "002")


# --- frames from the disk --------------------------------------------------------------------------------------------


def test_footage_reads_what_this_run_used(folder):
    fill(folder, of("abc"))
    fill(folder, of("axc"))
    clips = [folder.frames(number) for number in range(3)]
    film = folder.footage([(0, 0), (1, 2), (2, 2)], 12)
    assert (film.frames, film.height, film.width, film.fps) == (11, 16, 16, 12)
    wanted = np.concatenate([clips[0], clips[1][2:], clips[2][2:]])
    fill(folder, of("abc"))
    for _ in range(2):
        assert np.array_equal(np.stack(list(film.read())), wanted)
    assert not np.array_equal(folder.frames(1), clips[1])
    (folder.path / "segment-002-v2" / FRAMES).touch()
    with pytest.raises(LongCatError, match="was changed after this run had used it; run the same task again"):
        list(film.read())
    shutil.rmtree(folder.path / "segment-002-v2")
    with pytest.raises(LongCatError, match="was deleted after this run had used it; run the same task again"):
        list(film.read())
    shutil.rmtree(folder.path / "segment-003")
    with pytest.raises(LongCatError, match="was deleted after this run had used it"):
        folder.footage([(2, 0)], 12)


def test_takes_that_are_known_by_their_segments_or_by_their_record(folder):
    fill(folder, of("a"))
    assert [take.path for take in folder.takes()] == [folder.path]
    rewrite(folder.path / TAKE, settings=SETTINGS | {"prompt": "of an older pack"})
    assert fill(SegmentFolder(folder.path), of("a"), unwanted) == names("001"), "segments count before the record"
    assert isinstance(folder.take, Take)
