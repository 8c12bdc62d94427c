"""Files of tensors, safetensors or GGUF alike: what is in one, and its rows as numbers.

What a file is, its first bytes tell, never its name. GGUF needs the `gguf` package, which also says what its blocks of
quantised numbers mean.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError
from .safetensors_io import Header, read_header, read_metadata, read_places

GGUF_MAGIC = b"GGUF"
# Where converters put the shape of a tensor that GGUF's four dimensions cannot say.
_ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
# Stored as they are; every other type is blocks of quantised numbers.
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


class TensorFile(Protocol):
    """header: name -> (dtype, shape) of what `rows` returns. metadata: the file's own remarks."""

    header: Header
    metadata: dict[str, str]

    def rows(self, name: str, start: int = 0, stop: int | None = None, buffer: Tensor | None = None) -> Tensor:
        """Rows of a tensor on the CPU, in the header's dtype. buffer [bytes] uint8: where they may be put, as fresh
        memory costs more than reading into it. Raises CheckpointError where the file cannot be read."""


def open_file(path: Path) -> TensorFile:
    """The file at `path` by its headers. Raises CheckpointError for what is neither safetensors nor GGUF, or broken."""
    return GgufFile(path) if is_gguf(path) else SafetensorsFile(path)


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF does."""
    try:
        with open(path, "rb") as file:
            return file.read(len(GGUF_MAGIC)) == GGUF_MAGIC
    except OSError:
        return False


class SafetensorsFile:
    """A safetensors file, read rather than mapped: page after page is slower than a disk. Threads may share it."""

    def __init__(self, path: Path) -> None:
        self.path, self.header, self.metadata = path, read_header(path), read_metadata(path)
        self._places = read_places(path)

    def rows(self, name: str, start: int = 0, stop: int | None = None, buffer: Tensor | None = None) -> Tensor:
        dtype, shape = self.header[name]
        first, last, _ = slice(start, stop).indices(shape[0]) if shape else (0, 1, 1)
        width = math.prod(shape[1:]) * dtype.itemsize
        size = max(0, last - first) * width
        if buffer is None or len(buffer) < size:
            buffer = torch.empty(size, dtype=torch.uint8)
        out = buffer[:size].view(dtype).view((max(0, last - first), *shape[1:]) if shape else ())
        room = memoryview(buffer[:size].numpy())
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self._places[name] + first * width)
                while room:
                    count = file.readinto(room)
                    if not count:
                        raise CheckpointError(f"{self.path} became shorter while it was read; download it again")
                    room = room[count:]
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read ({error}); download it again") from error
        return out


class GgufFile:
    """A GGUF file, memory-mapped. Quantised tensors are fp32 here, dequantised row by row as they are asked for."""

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError as error:
            raise CheckpointError(f"{path} is a GGUF file, which needs a package; run: pip install gguf") from error
        self.path, self._gguf = path, gguf
        try:
            self._reader = gguf.GGUFReader(path)
            self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
            for kind in {tensor.tensor_type for tensor in self._tensors.values()}:
                self._require(kind)
            self.metadata = {
                name: value
                for name, field in self._reader.fields.items()
                if isinstance(value := field.contents(), str) and not name.startswith(_ORIGINAL_SHAPE)
            }
            self.header = {name: self._entry(tensor) for name, tensor in self._tensors.items()}
        except CheckpointError:
            raise
        except AttributeError as error:
            raise CheckpointError(f"{path} needs a newer gguf package; run: pip install -U gguf") from error
        except (OSError, ValueError, LookupError, TypeError, OverflowError) as error:
            reason = " ".join(str(error).split())[:100]
            raise CheckpointError(
                f"{path} is a truncated or corrupt GGUF file ({reason}); download it again"
            ) from error

    def _entry(self, tensor: Any) -> tuple[torch.dtype, tuple[int, ...]]:
        # GGUF counts dimensions from the innermost.
        shape = tuple(int(side) for side in reversed(tensor.shape))
        field = self._reader.fields.get(_ORIGINAL_SHAPE + tensor.name)
        if field is not None:
            original = tuple(int(side) for side in field.contents())
            if math.prod(original) != math.prod(shape):
                raise CheckpointError(f"{self.path} has a corrupt shape for {tensor.name}; download it again")
            shape = original
        return _PLAIN.get(tensor.tensor_type.name, torch.float32), shape

    def _require(self, kind: Any) -> None:
        try:
            block = np.zeros((1, self._gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
            _ = kind.name in _PLAIN or self._gguf.dequantize(block, kind)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.path} holds tensors of type {kind.name}, which this gguf package cannot read; update it: "
                "pip install -U gguf"
            ) from error

    def rows(self, name: str, start: int = 0, stop: int | None = None, buffer: Tensor | None = None) -> Tensor:
        tensor, (dtype, shape) = self._tensors[name], self.header[name]
        data = tensor.data
        whole = data.shape[:1] != shape[:1]
        data = data if whole else data[start:stop]
        kind = tensor.tensor_type.name
        if kind == "BF16":
            out = torch.from_numpy(data.copy()).view(dtype)
        elif kind in _PLAIN:
            out = torch.from_numpy(data.copy())
        else:
            out = torch.from_numpy(self._gguf.dequantize(data, tensor.tensor_type))
        # Without columns of their own rows cannot be told before the shape is put back.
        return out.reshape(shape)[start:stop] if whole else out.reshape(-1, *shape[1:])
