"""A GGUF header is held against the file's size before anything is allocated for it."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from longcat_core.errors import CheckpointError
from longcat_core.files.tensor_files import open_file

U8, I32, U32, STRING, ARRAY, U64 = 0, 5, 4, 8, 9, 10
F32, Q8_0 = 0, 8
SHAPE = b"comfy.gguf.orig_shape.a"


def text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def field(name: bytes, kind: int, content: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + content


def array(kind: int, count: int, content: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + content


def tensor(name: bytes = b"a", shape: tuple[int, ...] = (8, 2), kind: int = F32, start: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, start)


def write(path: Path, fields: list[bytes], tensors: list[bytes], counts: tuple[int, int] | None = None) -> Path:
    """A file with 64 bytes of numbers."""
    count = counts or (len(tensors), len(fields))
    head = b"GGUF" + struct.pack("<IQQ", 3, *count) + b"".join(fields) + b"".join(tensors)
    path.write_bytes(head + b"\0" * (-len(head) % 32 + 64))
    return path


def test_what_is_whole_is_read(tmp_path):
    shape = field(SHAPE, ARRAY, array(I32, 3, struct.pack("<3i", 4, 2, 2)))
    path = write(tmp_path / "x.gguf", [field(b"b", STRING, text(b"c")), shape], [tensor()])
    assert [shape for _, shape in open_file(path).header.values()] == [(4, 2, 2)]
    assert open_file(path).metadata == {"b": "c"}


@pytest.mark.parametrize(
    ("fields", "tensors", "counts", "said"),
    [
        ([], [tensor(), tensor(b"b")], None, "b is not at a place of its own"),
        ([], [tensor(shape=(8,)), tensor(b"b", (8,), start=16)], None, "b is not at a place of its own"),
        ([], [tensor(start=32)], None, "a ends at byte"),
        ([], [tensor(start=1 << 63)], None, "a ends at byte"),
        ([], [tensor(shape=(1 << 63, 2))], None, "a ends at byte"),
        ([], [tensor(shape=(1 << 63, 2, 0))], None, "corrupt GGUF"),
        ([], [tensor(shape=(8,)), tensor(shape=(8,), start=32)], None, "a tensor is there twice"),
        ([], [tensor(kind=77)], None, "77 is not a valid"),
        ([], [tensor(shape=(1,) * 9)], None, "9 dimensions"),
        ([], [tensor(shape=(31,), kind=Q8_0)], None, "not a multiple"),
        ([], [tensor(b"\xff")], None, "codec"),
        ([], [], (1 << 60, 0), "announces 1,152,921,504,606,846,976 entries"),
        ([], [], (0, 1 << 60), "announces 1,152,921,504,606,846,976 entries"),
        ([field(b"b", ARRAY, array(STRING, 1 << 40))], [], None, "lists of 1,099,511,627,776 values"),
        ([field(b"b", ARRAY, array(U64, 1 << 40))], [], None, "ends inside its header"),
        ([field(b"b", ARRAY, array(STRING, 60_000))], [], None, "ends inside its header"),
        ([field(b"b", ARRAY, array(U64, 60_000))], [], None, "ends inside its header"),
        ([field(b"b", ARRAY, array(ARRAY, 1, array(U8, 0)))], [], None, "metadata of type 9"),
        ([field(b"b", STRING, struct.pack("<Q", 1 << 62))], [], None, "a name of"),
        ([field(b"b", STRING, text(b"c"))] * 2, [], None, "b is there twice"),
        ([field(b"b", 99, b"")], [], None, "metadata of type 99"),
        ([field(b"general.alignment", U32, struct.pack("<I", 0))], [], None, "alignment 0"),
        ([field(b"general.alignment", U64, struct.pack("<Q", 64))], [tensor()], None, "alignment"),
        ([field(SHAPE, STRING, text(b"4"))], [tensor()], None, "corrupt shape for a"),
        ([field(SHAPE, ARRAY, array(I32, 2, struct.pack("<2i", -2, -8)))], [tensor()], None, "corrupt shape for a"),
        ([field(SHAPE, ARRAY, array(6, 2, struct.pack("<2f", 2, 8)))], [tensor()], None, "corrupt shape for a"),
    ],
)
def test_what_lies_is_refused_at_once(tmp_path, fields, tensors, counts, said):
    path = write(tmp_path / "x.gguf", fields, tensors, counts)
    with pytest.raises(CheckpointError, match=said) as caught:
        open_file(path)
    assert str(caught.value).startswith(str(path)) and "download it again" in str(caught.value)
