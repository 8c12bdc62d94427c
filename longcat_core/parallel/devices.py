"""Which devices a group works on, checked before anything is started."""

from __future__ import annotations

import os
from typing import Literal

import torch

from ..errors import LongCatError, is_whole
from .torchrun import torchrun_size

# More processes on one CPU than this are a mistake.
MOST = 64
AUTO = "auto"
Gpus = int | Literal["auto"] | None


def devices_of(gpus: Gpus, device: torch.device) -> tuple[torch.device, ...]:
    """The device of each rank. One device: no group is needed.

    gpus: how many; "auto": all that are like `device`; None: one, or those of torchrun. device: that of rank 0, which
    comes first. On a CPU as many processes share it, for trying things out. Raises LongCatError for GPUs that are not
    there or differ.
    """
    if gpus is not None and gpus != AUTO and not (is_whole(gpus) and 1 <= int(gpus) <= MOST):
        raise LongCatError(f"gpus cannot be {gpus!r}; give a number from 1 to {MOST}, or auto")
    if gpus == 1:
        return (device,)
    if size := torchrun_size():
        if gpus not in (None, AUTO, size):
            raise LongCatError(f"{gpus} GPUs were asked for, but torchrun started {size} processes; leave --gpus out")
        return _of_torchrun(size, device)
    if device.type == "cpu":
        return (device,) * (1 if gpus in (None, AUTO) else int(gpus))
    if gpus is None:
        return (device,)
    if device.type != "cuda":
        raise LongCatError(f"several GPUs must be those of CUDA or ROCm, not {device.type}; leave out --gpus")
    there = torch.cuda.device_count()
    first = device.index or 0
    others = [at for at in range(there) if at != first]
    if gpus == AUTO:
        others = [at for at in others if _card(at) == _card(first)]
    elif int(gpus) > there:
        hidden = " (CUDA_VISIBLE_DEVICES hides the others)" if "CUDA_VISIBLE_DEVICES" in os.environ else ""
        raise LongCatError(f"{gpus} GPUs were asked for, but PyTorch sees {there}{hidden}; give --gpus {there} or auto")
    else:
        others = others[: int(gpus) - 1]
    for at in others:
        if _card(at) != _card(first):
            raise LongCatError(
                f"GPU {first} is {_in_words(first)} and GPU {at} {_in_words(at)}, but all must be alike; give --gpus "
                "auto, or choose them with CUDA_VISIBLE_DEVICES"
            )
    return tuple(torch.device("cuda", at) for at in (first, *others))


def _of_torchrun(size: int, device: torch.device) -> tuple[torch.device, ...]:
    if device.type == "cpu":
        return (device,) * size
    # As many on every host.
    local = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if device.type == "cuda" and local > torch.cuda.device_count():
        raise LongCatError(
            f"torchrun started {local} processes on a host where PyTorch sees {torch.cuda.device_count()} GPUs; give "
            f"--nproc-per-node {torch.cuda.device_count()}"
        )
    return tuple(torch.device(device.type, rank % local) for rank in range(size))


def _card(at: int) -> tuple[str, int]:
    properties = torch.cuda.get_device_properties(at)
    return properties.name, properties.total_memory


def _in_words(at: int) -> str:
    name, memory = _card(at)
    return f"{name} with {memory / 2**30:.1f} GiB"
