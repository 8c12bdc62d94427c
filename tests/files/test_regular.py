"""Regular files only: what is not one is refused at once, never waited for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from longcat_core.errors import LongCatError
from longcat_core.files.regular import check_regular, lines_of, read_bytes, read_lines, read_text


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


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "text").write_bytes("a ball\r\n一只球".encode(encoding))
    assert read_text(tmp_path / "text") == "a ball\r\n一只球"
    assert read_lines(tmp_path / "text") == ["a ball", "一只球"]


@pytest.mark.parametrize("content", ["größer".encode("latin-1"), "a ball".encode("utf-16-le"), b"a\0", b"\xff\xfea"])
def test_other_bytes_are_not_text(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(LongCatError, match=r"is not UTF-8 text; save it as UTF-8$"):
        read_text(tmp_path / "text")


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("a\nb\r\nc\rd", ["a", "b", "c", "d"]),
        ("\r\n  a\t\n\n \n", ["a"]),
        *((f"a{sign}b\nc", [f"a{sign}b", "c"]) for sign in "\u2028\u2029\x85\v\f\x1c\x1d\x1e"),
        ("a\n\ufeffb\n\ufeff", ["a", "b"]),
        ("a\n\x1a", ["a"]),
        ("a\n\u200b\n\u00a0\nb", ["a", "b"]),
        ("", []),
    ],
)
def test_lines_end_where_editors_show_it(text: str, lines: list[str]) -> None:
    assert lines_of(text) == lines
