"""The weight files of a model: one file, or those of a folder, by its index if it has one."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from ..errors import CheckpointError, listed
from .records import read_record
from .tensor_files import TensorFile, is_gguf, open_file

INDEX_SUFFIX = ".safetensors.index.json"
SUFFIXES = (".safetensors", ".sft")
# The name of a shard without its ending: the model, the shard's number, the number of shards.
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})", re.ASCII)


@dataclass(frozen=True)
class Index:
    """The index of a folder of shards. weight_map: name of a tensor -> name of the file that holds it."""

    weight_map: dict[str, str]


def open_weights(path: Path, remedy: str, open_one: Callable[[Path], TensorFile] = open_file) -> dict[Path, TensorFile]:
    """The opened weight files at `path`: the file itself, or of a folder those that its index names, else all.

    Files that the index does not name are left alone, and a warning names them. Hidden files are never read. remedy:
    the end of the sentence if nothing is there. open_one: opens a file; `SafetensorsFile` for models that cannot be
    GGUF. Raises CheckpointError for a bad index, an incomplete set of shards, a mixture of models or file formats, a
    tensor that two files hold or that is not where the index says, and as `open_one`.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; {remedy}")
    if not path.is_dir():
        return {path: open_one(path)}
    inside = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    indices = [entry for entry in inside if entry.name.endswith(INDEX_SUFFIX)]
    if len(indices) > 1:
        raise CheckpointError(
            f"{path} has {len(indices)} index files ({indices[0].name}, ...); keep one model in each folder"
        )
    files = [entry for entry in inside if entry.suffix.lower() in SUFFIXES]
    weight_map = _weight_map(indices[0]) if indices else {}
    if indices:
        files = _indexed(indices[0], weight_map, files)
    else:
        gguf = [entry for entry in inside if entry.is_file() and entry not in files and is_gguf(entry)]
        if files and gguf:
            raise CheckpointError(f"{path} holds {files[0].name} and {gguf[0].name}; keep one model in each folder")
        files = files or gguf
    if not files:
        raise CheckpointError(f"{path} holds no .safetensors file; {remedy}")
    opened = {file: open_one(file) for file in files}
    holders: dict[str, Path] = {}
    for file, content in opened.items():
        for name in content.header:
            if name in holders:
                first = holders[name].name
                raise CheckpointError(f"{path}: tensor {name} is in both {first} and {file.name}; keep one model there")
            holders[name] = file
    for name, place in weight_map.items():
        if holders.get(name) != path / place:
            raise CheckpointError(
                f"{path / place} lacks {name}, which {indices[0].name} places there; download it again"
            )
    if not indices:
        _check_numbers(path, files)
    return opened


def _weight_map(index: Path) -> dict[str, str]:
    return read_record(index, Index, "a readable index", "download it again", error=CheckpointError).weight_map


def _indexed(index: Path, weight_map: dict[str, str], beside: Iterable[Path]) -> list[Path]:
    """The files that an index names. beside: all weight files of its folder."""
    folder, shards = index.parent, sorted(set(weight_map.values()))
    there = set(os.listdir(folder))
    if not shards:
        raise CheckpointError(f"{index} names no file; download it again")
    for shard in shards:
        # A name may be a link that leads out of the folder, as in a cache of downloads; a path may not.
        if shard in ("", ".", "..") or Path(shard).name != shard or PureWindowsPath(shard).name != shard:
            raise CheckpointError(f"{index} names {shard!r} outside its folder; download the checkpoint again")
        # Not asked of the system, which fails for a name that is too long.
        if shard not in there:
            raise CheckpointError(f"{index.name} names {shard}, which is missing in {folder}; download it again")
    if strangers := [file.name for file in beside if file.name not in shards]:
        warnings.warn(f"{index} does not name {listed(strangers, 1)}, which is left alone", stacklevel=3)
    return [folder / shard for shard in shards]


def _check_numbers(folder: Path, files: Iterable[Path]) -> None:
    """Raise CheckpointError unless numbered shards are complete and nothing is beside them."""
    shards = {file: match for file in files if (match := _SHARD.fullmatch(file.stem))}
    if not shards:
        return
    first = next(iter(shards.values()))
    for file in files:
        if file not in shards or shards[file].group(1, 3) != first.group(1, 3):
            raise CheckpointError(f"{folder} holds {file.name} beside the shards of {first[1]}; keep one model there")
    there, count = {int(match[2]) for match in shards.values()}, int(first[3])
    if missing := next((number for number in range(1, count + 1) if number not in there), None):
        raise CheckpointError(f"{folder} lacks shard {missing} of {count} of {first[1]}; download it again")
