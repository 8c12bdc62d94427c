"""Check a GGUF file's header against the file's size, before the gguf package allocates what the header announces.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .gguf_lists import DTYPES, LIST, LONG, STRING

# Bytes of a value by its type.
_SCALARS = {kind: np.dtype(name).itemsize for kind, name in DTYPES.items()}
_UINT32 = 4
_ALIGNMENT = b"general.alignment"
# GGUF's own limit is 65,535.
_MAX_NAME = 65535
_MAX_DIMENSIONS = 8
# Of all lists together, numbers of long lists apart, which are read in one piece. A vocabulary has 300,000 tokens.
_MAX_ELEMENTS = 1 << 20


def check_header(path: Path) -> None:
    """Raise ValueError, naming the fault, unless all that the header of a GGUF file announces is in the file.

    Tensors must lie in the file, without overlaps; names, of tensors and of metadata, must not be there twice.
    """
    tensor_places(path)


def tensor_places(path: Path) -> list[tuple[str, int, int]]:
    """Name, first byte and number of bytes of every tensor of a GGUF file. Raises ValueError as `check_header`."""
    with open(path, "rb") as file:
        return _Header(file).check()


class _Header:
    def __init__(self, file: BinaryIO) -> None:
        self.file, self.size = file, os.fstat(file.fileno()).st_size
        self.elements = 0

    def check(self) -> list[tuple[str, int, int]]:
        magic, version = self.take(4), self.number(4)
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"version {version} is not 2 or 3")
        tensors, fields = self.number(8), self.number(8)
        alignment, names = 32, set()
        for _ in range(self.plausible(fields, 13)):
            name, kind = self.string(_MAX_NAME), self.number(4)
            if name in names:
                raise ValueError(f"{name.decode(errors='replace')} is there twice")
            names.add(name)
            if name == _ALIGNMENT and kind == _UINT32:
                alignment = self.number(4)
            else:
                self.skip(kind)
        return self.places([self.tensor() for _ in range(self.plausible(tensors, 24))], alignment)

    def places(self, tensors: list[tuple[str, int, int]], alignment: int) -> list[tuple[str, int, int]]:
        if len({name for name, _, _ in tensors}) < len(tensors):
            raise ValueError("a tensor is there twice")
        if alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"alignment {alignment}")
        end = data = -(-self.file.tell() // alignment) * alignment
        for name, start, length in sorted(tensors, key=lambda tensor: tensor[1:]):
            if data + start < end or start % alignment:
                raise ValueError(f"{name} is not at a place of its own")
            end = data + start + length
            if end > self.size:
                raise ValueError(f"{name} ends at byte {end:,} of {self.size:,}")
        return [(name, data + start, length) for name, start, length in tensors]

    def tensor(self) -> tuple[str, int, int]:
        """Name, offset and bytes of a tensor."""
        import gguf

        name, count = self.string(_MAX_NAME).decode(), self.number(4)
        if count > _MAX_DIMENSIONS:
            raise ValueError(f"{name} has {count} dimensions")
        shape, kind, start = [self.number(8) for _ in range(count)], self.number(4), self.number(8)
        numbers, stored = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        return name, start, math.prod(shape) // numbers * stored

    def skip(self, kind: int, depth: int = 0) -> None:
        """Pass over a value of a type."""
        if kind == STRING:
            self.string(self.size)
        elif kind == LIST and not depth:
            inner, count = self.number(4), self.number(8)
            self.elements += 0 if inner in _SCALARS and count > LONG else count
            if self.elements > _MAX_ELEMENTS:
                raise ValueError(f"its metadata announces lists of {self.elements:,} values, as no network has")
            if inner in _SCALARS:
                self.pass_over(count * _SCALARS[inner])
            else:
                for _ in range(count):
                    self.skip(inner, depth + 1)
        elif kind in _SCALARS:
            self.pass_over(_SCALARS[kind])
        else:
            raise ValueError(f"metadata of type {kind}")

    def plausible(self, count: int, least: int) -> int:
        """`count`, of things that take at least `least` bytes each, if the file has room for them."""
        if count * least > self.size:
            raise ValueError(f"it announces {count:,} entries in {self.size:,} bytes")
        return count

    def string(self, limit: int) -> bytes:
        length = self.number(8)
        if length > limit:
            raise ValueError(f"a name of {length:,} bytes")
        return self.take(length)

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def take(self, size: int) -> bytes:
        found = self.file.read(size) if size <= self.size else b""
        if len(found) < size:
            raise ValueError("it ends inside its header")
        return found

    def pass_over(self, size: int) -> None:
        if self.file.tell() + size > self.size:
            raise ValueError("it ends inside its header")
        self.file.seek(size, os.SEEK_CUR)
