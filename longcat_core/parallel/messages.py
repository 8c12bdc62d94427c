"""Small Python objects on their way from rank 0 to the workers.

They are pickled, by a process that the user started for one that it started itself, over an authenticated connection.
Files are never read this way.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

CORE = "longcat_core"
# What this process calls the package: inside ComfyUI the pack has a name of its own.
OWN = __name__.removesuffix(".parallel.messages")


def packed(message: object) -> bytes:
    """The message as bytes. It may hold Python's own types, and classes of this package and of PyTorch."""
    return pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)


def unpacked(data: bytes) -> Any:
    """The message that `packed` turned into bytes, perhaps where this package has another name."""
    return _Unpickler(io.BytesIO(data)).load()


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        parts = module.split(".")
        if CORE in parts:
            return super().find_class(".".join((OWN, *parts[parts.index(CORE) + 1 :])), name)
        found = super().find_class(module, name) if parts[0] in ("torch", "builtins", "pathlib") else None
        if found is None or (parts[0] == "builtins" and not isinstance(found, type)):
            raise pickle.UnpicklingError(f"a message between ranks cannot hold {module}.{name}")
        return found
