"""Regular files only: what is not one is refused at once, never waited for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from longcat_core.errors import LongCatError
from longcat_core.files.regular import check_regular, read_bytes, read_text


def test_a_pipe_a_device_a_folder_and_a_name_that_cannot_be_are_refused(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "to-pipe").symlink_to(pipe)
    for path, sentence in (
        (pipe, "is a pipe or a device; give a regular file"),
        (tmp_path / "to-pipe", "is a pipe or a device; give a regular file"),
        (Path("/dev/zero"), "is a pipe or a device; give a regular file"),
        (tmp_path, "is a folder; give a file"),
        (tmp_path / "missing", "does not exist; give the path of a file"),
        (tmp_path / ("n" * 300), "cannot be read"),
        ("a\0b", "cannot be read"),
    ):
        with pytest.raises(LongCatError, match=f"^prompts .*{sentence}"):
            read_bytes(path, "prompts")


def test_a_link_to_a_regular_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to("file")
    check_regular(tmp_path / "link")
    assert read_text(tmp_path / "link") == "text"


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes("a ball\n".encode("utf-8-sig"))
    assert read_text(tmp_path / "text") == "a ball\n"
    (tmp_path / "text").write_bytes("a ball\n".encode("utf-16"))
    with pytest.raises(LongCatError, match=r"is not UTF-8 text; save it as UTF-8$"):
        read_text(tmp_path / "text")
