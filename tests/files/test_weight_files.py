"""Which files of a folder are a model's: the index decides, and what does not belong is named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from longcat_core.errors import CheckpointError
from longcat_core.files.safetensors_io import write_safetensors
from longcat_core.files.weight_files import open_weights

SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
INDEX = "model.safetensors.index.json"


def write(path: Path, *names: str) -> None:
    write_safetensors(path, {name: torch.ones(2) for name in names})


def index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards and their index."""
    folder = tmp_path / "model"
    folder.mkdir()
    for shard, name in zip(SHARDS, "ab", strict=True):
        write(folder / shard, name)
    index(folder, {"a": SHARDS[0], "b": SHARDS[1]})
    return folder


def opened(folder: Path) -> list[str]:
    return [path.name for path in open_weights(folder, "give a model")]


def test_the_index_decides(folder, recwarn):
    assert opened(folder) == SHARDS and not recwarn.list
    write(folder / "finetune.safetensors", "a", "b")
    write(folder / "model-00003-of-00003.safetensors", "c")
    (folder / "quantized.gguf").write_bytes(b"GGUF")
    with pytest.warns(UserWarning, match=r"does not name finetune\.safetensors and 1 more, which is left alone"):
        assert opened(folder) == SHARDS


def test_shards_that_are_links_out_of_the_folder(folder, tmp_path):
    os.rename(folder / SHARDS[0], tmp_path / "blob")
    (folder / SHARDS[0]).symlink_to(tmp_path / "blob")
    assert opened(folder) == SHARDS


def test_hidden_files_are_not_read(folder):
    (folder / INDEX).unlink()
    (folder / f"._{SHARDS[0]}").write_bytes(b"what a file manager keeps beside a file")
    (folder / f"._{INDEX}").write_bytes(b"\0")
    assert opened(folder) == SHARDS


PLACES = ["../secret.safetensors", "/etc/passwd", "", ".", "..", "a/b.safetensors", "..\\b.safetensors", "C:x"]


@pytest.mark.parametrize("place", PLACES)
def test_an_index_names_files_beside_it_alone(folder, place):
    index(folder, {"a": SHARDS[0], "b": place})
    with pytest.raises(CheckpointError, match="outside its folder; download"):
        opened(folder)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda folder: write(folder / SHARDS[1], "a", "b"), "tensor a is in both"),
        (lambda folder: write(folder / SHARDS[1], "c"), rf"{SHARDS[1]} lacks b, which {INDEX} places there"),
        (lambda folder: index(folder, {"a": SHARDS[1], "b": SHARDS[0]}), "lacks a, which"),
        (lambda folder: index(folder, {}), "names no file"),
        (lambda folder: index(folder, {"a": 1}), "is not a readable index"),
        (lambda folder: index(folder, [["a", SHARDS[0]]]), "is not a readable index"),
        (lambda folder: (folder / INDEX).write_text("[" * 100_000), "is not a readable index"),
        (lambda folder: (folder / INDEX).write_bytes(b"\xff\xfe"), "is not a readable index"),
        (lambda folder: (folder / f"b.{INDEX}").write_text("{}"), "2 index files"),
        (lambda folder: (folder / SHARDS[0]).unlink(), f"names {SHARDS[0]}, which is missing"),
        (lambda folder: (folder / SHARDS[0]).unlink() or os.mkfifo(folder / SHARDS[0]), "is a pipe or a device"),
        (lambda folder: (folder / INDEX).unlink() or os.mkfifo(folder / INDEX), "is a pipe or a device"),
    ],
)
def test_bad_indices(folder, edit, said):
    edit(folder)
    with pytest.raises(CheckpointError, match=said):
        opened(folder)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda folder: write(folder / "lora.safetensors", "c"), r"holds lora\.safetensors beside the shards of model"),
        (lambda folder: write(folder / "model-00002-of-00003.safetensors", "c"), "beside the shards of model"),
        (lambda folder: write(folder / "old.safetensors", "b"), r"tensor b is in both .* and old\.safetensors"),
        (lambda folder: (folder / SHARDS[0]).unlink(), "lacks shard 1 of 2 of model; download it again"),
        (lambda folder: (folder / "q.gguf").write_bytes(b"GGUF"), r"holds model-.* and q\.gguf; keep one"),
        (lambda folder: [(folder / shard).unlink() for shard in SHARDS], "holds no .safetensors file; give a model"),
        (lambda folder: os.mkfifo(folder / "z.safetensors"), "is a pipe or a device"),
    ],
)
def test_strangers_without_an_index(folder, edit, said):
    (folder / INDEX).unlink()
    assert opened(folder) == SHARDS
    edit(folder)
    with pytest.raises(CheckpointError, match=said):
        opened(folder)
