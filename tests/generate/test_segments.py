"""Segments of a take: exact, damage is seen, nothing finished is replaced, a full disk costs one segment."""

from __future__ import annotations

import os
import resource
import shutil
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
from longcat_core.generate.segments import FRAMES, LATENTS, RECORD, SPARE_BYTES, Record, Take, checksum

from ..support.folders import state

SETTINGS = {"prompt": "ein Kreis, größer", "seed": 3, "scale": 4.5, "lora": None, "chunk": (4, 4, 4), "fp8": False}
FILES = (LATENTS, FRAMES, RECORD)


def made(seed: int) -> tuple[np.ndarray, Tensor]:
    """Frames that no lossy format keeps, and latents."""
    frames = np.random.default_rng(seed).integers(0, 256, (5, 16, 32, 3), dtype=np.uint8)
    return frames, torch.randn(1, 16, 2, 2, 4, generator=torch.Generator().manual_seed(seed))


def save(folder: Take, number: int, before: str = "", seed: int | None = None, **changes: Any) -> Record:
    frames, latents = made(number if seed is None else seed)
    notes = changes.pop("notes", {"join": [0.5, -1.25]})
    return folder.save(number, frames, latents, settings=SETTINGS | changes, before=before, fps=12, notes=notes)


@pytest.fixture
def folder(tmp_path: Path) -> Take:
    (tmp_path / "segments").mkdir()
    return Take(tmp_path / "segments")


# --- kept exactly ----------------------------------------------------------------------------------------------------


def test_a_segment_comes_back_as_it_was(folder):
    record = save(folder, 0)
    frames, latents = made(0)
    again = Take(folder.path)
    found = again.find(0, SETTINGS, "")
    assert found == Record(**(vars(record) | {"settings": SETTINGS | {"chunk": [4, 4, 4]}}))
    assert found.notes == {"join": [0.5, -1.25], "threads": torch.get_num_threads()}
    assert (found.count, found.before) == (5, "")
    loaded = again.load(0)
    assert np.array_equal(loaded.frames, frames) and torch.equal(loaded.latents, latents)
    assert loaded.content == record.content == checksum(latents.numpy(), frames)
    assert np.array_equal(again.frames(0, skip=3), frames[3:])
    assert [item.name for item in folder.path.iterdir()] == ["segment-001"]
    assert sorted(item.name for item in (folder.path / "segment-001").iterdir()) == sorted(FILES)


def test_latents_of_any_type_and_place_are_kept_in_full(folder):
    frames, latents = made(0)
    strided = latents.to(torch.float64).transpose(3, 4).contiguous().transpose(3, 4).requires_grad_()
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
    before = state(folder.path)
    again = Take(folder.path)
    assert again.find(0, SETTINGS, "") is None
    assert save(again, 0) == record
    assert Take(folder.path).find(0, SETTINGS, "") is not None
    # Where the record does not say whose files they are, they stay.
    place = "segment-001-v2" if name == RECORD else "segment-001"
    assert again.place(0).name == place and os.listdir(folder.path).count("segment-001-v2") == (name == RECORD)
    assert {file: (folder.path / place / file).read_bytes() for file in FILES} == whole
    if name == RECORD:
        assert {path: now for path, now in state(folder.path).items() if path in before} | before == {
            path: now for path, now in state(folder.path).items() if path in before
        } | {str(folder.path): before[str(folder.path)]}


