"""Records: JSON of files is checked against a type, and what is wrong is named in one sentence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from longcat_core.errors import CheckpointError, LongCatError
from longcat_core.files.records import FiniteFloat, parse_record, read_record


@dataclass(frozen=True)
class Shape:
    depth: int
    scales: tuple[FiniteFloat, ...] = ()


def test_a_record_keeps_the_fields_that_its_type_names() -> None:
    assert parse_record('{"depth": 3, "scales": [1, 2.5], "more": {}}', Shape, "f", "a shape") == Shape(3, (1.0, 2.5))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1",
        "[1]",
        "null",
        "{}",
        '{"depth": "3"}',
        '{"depth": 3.0}',
        '{"depth": true}',
        '{"depth": null}',
        '{"depth": 1e999}',
        '{"depth": ' + "9" * 5000 + "}",
        '{"depth": 3, "scales": 1}',
        '{"depth": 3, "scales": [NaN]}',
        '{"depth": 3, "scales": [1e999]}',
        '{"depth": 3, "more": ' + "[" * 100_000,
        '{"depth": 3, "scales": ' + "[" * 5000 + "]" * 5000 + "}",
        b"\xff\xfe{}",
    ],
)
def test_other_json_is_refused_in_one_sentence(text: str | bytes) -> None:
    with pytest.raises(CheckpointError, match=r"^f\.json is not a shape \(.{3,200}\); get the file again$"):
        parse_record(text, Shape, "f.json", "a shape", error=CheckpointError)


def test_a_file_is_read_with_a_byte_order_mark_and_bounded(tmp_path: Path) -> None:
    path = tmp_path / "shape.json"
    path.write_bytes(b'\xef\xbb\xbf{"depth": 3}')
    assert read_record(path, Shape, "a shape") == Shape(3)
    with pytest.raises(LongCatError, match=r"shape\.json has more than 10 bytes; give a smaller file$"):
        read_record(path, Shape, "a shape", limit=10)
