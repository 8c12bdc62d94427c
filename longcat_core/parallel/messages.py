"""Python objects on their way from rank 0 to the workers.

They are pickled, by a process that the user started for one that it started itself, over an authenticated connection.
Tensors are taken out and travel by themselves. Files are never read this way.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch import Tensor, nn

CORE = "longcat_core"
# What this process calls the package: inside ComfyUI the pack has a name of its own.
OWN = __name__.removesuffix(".parallel.messages")
# Of other packages; a message may hold anything of this package and of PyTorch.
OTHERS = {
    "builtins": ("complex", "frozenset", "range", "set", "slice"),
    "collections": ("OrderedDict", "defaultdict", "deque"),
    "functools": ("partial",),
    "pathlib": ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath"),
}


def packed(message: object) -> tuple[bytes, list[Tensor]]:
    """The message as bytes and its tensors, each once. It may hold objects of this package, of PyTorch and of Python's
    own types."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(message)
    return file.getvalue(), pickler.tensors


def unpacked(data: bytes, device: torch.device | None = None) -> tuple[Any, list[Tensor]]:
    """What `packed` turned into bytes, perhaps where this package has another name, and its tensors, which lie on
    `device` and are to be filled."""
    unpickler = _Unpickler(data, device)
    return unpickler.load(), unpickler.tensors


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self._places: dict[int, int] = {}

    def persistent_id(self, thing: object) -> tuple[int, bool, torch.Size, torch.dtype] | None:
        if not isinstance(thing, Tensor):
            return None
        if id(thing) not in self._places:
            self._places[id(thing)] = len(self.tensors)
            self.tensors.append(thing)
        return self._places[id(thing)], isinstance(thing, nn.Parameter), thing.shape, thing.dtype


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, device: torch.device | None) -> None:
        super().__init__(io.BytesIO(data))
        self._device = device
        self.tensors: list[Tensor] = []

    def persistent_load(self, place: tuple[int, bool, torch.Size, torch.dtype]) -> Tensor:
        at, is_parameter, shape, dtype = place
        # They come in order, and some again.
        if at == len(self.tensors):
            tensor = torch.empty(shape, dtype=dtype, device=self._device)
            self.tensors.append(nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)
        return self.tensors[at]

    def find_class(self, module: str, name: str) -> Any:
        parts = module.split(".")
        if CORE in parts:
            module = ".".join((OWN, *parts[parts.index(CORE) + 1 :]))
        elif parts[0] != "torch" and name not in OTHERS.get(module, ()):
            raise pickle.UnpicklingError(f"a message between ranks cannot hold {module}.{name}")
        return super().find_class(module, name)
