"""Long lists in a GGUF file's metadata, such as a vocabulary. Of a million values, the gguf package would make objects
that take half a minute and 750 MB."""

from __future__ import annotations

import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

# NumPy's names of GGUF's types of values; 8 is a string, 9 a list.
DTYPES = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
STRING, LIST = 8, 9
# Type of the values and their number, and the length of a string.
_HEAD, _LENGTH = struct.Struct("<IQ"), struct.Struct("<Q")
# Shorter lists are left to the package.
LONG = 64


def open_reader(gguf: ModuleType, path: Path) -> Any:
    """A `gguf.GGUFReader` that keeps long lists as bytes, which `values` reads."""

    class Reader(gguf.GGUFReader):  # type: ignore[name-defined]
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            kind, count = _HEAD.unpack_from(self.data, orig_offs) if raw_type == LIST else (STRING, 0)
            if count <= LONG or kind == LIST:
                return super()._get_field_parts(orig_offs, raw_type)
            end = orig_offs + _HEAD.size
            if kind == STRING:
                for _ in range(count):
                    end += _LENGTH.size + _LENGTH.unpack_from(self.data, end)[0]
            else:
                end += count * np.dtype(DTYPES[kind]).itemsize
            return end - orig_offs, [self.data[orig_offs:end]], [], [gguf.GGUFValueType.ARRAY]

    return Reader(path)


def values(field: Any) -> list[Any]:
    """The values of a list that the reader found; [] for a field of another kind. ValueError for broken text."""
    raw = field.parts[-1]
    if field.data or not field.types or field.types[0] != LIST or raw.dtype != np.uint8:
        found = field.contents()
        return found if isinstance(found, list) else []
    data = raw.tobytes()
    kind, count = _HEAD.unpack_from(data)
    if kind != STRING:
        return np.frombuffer(data, DTYPES[kind], count, _HEAD.size).tolist()
    found, end = [], _HEAD.size
    for _ in range(count):
        start = end + _LENGTH.size
        end = start + _LENGTH.unpack_from(data, end)[0]
        found.append(data[start:end].decode())
    return found
