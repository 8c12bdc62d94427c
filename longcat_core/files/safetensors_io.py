"""Read and write safetensors files, with errors that a person can act on.

The header is checked by the safetensors package and, because its errors name neither the file nor the remedy, parsed
here first.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt
from torch import Tensor

from ..errors import CheckpointError
from .atomic import atomic_path
from .records import parse_record
from .regular import check_regular

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself
# Tensors, and entries of metadata: a large model has a few thousand tensors.
MAX_ENTRIES = 100_000
AGAIN = "download it again"
PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle")
DTYPES: dict[str, torch.dtype] = {
    # Scales of blocks. Older versions of PyTorch lack it; they read its bytes.
    "F8_E8M0": getattr(torch, "float8_e8m0fnu", torch.uint8),
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
}
# Whose numbers dtypes that cannot be read are.
PACKED_DTYPES = {
    "F4": " (nvfp4 or mxfp4)",
    "F6_E2M3": " (mxfp6)",
    "F6_E3M2": " (mxfp6)",
}
# What a file named like a checkpoint may be instead, by its first bytes.
FOREIGN_STARTS = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the weights; run `git lfs pull` or download the file"),
    (b"PK\x03\x04", "is a PyTorch pickle, which can run code when it is loaded; convert it to .safetensors"),
    (b"\x80\x02", "is a Python pickle, which can run code when it is loaded; convert it to .safetensors"),
    (b"GGUF", "is a GGUF file, which only a LongCat-Video transformer may be; use the .safetensors form"),
    (b"<", "is a web page, not the weights; the download failed, so fetch the file again"),
)

# Suffix of files that are being written, so that loaders listing *.safetensors do not find them.
TEMPORARY = ".tmp"

Header = dict[str, tuple[torch.dtype, tuple[int, ...]]]
# Inode, bytes and time of the last write.
Stamp = tuple[int, int, int]


def read_header(path: str | Path) -> Header:
    """Name -> (dtype, shape) of every tensor in the file, without reading any tensor.

    Raises CheckpointError for a path that is missing, a folder, empty, truncated, corrupt, a pickle or another format.
    """
    return SafetensorsFile(path).header


def read_metadata(path: str | Path) -> dict[str, str]:
    """The free-form string metadata of the file, {} if it has none. Errors as in `read_header`."""
    return SafetensorsFile(path).metadata


def read_tensors(
    path: str | Path, device: str | torch.device = "cpu", names: Iterable[str] | None = None
) -> dict[str, Tensor]:
    """`SafetensorsFile.tensors` of the file at `path`. Errors as in `read_header`."""
    return SafetensorsFile(path).tensors(names, device)


class SafetensorsFile:
    """An opened safetensors file, a `TensorFile`: its header is parsed here, once. Threads may share it.

    Raises CheckpointError as `read_header` does.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.header, self.metadata, self._places, self._stamp = _layout(self.path)

    def rows(self, name: str, start: int = 0, stop: int | None = None, buffer: Tensor | None = None) -> Tensor:
        """See `TensorFile`. Rows are read and not mapped, because page after page is slower than the disk."""
        dtype, shape = self.header[name]
        first, last, _ = slice(start, stop).indices(shape[0]) if shape else (0, 1, 1)
        width = math.prod(shape[1:]) * dtype.itemsize
        size = max(0, last - first) * width
        if buffer is None or len(buffer) < size:
            buffer = torch.empty(size, dtype=torch.uint8)
        out = buffer[:size].view(dtype).view((max(0, last - first), *shape[1:]) if shape else ())
        room = buffer[:size].numpy().data
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self._begin(file.fileno(), name) + first * width)
                while room:
                    count = file.readinto(room)
                    if not count:
                        raise CheckpointError(f"{self.path} became shorter while it was read; download it again")
                    room = room[count:]
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read ({error}); download it again") from error
        return out

    def tensors(self, names: Iterable[str] | None = None, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """All tensors of the file (or those in `names`) as stored, on `device`; CPU tensors are memory-mapped.

        Raises CheckpointError for a name that the file lacks, and if it cannot be read.
        """
        from safetensors import SafetensorError, safe_open

        wanted = list(self.header) if names is None else list(names)
        for name in wanted:
            if name not in self.header:
                raise CheckpointError(f"{self.path} has no tensor '{name}'; give a file that has it")
        try:
            with safe_open(str(self.path), framework="pt", device=str(device)) as file:
                return {name: file.get_tensor(name) for name in wanted}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path} cannot be read ({error}); download it again") from error

    def places(self) -> list[tuple[str, int, int]]:
        """Name, first byte and number of bytes of every tensor in the file."""
        return [
            (name, self._places[name], math.prod(shape) * dtype.itemsize)
            for name, (dtype, shape) in self.header.items()
        ]

    def _begin(self, opened: int, name: str) -> int:
        """The position of a tensor's first byte in the file with descriptor `opened`."""
        if stamp(os.fstat(opened)) != self._stamp:
            # The file was written or replaced: one with the same tensors serves, at its own positions.
            header, _, places, now = _layout(self.path)
            if header != self.header:
                raise CheckpointError(f"{self.path} holds other tensors than when it was opened; load it again")
            self._places, self._stamp = places, now
        return self._places[name]