def test_any_byte_of_the_record_counts(folder):
    save(folder, 0)
    path = folder.path / "segment-001" / RECORD
    whole = path.read_bytes()
    for place in range(len(whole)):
        for bit in (0x01, 0x80):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
            assert Take(folder.path).find(0, SETTINGS, "") is None, f"byte {place} of {whole!r}"
    path.write_bytes(whole)
    assert folder.find(0, SETTINGS, "") is not None


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", "7", '{"version": 1}', "[" * 100, "\ufeff{}"])
def test_malformed_records_are_ignored(folder, text):
    save(folder, 0)
    (folder.path / "segment-001" / RECORD).write_text(text, encoding="utf-8")
    assert folder.find(0, SETTINGS, "") is None and folder.records(0) == []


# --- versions --------------------------------------------------------------------------------------------------------


def test_versions_stand_beside_each_other_and_are_found_by_what_made_them(folder):
    first = save(folder, 0)
    wanted = [("a", first.content), ("b", first.content), ("a", "of another"), ("c", first.content)]
    records = [save(folder, 1, before, seed=n, prompt=prompt) for n, (prompt, before) in enumerate(wanted)]
    names = ["segment-002", "segment-002-v2", "segment-002-v3", "segment-002-v4"]
    assert [path.name for _, path in folder.versions(1)] == names
    fresh = Take(folder.path)
    for name, record, (prompt, before) in zip(names, records, wanted, strict=True):
        assert fresh.find(1, SETTINGS | {"prompt": prompt}, before).content == record.content
        assert fresh.place(1).name == name and np.array_equal(fresh.frames(1), folder.load(1).frames) == (
            name == names[3]
        )
    assert fresh.known([SETTINGS, SETTINGS | {"prompt": "b"}, SETTINGS]) == 2


def test_gaps_between_versions_stay(folder):
    for number, prompt in enumerate("abc"):
        save(folder, 0, seed=number, prompt=prompt)
    for name in ("segment-001", "segment-001-v2"):
        shutil.rmtree(folder.path / name)
    save(folder, 0, prompt="d")
    assert [path.name for _, path in folder.versions(0)] == ["segment-001-v3", "segment-001-v4"]
    assert [item.name for item in folder.path.glob("segment-002*")] == []


def test_versions_are_ordered_by_number_and_other_names_are_not_ours(folder):
    for name in (
        "segment-001-v10",
        "segment-001-v9",
        "segment-001-v1",
        "segment-001-v02",
        "segment-0011",
        "segment-001-v",
    ):
        (folder.path / name).mkdir()
    assert [number for number, _ in folder.versions(0)] == [1, 9, 10]
    save(folder, 0)
    assert folder.place(0).name == "segment-001-v11"


@pytest.mark.parametrize("name", ["segment-001", ".segment-001.new", ".segment-001.old", "segment-001-v2"])
def test_what_is_not_ours_is_worked_around(folder, name):
    (folder.path / name).mkdir()
    (folder.path / name / "holiday.jpg").write_bytes(b"precious")
    save(folder, 0)
    save(folder, 0, prompt="other")
    folder.recover()
    fresh = Take(folder.path)
    assert fresh.find(0, SETTINGS, "") and fresh.find(0, SETTINGS | {"prompt": "other"}, "")
    assert (folder.path / name / "holiday.jpg").read_bytes() == b"precious"


def test_a_damaged_segment_with_something_foreign_in_it_is_left_alone(folder):
    save(folder, 0)
    (folder.path / "segment-001" / "notes.txt").write_text("precious")
    assert folder.find(0, SETTINGS, "") is not None
    (folder.path / "segment-001" / LATENTS).unlink()
    save(folder, 0)
    assert folder.place(0).name == "segment-001-v2" and (folder.path / "segment-001" / "notes.txt").exists()


def test_a_segment_that_was_moved_and_linked_is_read_and_not_replaced(folder, tmp_path):
    record = save(folder, 0)
    shutil.move(folder.path / "segment-001", tmp_path / "elsewhere")
    (folder.path / "segment-001").symlink_to(tmp_path / "elsewhere")
    fresh = Take(folder.path)
    assert fresh.find(0, SETTINGS, "") is not None and len(fresh.frames(0)) == record.count
    (tmp_path / "elsewhere" / LATENTS).unlink()
    save(fresh, 0)
    assert fresh.place(0).name == "segment-001-v2" and (folder.path / "segment-001").is_symlink()


def test_files_are_read_again_only_after_a_change(folder, monkeypatch):
    save(folder, 0)
    fresh, read = Take(folder.path), []
    digest = segments.hashlib.file_digest
    monkeypatch.setattr(
        segments.hashlib, "file_digest", lambda file, kind: (read.append(file.name), digest(file, kind))[1]
    )
    for _ in range(3):
        assert fresh.find(0, SETTINGS, "") is not None
    assert len(read) == 2
    (folder.path / "segment-001" / LATENTS).touch()
    assert fresh.find(0, SETTINGS, "") is not None and len(read) == 3


def test_leftovers_are_removed(folder):
    save(folder, 0)
    save(folder, 0, prompt="other")
    for name in ("segment-001", "segment-001-v2"):
        for suffix in ("new", "old"):
            shutil.copytree(folder.path / name, folder.path / f".{name}.{suffix}")
    shutil.move(folder.path / "segment-001-v2", folder.path / ".segment-001-v3.old")
    (folder.path / "notes.txt").touch()
    folder.recover()
    assert sorted(os.listdir(folder.path)) == ["notes.txt", "segment-001", "segment-001-v2", "segment-001-v3"]


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
    with pytest.raises(LongCatError, match="a video without frames"):
        folder.save(0, made(0)[0][:0], made(0)[1], settings=SETTINGS, before="", fps=12, notes={})
    assert folder.is_empty and list(folder.path.iterdir()) == []
