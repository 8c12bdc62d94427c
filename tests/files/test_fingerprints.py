"""Other numbers anywhere in a checkpoint give another fingerprint, and earlier versions' fingerprints still count."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch

from longcat_core.files import fingerprints
from longcat_core.files.differences import differences, differences_in_words
from longcat_core.files.fingerprints import as_then, fingerprint
from longcat_core.files.safetensors_io import write_safetensors

from ..checkpoints.written_forms import write_gguf


@pytest.fixture(params=["whole", "samples"])
def size(request, monkeypatch) -> str:
    """Files of a few MB are read whole, unless they count as large."""
    if request.param == "samples":
        monkeypatch.setattr(fingerprints, "WHOLE_FILE", 1 << 16)
    return request.param


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {f"layer.{i}": torch.randn(64, 4096 if i < 4 else 4) for i in range(12)}


def write(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    write_gguf(path, tensors, {}) if path.suffix == ".gguf" else write_safetensors(path, tensors)
    return path


@pytest.mark.parametrize("ending", [".safetensors", ".gguf"])
@pytest.mark.parametrize("changed", [[f"layer.{i}"] for i in (0, 3, 4, 11)] + [["layer.0", "layer.1", "layer.2"]])
def test_other_numbers_in_any_tensor(tmp_path, size, ending, changed):
    path = write(tmp_path / f"x{ending}", state())
    before = fingerprint(path)
    assert fingerprint(write(tmp_path / f"x{ending}", state())) == before
    write(path, state() | {name: -state()[name] for name in changed})
    assert fingerprint(path) != before


def test_what_earlier_versions_did_not_look_at(tmp_path, size):
    """Signs of all numbers, but in the samples that the file's size alone decided: 85 of 100 numbers."""
    path = write(tmp_path / "x.safetensors", state())
    old, new, raw = as_then(fingerprint(path)), fingerprint(path), bytearray(path.read_bytes())
    for part in range(64):
        first, last = max(len(raw) * part // 64 + 4096, 1 << 20), len(raw) * (part + 1) // 64
        for i in range(first - first % 4 + 7, last, 4):
            raw[i] ^= 0x80
    path.write_bytes(raw)
    assert as_then(fingerprint(path)) == old and fingerprint(path) != new


def test_a_folder_counts_with_its_config(tmp_path):
    write(tmp_path / "x.safetensors", state())
    before = fingerprint(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "._x.safetensors").write_text("what a file manager keeps")
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert fingerprint(tmp_path) == before
    (tmp_path / "config.json").write_text("{}")
    assert fingerprint(tmp_path) != before


def test_a_folder_of_pictures_counts_with_all_files(tmp_path):
    (tmp_path / "1.png").write_bytes(b"1")
    before = fingerprint(tmp_path)
    (tmp_path / "1.png").write_bytes(b"2")
    assert fingerprint(tmp_path) != before


def test_files_of_another_kind(tmp_path, size):
    path = tmp_path / "clip.mkv"
    path.write_bytes(bytes(1 << 22))
    before = fingerprint(path)
    path.write_bytes(bytes(1 << 22)[:-1] + b"\1" * 1)
    assert (fingerprint(path) != before) == (size == "whole")
    path.write_bytes(bytes(1 << 21) + b"\1" * (1 << 21))
    assert fingerprint(path) != before


def test_fingerprints_of_earlier_versions_count(tmp_path):
    path = write(tmp_path / "x.safetensors", {"a": torch.arange(8.0)})
    raw, total = path.read_bytes(), hashlib.sha256()
    total.update(f"{len(raw)}:".encode() + raw)
    for part in range(64):
        total.update(raw[len(raw) * part // 64 :][:4096])
    old = total.hexdigest()[:16]
    now = {"model": fingerprint(path), "lora": f"{fingerprint(path)}+{fingerprint(path)}:0.5", "steps": 2}
    then = {"model": old, "lora": f"{old}+{old}:0.5", "steps": 2}
    assert not differences(then, now) and not differences(now, now)
    assert differences(then | {"model": old[::-1]}, now) == ["model"]
    assert differences(then | {"steps": 3}, now) == ["steps"]
    assert "model 0000 there" in differences_in_words(then | {"model": "0000"}, now)
