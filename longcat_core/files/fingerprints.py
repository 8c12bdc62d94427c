"""Fingerprints: what tells checkpoints, LoRAs and clips from others, without reading 83 GB.

Version 2 looks at every tensor. Folders and training states made before it hold fingerprints of the first kind, 16
digits without a prefix; `as_then` computes those, so that such work can be resumed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

from ..errors import CheckpointError
from .atomic import reason
from .gguf_header import tensor_places
from .safetensors_io import SafetensorsFile
from .tensor_files import is_gguf
from .weight_files import SUFFIXES

PREFIX = "2-"
# Files and tensors up to these sizes are read whole; of larger ones, samples.
WHOLE_FILE, WHOLE_TENSOR = 64 << 20, 64 << 10
SAMPLES, SAMPLE_BYTES = 8, 4096
# Of a large file that is not of tensors.
_SAMPLES_OF_OTHERS = 512
# The first kind: the beginning of a file, and samples at places that its size alone decided.
_HEAD, _OLD_SAMPLES = 1 << 20, 64
_DIGITS = re.compile(re.escape(PREFIX) + r"[0-9a-f]{16}")
# Fingerprints of this process -> how to compute those of the first kind.
_EARLIER: dict[str, Callable[[], str]] = {}


def fingerprint(path: str | Path) -> str:
    """`2-` and sixteen hexadecimal digits that differ between checkpoints: of a file, or of all weights in a folder.

    They cover sizes, headers, a folder's `config.json` and numbers of every tensor: all of a small file or tensor, else
    samples throughout it. 83 GB take less than a minute. Raises CheckpointError for a file that cannot be read.
    """
    path = Path(path)
    total = hashlib.sha256()
    try:
        for file in _files(path):
            size = file.stat().st_size
            total.update(f"{size}:".encode())
            with open(file, "rb") as stream:
                for start, length in [(0, size)] if size <= WHOLE_FILE else _samples(file, size):
                    stream.seek(start)
                    while length > 0 and (content := stream.read(min(length, 1 << 20))):
                        total.update(content)
                        length -= len(content)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({reason(error)}); check its permissions") from error
    return remember(PREFIX + total.hexdigest()[:16], lambda: _first_kind(path))


def remember(found: str, earlier: Callable[[], str]) -> str:
    """`found`, for which `as_then` can compute what earlier versions had stored."""
    # Computed once, for folders with many records.
    _EARLIER[found] = cache(earlier)
    return found


def as_then(value: object, there: object = None) -> object:
    """A setting as earlier versions would have stored it: its fingerprints, if it has any, of the first kind.

    there: what is stored; if that has a fingerprint of the second kind, nothing is computed.
    """
    if not isinstance(value, str) or (isinstance(there, str) and _DIGITS.search(there)):
        return value
    return _DIGITS.sub(lambda match: _EARLIER[match[0]]() if match[0] in _EARLIER else match[0], value)


def _files(path: Path) -> Sequence[Path]:
    """The files of a checkpoint, in a fixed order; of a folder without weights, all files."""
    if not path.is_dir():
        return [path]
    inside = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    weights = [file for file in inside if file.suffix in (*SUFFIXES, ".gguf")]
    return [*weights, *(file for file in inside if file.name == "config.json")] if weights else inside


def _samples(file: Path, size: int) -> Iterator[tuple[int, int]]:
    """(first byte, number of bytes) of the header and of parts of every tensor of a large file, in its order."""
    try:
        places = tensor_places(file) if is_gguf(file) else SafetensorsFile(file).places()
    except (CheckpointError, ValueError, ImportError):
        # Of another kind, or without the package that reads it.
        places = []
    places = sorted(places, key=lambda place: place[1:])
    yield 0, min([size, _HEAD] if not places else [places[0][1]])
    for name, start, length in places or [("", 0, size)]:
        count = SAMPLES if places else _SAMPLES_OF_OTHERS
        if length <= max(WHOLE_TENSOR, count * SAMPLE_BYTES):
            yield start, length
            continue
        part = (length - SAMPLE_BYTES) // count
        for i in range(count):
            # Somewhere in each part, so that samples do not fall on the same column of every row.
            digest = hashlib.sha256(f"{name} {i}".encode()).digest()
            yield start + i * part + int.from_bytes(digest[:8], "big") % part, SAMPLE_BYTES


def _first_kind(path: Path) -> str:
    total = hashlib.sha256()
    for file in [path] if path.is_file() else sorted([*path.rglob("*.safetensors"), *path.rglob("*.gguf")]):
        size = file.stat().st_size
        total.update(f"{size}:".encode())
        with open(file, "rb") as stream:
            total.update(stream.read(_HEAD))
            for part in range(_OLD_SAMPLES):
                stream.seek(size * part // _OLD_SAMPLES)
                total.update(stream.read(SAMPLE_BYTES))
    return total.hexdigest()[:16]
