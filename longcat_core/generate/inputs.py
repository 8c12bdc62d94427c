"""Checks of types: what a script hands in is refused with a sentence before anything is loaded or computed."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.lora import Lora
from ..errors import LongCatError, check_type, is_number, is_whole

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_whole(name: str, value: object) -> None:
    """Raise LongCatError unless `value` is an integer; True and False are not."""
    if not is_whole(value):
        raise LongCatError(f"{name} cannot be {value!r}; give a whole number")


def check_callback(callback: object, name: str = "the callback") -> None:
    """Raise LongCatError unless `callback` is None or can be called."""
    if callback is not None and not callable(callback):
        raise LongCatError(f"{name} cannot be of type {type(callback).__name__}; give a function")


def check_json(name: str, value: object) -> None:
    """Raise LongCatError unless `value` is a dict that JSON can hold."""
    check_type(name, value, dict, "a dict of JSON values")
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise LongCatError(f"{name} holds what JSON cannot hold ({error}); give text, numbers and lists") from error


def check_tensor(name: str, tensor: object, shape: tuple[int | None, ...]) -> None:
    """Raise LongCatError unless `tensor` is a finite floating-point tensor of this shape; None: any size."""
    wanted = f"a floating-point tensor [{', '.join('any' if size is None else str(size) for size in shape)}]"
    check_type(name, tensor, Tensor, wanted)
    assert isinstance(tensor, Tensor)
    fits = len(tensor.shape) == len(shape) and all(
        size == want or (want is None and size) for size, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits or not tensor.is_floating_point():
        raise LongCatError(f"{name} cannot be {tensor.dtype} {list(tensor.shape)}; give {wanted}")
    if not tensor.isfinite().all():
        raise LongCatError(f"{name} cannot have NaN or infinite values; give finite ones")


def dtype_of(dtype: object) -> torch.dtype:
    """A dtype that models run in, from itself or its name. Raises LongCatError for any other."""
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or found not in DTYPES.values():
        raise LongCatError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    return found


def device_of(device: Any) -> torch.device:
    """A device from itself or its name. Raises LongCatError for an unknown one, or one that this machine lacks."""
    check_type("the device", device, (str, torch.device), "cpu, cuda or cuda:N")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise LongCatError(f"unknown device {device!r}; choose cpu, cuda or cuda:N") from None
    if found.type not in ("cpu", "cuda"):
        raise LongCatError(f"device {str(found)!r} is not supported; choose cpu, cuda or cuda:N")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise LongCatError(f"device {str(found)!r} is missing: PyTorch sees no GPU; use cpu")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise LongCatError(f"device {str(found)!r} is missing: PyTorch sees {count} GPUs; use a lower number or cpu")
    return found


def loras_of(lora: str | Path | Sequence[Lora] | None) -> list[Lora]:
    """Pairs of file and strength from one file, pairs, or None. Raises LongCatError for anything else."""
    if lora is None:
        return []
    if isinstance(lora, str | os.PathLike):
        return [(lora, 1.0)]
    check_type("lora", lora, (list, tuple), "a path, or a list of (path, strength)")
    for pair in lora:
        if not _is_lora(pair):
            raise LongCatError(
                f"LoRA {pair!r} is not a pair of path and strength; give pairs such as ('style.safetensors', 0.8)"
            )
    return [(path, float(strength)) for path, strength in lora]


def _is_lora(pair: Any) -> bool:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        return False
    path, strength = pair
    return isinstance(path, str | os.PathLike) and is_number(strength)