def stamp(status: os.stat_result) -> Stamp:
    """What changes when a file is written or replaced."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def write_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write `tensors` (any device, any strides) to `path`, whole or not at all, with ordinary file permissions.

    Raises LongCatError if the file cannot be written.
    """
    header = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    stream_safetensors(path, header, tensors.items(), metadata)


def stream_safetensors(
    path: str | Path,
    header: Header,
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str] | None = None,
    check: Callable[[Path], None] = lambda path: None,
) -> None:
    """`write_safetensors` of more than fits in memory: `tensors` come one by one, in any order, as `header` announces.

    check: receives the finished file before it is renamed to `path`; if it raises, `path` stays as it was. Raises
    LongCatError if the file cannot be written.
    """
    kinds = {dtype: name for name, dtype in DTYPES.items()}
    entries: dict[str, dict[str, Any]] = {}
    end = 0
    # Wide numbers first, so that every tensor starts at a multiple of its numbers' size.
    for name, (dtype, shape) in sorted(header.items(), key=lambda item: -item[1][0].itemsize):
        size = math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": kinds[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps({"__metadata__": dict(metadata), **entries} if metadata else entries).encode()
    text += b" " * (-len(text) % 8)
    waiting = set(entries)
    with atomic_path(path, TEMPORARY) as temporary:
        with open(temporary, "xb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
            for name, tensor in tensors:
                if (tensor.dtype, tuple(tensor.shape)) != header[name] or name not in waiting:
                    raise ValueError(f"{name} comes as {tensor.dtype} {tuple(tensor.shape)}, announced: {header[name]}")
                waiting.remove(name)
                file.seek(8 + len(text) + entries[name]["data_offsets"][0])
                file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        if waiting:
            raise ValueError(f"{sorted(waiting)[0]} was announced and did not come")
        check(temporary)


def _layout(path: Path) -> tuple[Header, dict[str, str], dict[str, int], Stamp]:
    """Header, metadata, the position of every tensor's first byte, and the stamp of the file that they describe."""
    check_regular(path, error=CheckpointError)
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise CheckpointError(
            f"{path} is a pickle by its ending, which can run code when it is loaded; convert it to .safetensors"
        )
    try:
        with open(path, "rb") as file:
            found = stamp(os.fstat(file.fileno()))
            start = file.read(64)
            if not start:
                raise CheckpointError(f"{path} is empty; download it again")
            for magic, sentence in FOREIGN_STARTS:
                # A header may by chance be 60 ("<") bytes long: then real JSON follows the eight length bytes.
                if start.startswith(magic) and start[8:9] != b"{":
                    raise CheckpointError(f"{path} {sentence}")
            length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else MAX_HEADER_BYTES + 1
            if length > MAX_HEADER_BYTES or start[8:9] not in (b"{", b""):
                raise CheckpointError(f"{path} is not a safetensors file; give one")
            file.seek(8)
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    size, data = found[1], 8 + length
    if len(text) < length:
        raise CheckpointError(
            f"{path} is truncated ({size:,} bytes, its header alone takes {data:,}); download it again"
        )
    entries, metadata = _entries(path, text)
    end = data + max((entry.data_offsets[1] for entry in entries.values()), default=0)
    if size != end:
        state = "truncated" if size < end else "corrupt"
        raise CheckpointError(f"{path} is {state} ({size:,} bytes instead of {end:,}); download it again")
    for name, entry in entries.items():
        if entry.dtype not in DTYPES:
            kind = entry.dtype + PACKED_DTYPES.get(entry.dtype, "")
            raise CheckpointError(f"{path} stores '{name}' as {kind}, which is not supported; give another file")
        first, last = entry.data_offsets
        if last - first != math.prod(entry.shape) * DTYPES[entry.dtype].itemsize:
            raise CheckpointError(f"{path} has a corrupt entry for '{name}'; download it again")
    _check_with_package(path, found)
    header = {name: (DTYPES[entry.dtype], entry.shape) for name, entry in entries.items()}
    return header, metadata, {name: data + entry.data_offsets[0] for name, entry in entries.items()}, found


@dataclass(frozen=True)
class _Entry:
    """What a header says about a tensor. data_offsets: of its first byte and of the byte after its last."""

    dtype: str
    shape: tuple[NonNegativeInt, ...]
    data_offsets: tuple[NonNegativeInt, NonNegativeInt]


class _RawHeader(BaseModel):
    """The JSON of a header: an entry for each tensor, by its name, and metadata."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, _Entry]
    metadata: dict[str, str] | None = Field(None, alias="__metadata__")


def _entries(path: Path, text: bytes) -> tuple[dict[str, _Entry], dict[str, str]]:
    """The entry of every tensor, and the metadata.

    Raises CheckpointError, also for a name that occurs twice, and for more than `MAX_ENTRIES`.
    """

    def unique(pairs: list[tuple[str, object]]) -> None:
        check_count(len(pairs))
        names = Counter(name for name, _ in pairs)
        for name, count in names.items():
            if count > 1:
                raise CheckpointError(f"{path} has a corrupt safetensors header ('{name}' is there twice); {AGAIN}")

    def check_count(count: int) -> None:
        if count > MAX_ENTRIES:
            raise CheckpointError(
                f"{path} has more than {MAX_ENTRIES:,} tensors or entries of metadata, which no model has; "
                "give another file"
            )

    # Counted first, because a parser takes seconds for what is refused here.
    check_count(text.count(b'"data_offsets"'))
    # For parsers the last one wins, without a word. What is not JSON gets its sentence below.
    try:
        json.loads(text, object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError):
        pass
    raw = parse_record(
        text, _RawHeader, f"{path}", "readable and has a corrupt safetensors header", AGAIN, CheckpointError
    )
    return raw.__pydantic_extra__, raw.metadata or {}


def _check_with_package(path: Path, found: Stamp) -> None:
    """Raise CheckpointError for a header that the safetensors package refuses, as for tensors that overlap.

    found: stamp of the file whose header was parsed.
    """
    from safetensors import SafetensorError, safe_open

    try:
        # Maps the file, and reads its header alone.
        with safe_open(path, framework="np"):
            changed = stamp(path.stat()) != found
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} has a corrupt safetensors header ({_why(error)}); {AGAIN}") from error
    if changed:
        raise CheckpointError(f"{path} was written while it was read; load it again")


def _why(error: Exception) -> str:
    return str(error).removeprefix("Error while deserializing header: ")
