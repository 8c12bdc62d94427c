"""Which file a LoRA's tensors were read from, and the map that LongCat-Video's LoRAs are read with."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Files of LoRAs by the id of their first tensor, while it lives.
_FILES: dict[int, tuple[weakref.ref, Path]] = {}


class KeyMap(dict):
    """ComfyUI's map from LoRA names to weights, for LongCat-Video. shapes: of the weights, by the network's names."""

    shapes: dict[str, torch.Size]


def remember(tensors: Any, path: Any) -> None:
    """Keep in mind which file a LoRA's tensors were read from."""
    if not isinstance(tensors, dict) or not isinstance(path, str | os.PathLike) or not _is_lora(tensors):
        return
    first = next(tensor for tensor in tensors.values() if isinstance(tensor, Tensor))
    key = id(first)
    _FILES[key] = weakref.ref(first, lambda gone: _FILES.pop(key, None)), Path(path)


def _is_lora(tensors: Mapping[Any, Any]) -> bool:
    from ..longcat_core.checkpoints.lora_names import split_key

    keys = (key for key, tensor in tensors.items() if isinstance(key, str) and isinstance(tensor, Tensor))
    return any(split_key(key) is not None for key in keys)


def file_of(tensors: Iterable[Tensor]) -> Path | None:
    """The file that these tensors were read from; None if they were made in another way."""
    from ..longcat_core.files.weight_files import SUFFIXES

    for tensor in tensors:
        reference, path = _FILES.get(id(tensor), (None, None))
        if reference is not None and reference() is tensor and path is not None and path.suffix.lower() in SUFFIXES:
            return path if path.is_file() else None
    return None
