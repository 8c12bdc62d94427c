"""Files of tensors, safetensors or GGUF: their headers, and their rows as numbers.

The first bytes of a file decide its format, never its name. GGUF needs the `gguf` package, which also dequantizes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError
from .gguf_header import check_header
from .gguf_lists import open_reader, values
from .regular import check_regular
from .safetensors_io import Header, SafetensorsFile, stamp

GGUF_MAGIC = b"GGUF"
# Metadata in which converters keep the shape of a tensor that has more than GGUF's four dimensions.
_ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
# Stored as plain numbers; every other type is blocks of quantized numbers.
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


class TensorFile(Protocol):
    """An opened file. header: name -> (dtype, shape) of what `rows` returns. metadata: the file's free-form strings."""

    header: Header
    metadata: dict[str, str]

    def rows(self, name: str, start: int = 0, stop: int | None = None, buffer: Tensor | None = None) -> Tensor:
        """Rows of a tensor on the CPU, in the header's dtype. buffer [bytes] uint8: memory to reuse for them, because
        new memory costs more than reading. Raises CheckpointError if the file cannot be read, or holds other tensors
        than when it was opened."""


def open_file(path: Path) -> TensorFile:
    """Open the file at `path` and parse its header. Raises CheckpointError unless it is whole safetensors or GGUF."""
    check_regular(path, error=CheckpointError)
    return GgufFile(path) if is_gguf(path) else SafetensorsFile(path)


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF does."""
    try:
        with open(path, "rb") as file:
            return file.read(len(GGUF_MAGIC)) == GGUF_MAGIC
    except OSError:
        return False


class HeldTensors:
    """Tensors that another program has in memory, as if they lay in a file."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.header: Header = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        self.metadata: dict[str, str] = {}

    def rows(self, name: str, start: int = 0, stop: int | None = None, buffer: Tensor | None = None) -> Tensor:
        tensor = self._tensors[name].detach()
        return (tensor[start:stop] if tensor.ndim else tensor).cpu()


class GgufFile:
    """A GGUF file, memory-mapped. Quantized tensors count as fp32; their rows are dequantized when they are read."""

    def __init__(self, path: Path) -> None:
        self._open(path)

    def _open(self, path: Path) -> None:
        try:
            import gguf
        except ImportError as error:
            raise CheckpointError(f"{path} is a GGUF file, which needs a package; run: pip install gguf") from error
        self.path, self._gguf = path, gguf
        try:
            self._stamp = stamp(path.stat())
            check_header(path)
            self._reader = open_reader(gguf, path)
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

    def values(self, name: str) -> list[Any]:
        """A list in the file's metadata, [] without it. Raises CheckpointError for text that is not UTF-8."""
        self._check_same()
        field = self._reader.fields.get(name)
        try:
            return [] if field is None else values(field)
        except ValueError as error:
            raise CheckpointError(f"{self.path} has a corrupt {name} ({error}); download it again") from error

    def flag(self, name: str, default: bool) -> bool:
        """A truth value in the file's metadata, `default` without it."""
        self._check_same()
        field = self._reader.fields.get(name)
        found = None if field is None else field.contents()
        return found if isinstance(found, bool) else default

    def _entry(self, tensor: Any) -> tuple[torch.dtype, tuple[int, ...]]:
        # GGUF counts dimensions from the innermost.
        shape = tuple(int(side) for side in reversed(tensor.shape))
        field = self._reader.fields.get(_ORIGINAL_SHAPE + tensor.name)
        if field is not None:
            sides = field.contents()
            whole = isinstance(sides, list) and all(isinstance(side, int) and side >= 0 for side in sides)
            original = tuple(sides) if whole else ()
            if not original or math.prod(original) != math.prod(shape):
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

    def _check_same(self) -> None:
        # Reading the mapping of a truncated file would kill the process.
        try:
            now = stamp(self.path.stat())
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read ({error}); download it again") from error
        if now != self._stamp:
            header = self.header
            self._open(self.path)
            if header != self.header:
                raise CheckpointError(f"{self.path} holds other tensors than when it was opened; load it again")

    def rows(self, name: str, start: int = 0, stop: int | None = None, buffer: Tensor | None = None) -> Tensor:
        self._check_same()
        tensor, (dtype, shape) = self._tensors[name], self.header[name]
        whole = tensor.data.shape[:1] != shape[:1]
        data = tensor.data if whole else tensor.data[start:stop]
        if tensor.tensor_type.name in _PLAIN:
            out = torch.from_numpy(data.copy()).view(dtype)
        else:
            out = torch.from_numpy(self._gguf.dequantize(data, tensor.tensor_type))
        # Rows without columns of their own can be cut only after the shape is restored.
        return out.reshape(shape)[start:stop] if whole else out.reshape(-1, *shape[1:])
