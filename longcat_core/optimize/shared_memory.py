"""CPU memory that other processes of this machine map, so that several which stream the same weights hold them once.

It has no name in a file system: nothing is left of it however the processes end, and /dev/shm does not limit it.
"""

from __future__ import annotations

import mmap
import os
import secrets
import weakref
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .streaming import register


class Place(NamedTuple):
    """Where another process finds such memory. name: what it must find there; size: its bytes."""

    path: str
    name: str
    size: int


def can_share() -> bool:
    """Whether this system has such memory; Linux does."""
    return hasattr(os, "memfd_create")


def shared(size: int) -> tuple[Tensor, Place]:
    """`size` bytes like those of `streaming.pinned`, which other processes can map as long as they live here."""
    name = f"longcat-{secrets.token_hex(8)}"
    file = os.memfd_create(name)
    os.ftruncate(file, max(size, 1))
    buffer, memory = _mapped(file, size)
    weakref.finalize(memory, os.close, file)
    return buffer, Place(f"/proc/{os.getpid()}/fd/{file}", name, size)


def mapped(place: Place) -> Tensor:
    """The same bytes in another process, pinned there too. Raises OSError where they cannot be had, as on another
    machine."""
    if name_of(place.path) != place.name:
        raise FileNotFoundError(place.path)
    file = os.open(place.path, os.O_RDWR)
    try:
        return _mapped(file, place.size)[0]
    finally:
        os.close(file)


def name_of(path: str) -> str:
    """Of the memory behind an open file, or of another file behind it."""
    return os.readlink(path).removeprefix("/memfd:").removesuffix(" (deleted)")


def _mapped(file: int, size: int) -> tuple[Tensor, np.ndarray]:
    memory = np.frombuffer(mmap.mmap(file, max(size, 1)), dtype=np.uint8)
    buffer = torch.from_numpy(memory)[:size]
    register(memory, buffer)
    return buffer, memory
