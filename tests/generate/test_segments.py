"""The folder of segments: exact, damage is seen, other people's files are safe, a full disk costs one segment."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from longcat_core.errors import LongCatError
from longcat_core.generate import segments
from longcat_core.generate.segments import FRAMES, LATENTS, RECORD, SPARE_BYTES, Record, SegmentFolder, checksum

from ..support.folders import state

SETTINGS = {"prompt": "ein Kreis, größer", "seed": 3, "scale": 4.5, "lora": None, "chunk": (4, 4, 4), "fp8": False}
FILES = (LATENTS, FRAMES, RECORD)


def made(seed: int) -> tuple[np.ndarray, Tensor]:
    """Frames that no lossy format keeps, and latents."""
    frames = np.random.default_rng(seed).integers(0, 256, (5, 16, 32, 3), dtype=np.uint8)
    return frames, torch.randn(1, 16, 2, 2, 4, generator=torch.Generator().manual_seed(seed))


def save(folder: SegmentFolder, number: int, before: str = "", seed: int | None = None, **changes: Any) -> Record:
    frames, latents = made(number if seed is None else seed)
    notes = changes.pop("notes", {"join": [0.5, -1.25]})
    with folder.open():
        return folder.save(number, frames, latents, settings=SETTINGS | changes, before=before, fps=12, notes=notes)


@pytest.fixture
def folder(tmp_path: Path) -> SegmentFolder:
    return SegmentFolder(tmp_path / "video" / "segments", changing=("prompt",))


# --- kept exactly ----------------------------------------------------------------------------------------------------


def test_a_segment_comes_back_as_it_was(folder):
    record = save(folder, 0)
    frames, latents = made(0)
    again = SegmentFolder(folder.path)
    found = again.find(0, SETTINGS, "")
    assert found == Record(**(vars(record) | {"settings": SETTINGS | {"chunk": [4, 4, 4]}}))
    assert found.notes == {"join": [0.5, -1.25], "threads": torch.get_num_threads()}
    assert (found.count, found.before) == (5, "")
    loaded = again.load(0)
    assert np.array_equal(loaded.frames, frames) and torch.equal(loaded.latents, latents)
    assert loaded.content == record.content == checksum(latents.numpy(), frames)
    assert np.array_equal(again.frames(0, skip=3), frames[3:])
    again.check([SETTINGS])
    assert sorted(item.name for item in folder.path.iterdir()) == [".lock", "segment-001"]
    assert sorted(item.name for item in (folder.path / "segment-001").iterdir()) == sorted(FILES)


def test_latents_of_any_type_and_place_are_kept_in_full(folder):
    frames, latents = made(0)
    strided = latents.to(torch.float64).transpose(3, 4).contiguous().transpose(3, 4).requires_grad_()
    with folder.open():
        folder.save(0, frames, strided, settings=SETTINGS, before="", fps=12, notes={})
    kept = folder.load(0).latents
    assert kept.dtype == torch.float32 and torch.equal(kept, latents)


def test_a_segment_counts_only_after_the_one_it_was_made_from(folder):
    first, second = save(folder, 0), save(folder, 1, seed=8)
    third = save(folder, 2, before=second.content)
    assert folder.find(2, SETTINGS, second.content).content == third.content
    assert folder.find(2, SETTINGS, first.content) is None and folder.find(2, SETTINGS, "") is None
    assert folder.find(3, SETTINGS, third.content) is None


def test_loaded_latents_outlive_their_file(folder):
    save(folder, 0)
    latents = folder.load(0).latents
    (folder.path / "segment-001" / LATENTS).write_bytes(b"\xff" * 10_000)
    assert torch.equal(latents, made(0)[1])


def test_checksums_tell_parts_shapes_and_types_apart():
    rows = np.arange(6, dtype=np.int32)
    found = {
        checksum("ab", "c"),
        checksum("a", "bc"),
        checksum("abc"),
        checksum(rows),
        checksum(rows.reshape(2, 3)),
        checksum(rows.view(np.float32)),
        checksum(rows.reshape(2, 3).T),
    }
    assert len(found) == 7 and checksum("ä") == checksum("ä".encode())
    assert checksum(rows.reshape(2, 3).T) == checksum(np.ascontiguousarray(rows.reshape(2, 3).T))


# --- damage ----------------------------------------------------------------------------------------------------------


def flip(where: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(where * (len(content) - 1))] ^= 1
        path.write_bytes(content)

    return damage


DAMAGES = {
    "first byte": flip(0),
    "a byte in the middle": flip(0.5),
    "last byte": flip(1),
    # The last byte of the record is the end of its line.
    "two bytes short": lambda path: os.truncate(path, path.stat().st_size - 2),
    "empty": lambda path: os.truncate(path, 0),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "removed": Path.unlink,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_seen_and_repaired(folder, name, damage):
    record = save(folder, 0)
    whole = {file: (folder.path / "segment-001" / file).read_bytes() for file in FILES}
    DAMAGES[damage](folder.path / "segment-001" / name)
    assert folder.find(0, SETTINGS, "") is None
    folder.check([SETTINGS])
    assert save(folder, 0) == record
    assert folder.find(0, SETTINGS, "") is not None
    assert {file: (folder.path / "segment-001" / file).read_bytes() for file in FILES} == whole


def test_any_byte_of_the_record_counts(folder):
    save(folder, 0)
    path = folder.path / "segment-001" / RECORD
    whole = path.read_bytes()
    for place in range(len(whole)):
        for bit in (0x01, 0x80):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
            assert folder.find(0, SETTINGS, "") is None, f"byte {place} of {whole!r}"
    path.write_bytes(whole)
    assert folder.find(0, SETTINGS, "") is not None


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", "7", '{"version": 1}', "[" * 100, "\ufeff{}"])
def test_malformed_records_are_ignored(folder, text):
    save(folder, 0)
    (folder.path / "segment-001" / RECORD).write_text(text, encoding="utf-8")
    assert folder.find(0, SETTINGS, "") is None
    folder.check([SETTINGS])


# --- other settings, other files -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 4}, "seed 3 there, 4 now"),
        ({"scale": 4.0}, "scale 4.5 there, 4.0 now"),
        ({"lora": "abc"}, "lora none there, abc now"),
        ({"chunk": (4, 4, 8)}, "chunk [4, 4, 4] there, [4, 4, 8] now"),
        ({"size": 64}, "size none there, 64 now"),
        ({"seed": 5, "prompt": "other", "fp8": True}, "(seed 3 there, 5 now; fp8 False there, True now)"),
        (
            dict.fromkeys("abcdef", 1),
            "(a none there, 1 now; b none there, 1 now; c none there, 1 now; d none there, 1 now; 2 more)",
        ),
    ],
)
def test_other_settings_are_named_and_nothing_is_touched(folder, changes, said):
    save(folder, 0)
    save(folder, 1)
    (folder.path / ".lock").unlink()
    before = state(folder.path)
    with pytest.raises(LongCatError) as raised:
        folder.check([SETTINGS, SETTINGS | changes])
    sentence = str(raised.value)
    assert said in sentence and f"{folder.path} holds" in sentence and "another folder" in sentence
    assert "prompt" not in sentence
    assert state(folder.path) == before


def test_long_settings_error_shows_the_difference(folder):
    text = "blurry, " * 40
    save(folder, 0, negative=text + "gray" + text)
    with pytest.raises(LongCatError) as raised:
        folder.check([SETTINGS | {"negative": text + "grey" + text}])
    sentence = str(raised.value)
    assert "blurry, gray" in sentence and "blurry, grey" in sentence and len(sentence) < 500


def test_changing_settings_may_differ(folder):
    save(folder, 0)
    other = SETTINGS | {"prompt": "another"}
    folder.check([other])
    assert folder.find(0, other, "") is None and folder.find(0, SETTINGS, "") is not None


def test_only_wanted_segments_are_checked(folder):
    save(folder, 2, seed=9)
    folder.check([SETTINGS, SETTINGS])
    folder.check({2: SETTINGS})
    with pytest.raises(LongCatError, match=r"scale 4\.5 there, none now"):
        folder.check({2: {name: value for name, value in SETTINGS.items() if name != "scale"}})


def theirs(path: Path) -> None:
    path.mkdir()
    (path / "holiday.jpg").write_bytes(b"precious")


def among_ours(path: Path) -> None:
    save(SegmentFolder(path.parent), 0)
    (path / "notes.txt").write_text("precious")


def a_link(path: Path) -> None:
    theirs(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


FOREIGN = {
    "a folder": theirs,
    "a file among ours": among_ours,
    "a file": lambda path: path.write_bytes(b"precious"),
    "a link": a_link,
    "a dangling link": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files_are_rejected_and_kept(folder, name):
    folder.path.mkdir(parents=True)
    FOREIGN[name](folder.path / "segment-001")
    before = state(folder.path)
    with pytest.raises(LongCatError, match=r"segment-001 is not a segment of a video .*; name another folder"):
        folder.check([SETTINGS])
    assert state(folder.path) == before


def test_a_file_in_place_of_the_folder_is_refused(folder):
    folder.path.parent.mkdir()
    folder.path.write_bytes(b"precious")
    with pytest.raises(LongCatError, match="segments is not a folder; name a folder"):
        folder.check([SETTINGS])
    with pytest.raises(LongCatError, match="cannot be written to"), folder.open():
        pytest.fail("opened")
    assert folder.path.read_bytes() == b"precious"


def test_a_folder_that_is_not_there_is_not_made_by_checking(folder):
    folder.check([SETTINGS])
    assert folder.find(0, SETTINGS, "") is None and not folder.path.parent.exists()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="this place is Linux's")
def test_an_unwritable_place(folder):
    (folder.path / ".lock").mkdir(parents=True)
    for place, why in (("/proc/segments", ".+"), (folder.path, "Is a directory")):
        said = rf"{place} cannot be written to \({why}\); name another folder"
        with pytest.raises(LongCatError, match=said), SegmentFolder(place).open():
            pytest.fail("opened")


def test_files_that_file_managers_leave_do_not_matter(folder):
    save(folder, 0)
    (folder.path / "segment-001" / ".DS_Store").write_bytes(b"seen")
    folder.check([SETTINGS])
    save(folder, 0)
    assert folder.find(0, SETTINGS, "") is not None


# --- one run at a time -----------------------------------------------------------------------------------------------


@contextmanager
def another_run(path: Path) -> Iterator[subprocess.Popen]:
    """A process that holds the folder until it is ended."""
    script = (
        "import sys\n"
        "from longcat_core.generate.segments import SegmentFolder\n"
        "with SegmentFolder(sys.argv[1]).open():\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", script, str(path)], stdin=pipe, stdout=pipe, text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_a_folder_is_held_by_one_process_until_it_ends(folder):
    record = save(folder, 0)
    with another_run(folder.path) as process:
        half = folder.path / ".segment-002.new"
        half.mkdir()
        with pytest.raises(
            LongCatError, match=r"another run is writing to .*; wait for its end or name another folder"
        ):
            save(folder, 1)
        assert half.is_dir(), "what the other run is writing stays"
        assert folder.find(0, SETTINGS, "").content == record.content, "reading needs no lock"
        process.send_signal(signal.SIGKILL)
        process.wait()
        save(folder, 1)
    assert not half.exists() and folder.find(1, SETTINGS, "") is not None


@pytest.mark.parametrize("left", [None, "notes.txt"])
def test_an_error_gives_the_folder_back_and_removes_one_that_stayed_empty(folder, left):
    with pytest.raises(KeyError), folder.open():
        if left is not None:
            (folder.path / left).touch()
        raise KeyError
    assert folder.path.exists() == (left is not None)
    save(folder, 0)
    assert folder.find(0, SETTINGS, "") is not None


@pytest.mark.parametrize("suffix", ["new", "old"])
def test_leftovers_are_removed(folder, suffix):
    save(folder, 0)
    leftover = folder.path / f".segment-001.{suffix}"
    shutil.copytree(folder.path / "segment-001", leftover)
    (folder.path / "notes.txt").touch()
    with folder.open():
        assert not leftover.exists()
    assert sorted(item.name for item in folder.path.iterdir()) == [".lock", "notes.txt", "segment-001"]
    assert folder.find(0, SETTINGS, "") is not None


# --- a full disk -----------------------------------------------------------------------------------------------------

REMEDY = "the earlier segments are kept, so free some space and run the same command again to resume"


def test_a_full_disk_is_reported_before_a_segment_is_begun(folder, monkeypatch):
    save(folder, 0)
    usage = shutil.disk_usage(folder.path)._replace(free=SPARE_BYTES + 5_000_000)
    monkeypatch.setattr(segments.shutil, "disk_usage", {folder.path: usage}.get)
    folder.check_room(1, 5_000_000)
    said = rf"segment 2 may take 5.0 MB and 16.8 MB must stay free, but .* has 21.8 MB free; {REMEDY}$"
    with pytest.raises(LongCatError, match=said):
        folder.check_room(1, 5_000_001)


@contextmanager
def largest_file(count: int) -> Iterator[None]:
    """The system writes no file beyond `count` bytes: writes fail as on a full disk, in any library."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_a_write_that_fails_leaves_what_was_there(folder, name, share):
    """At the first byte, in the middle, and at the last byte of each of the three files."""
    # Each file in turn is the largest.
    notes = {"long": "x" * 100_000} if name == RECORD else {}
    first = save(folder, 0)
    old = save(folder, 1, seed=5, before=first.content)
    with largest_file(10**6):
        save(folder, 2, before="trial", notes=notes)
    sizes = {file: (folder.path / "segment-003" / file).stat().st_size for file in FILES}
    shutil.rmtree(folder.path / "segment-003")
    limit = int((sizes[name] - 1) * share)
    before = {name: content for name, (_, content) in state(folder.path).items()}
    with pytest.raises(LongCatError) as raised, largest_file(limit):
        save(folder, 1, before=first.content, notes=notes)
    sentence = str(raised.value)
    assert sentence.startswith(f"segment 2 could not be written to {folder.path} (") and sentence.endswith(REMEDY)
    assert "File too large" in sentence and "choose another place" not in sentence
    assert {name: content for name, (_, content) in state(folder.path).items()} == before
    assert folder.find(1, SETTINGS, first.content).content == old.content
    new = save(folder, 1, before=first.content, notes=notes)
    assert folder.find(1, SETTINGS, first.content).content == new.content != old.content


def test_frames_that_cannot_be_written_say_why(folder):
    with folder.open(), pytest.raises(LongCatError, match="there are no frames"):
        folder.save(0, made(0)[0][:0], made(0)[1], settings=SETTINGS, before="", fps=12, notes={})
    assert not folder.path.exists()
