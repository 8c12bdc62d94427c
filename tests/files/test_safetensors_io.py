"""Every way in which a weights file can be wrong gets one sentence; good ones survive a round trip."""

from __future__ import annotations

import json
import os
import pickle
import stat
import struct

import pytest
import torch

from longcat_core.errors import CheckpointError, LongCatError
from longcat_core.files import safetensors_io
from longcat_core.files.safetensors_io import (
    read_header,
    read_metadata,
    read_tensors,
    stream_safetensors,
    write_safetensors,
)


def raw(header: dict | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.safetensors"
    write_safetensors(path, {"b": torch.arange(6.0).reshape(2, 3).bfloat16(), "a": torch.ones(4, dtype=torch.int64)})
    return path


def test_round_trip(tmp_path):
    path = tmp_path / "x.safetensors"
    square = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "transposed": square.T,
        "half": square.half(),
        "fp8": square.to(torch.float8_e4m3fn),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
    }
    write_safetensors(path, tensors, {"note": "größe"})
    assert read_header(path) == {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    assert read_metadata(path) == {"note": "größe"}
    back = read_tensors(path)
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name].float(), tensor.float())
    assert set(read_tensors(path, names=["half"])) == {"half"}
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_written_file_has_ordinary_permissions(tmp_path, good):
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE(good.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_failed_write_leaves_the_old_file(tmp_path, good):
    before = good.read_bytes()
    with pytest.raises(NotImplementedError, match="meta tensor"):  # has no numbers to write, after x has been written
        write_safetensors(good, {"x": torch.zeros(4), "y": torch.zeros(4, device="meta")})
    assert good.read_bytes() == before
    assert os.listdir(tmp_path) == [good.name]


def test_files_of_a_killed_process_do_not_block_writing(tmp_path):
    left = tmp_path / f".x.safetensors.{os.getpid()}.tmp"
    left.write_bytes(b"half")
    write_safetensors(tmp_path / "x.safetensors", {"x": torch.ones(2)})
    stream_safetensors(tmp_path / "x.safetensors", {"x": (torch.float32, (2,))}, [("x", torch.ones(2))])
    assert left.read_bytes() == b"half" and len(os.listdir(tmp_path)) == 2


def test_write_into_a_missing_folder(tmp_path):
    with pytest.raises(LongCatError, match=r"could not be written \(No such file"):
        write_safetensors(tmp_path / "no" / "x.safetensors", {"x": torch.zeros(1)})


def test_unknown_name(good):
    with pytest.raises(CheckpointError, match="has no tensor 'c'"):
        read_tensors(good, names=["c"])


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"abc", "is not a safetensors file"),
        (b"just some text that goes on for a while", "is not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "Git LFS pointer"),
        (b"PK\x03\x04" + b"\0" * 50, "PyTorch pickle"),
        (pickle.dumps({"a": 1}, protocol=2), "Python pickle"),
        (b"GGUF" + b"\0" * 50, "GGUF"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (struct.pack("<Q", 500) + b'{"a":', "is truncated"),
        (struct.pack("<Q", 500), "is truncated"),
        (raw({"a": ENTRY}, b"\0" * 7), "is truncated"),
        (raw({"a": ENTRY}, b"\0" * 9), "is corrupt"),
        (raw(b'{"a": ['), "corrupt safetensors header"),
        (raw({"a": {"dtype": "F32"}}), "corrupt safetensors header"),
        (raw({"a": 5}), "corrupt safetensors header"),
        (raw({"a": {**ENTRY, "shape": [3]}}, b"\0" * 8), "corrupt entry for 'a'"),
        (raw({"a": {**ENTRY, "shape": None}}, b"\0" * 8), r"corrupt safetensors header \(a\.shape"),
        (raw({"a": {**ENTRY, "shape": [2.0]}}, b"\0" * 8), r"corrupt safetensors header \(a\.shape\.0"),
        (raw({"a": {**ENTRY, "shape": [1 << 70, 2]}}, b"\0" * 8), "corrupt entry for 'a'"),
        (raw({"a": {**ENTRY, "shape": [1 << 40, 1 << 40, 0]}}, b"\0" * 8), "corrupt entry for 'a'"),
        (raw({"a": {**ENTRY, "dtype": ["F32"]}}, b"\0" * 8), r"corrupt safetensors header \(a\.dtype"),
        (raw({"a": {**ENTRY, "dtype": "F4"}}, b"\0" * 8), r"stores 'a' as F4 \(nvfp4 or mxfp4\)"),
        (raw({"a": {**ENTRY, "dtype": "C64"}}, b"\0" * 8), "stores 'a' as C64"),
        (raw({"a": {**ENTRY, "data_offsets": [0, float("inf")]}}), r"corrupt safetensors header \(a\.data_offsets"),
        (raw({"a": {**ENTRY, "data_offsets": [0, 8, 8]}}, b"\0" * 8), r"corrupt safetensors header \(a\.data_offsets"),
        (raw({"a": {**ENTRY, "data_offsets": [-8, 0]}}), r"corrupt safetensors header \(a\.data_offsets"),
        (raw({"a": {**ENTRY, "data_offsets": [8, 0]}}), "corrupt entry for 'a'"),
        (raw({"a": ENTRY, "__metadata__": [1]}, b"\0" * 8), r"corrupt safetensors header \(__metadata__"),
        (raw({"a": ENTRY, "__metadata__": {"b": 1}}, b"\0" * 8), r"corrupt safetensors header \(__metadata__\.b"),
        (raw(b'{"a":' + b"[" * 8000), "corrupt safetensors header .*recursion"),
        (raw(b"{" + b'"a":' + b"9" * 5000 + b"}"), "corrupt safetensors header"),
        # What the safetensors package refuses.
        (raw({"a": ENTRY, "b": ENTRY}, b"\0" * 8), "corrupt safetensors header .*invalid offset"),
        (
            raw({"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}}, b"\0" * 12),
            "corrupt safetensors header .*invalid",
        ),
        (raw({"a": {**ENTRY, "data_offsets": [1, 9]}}, b"\0" * 9), "corrupt safetensors header .*invalid offset"),
        (raw({"a": ENTRY, "b": {**ENTRY, "data_offsets": [16, 24]}}, b"\0" * 24), "corrupt .*invalid offset"),
        (raw({"a": {**ENTRY, "shape": [1 << 40, 1 << 40, 0], "data_offsets": [0, 0]}}), "corrupt .*overflow"),
        # And what it takes: the last one wins.
        (raw(f'{{"a": {json.dumps(ENTRY)}, "a": {json.dumps(ENTRY)}}}'.encode(), b"\0" * 8), "'a' is there twice"),
        (raw(b'{"__metadata__": {"b": "1", "b": "2"}}'), "'b' is there twice"),
    ],
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    for read in (read_header, read_tensors):
        with pytest.raises(CheckpointError, match=message) as caught:
            read(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "header",
    [
        b"{%s}" % b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(100_001)),
        b"{%s}" % b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_\\u006fffsets":[0,0]}' % i for i in range(100_001)),
        b'{"__metadata__":{%s}}' % b",".join(b'"%d":""' % i for i in range(100_001)),
        b"{%s}" % b",".join(b'"%d":1' % i for i in range(100_001)),
    ],
    ids=["tensors", "escaped", "metadata", "numbers"],
)
def test_more_entries_than_any_model_has(tmp_path, monkeypatch, header):
    monkeypatch.setattr(safetensors_io, "parse_record", lambda *_: pytest.fail("the header was parsed"))
    (tmp_path / "x.safetensors").write_bytes(raw(header))
    with pytest.raises(CheckpointError, match=r"x.safetensors has more than 100,000 tensors or entries of metadata"):
        read_header(tmp_path / "x.safetensors")


def test_a_header_as_long_as_a_magic_number_is_not_a_web_page(tmp_path):
    text = json.dumps({"a": ENTRY}).encode().ljust(ord("<"))
    (tmp_path / "x.safetensors").write_bytes(raw(text, b"\0" * 8))
    assert read_header(tmp_path / "x.safetensors") == {"a": (torch.float32, (2,))}


def test_bad_paths(tmp_path):
    with pytest.raises(CheckpointError, match="is a folder"):
        read_header(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        read_header(tmp_path / "none.safetensors")
    for name in ("x.pt", "x.ckpt", "x.bin", "X.PTH"):
        (tmp_path / name).write_bytes(b"anything")
        with pytest.raises(CheckpointError, match="pickle by its ending"):
            read_header(tmp_path / name)
