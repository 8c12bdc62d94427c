"""What all ranks of the tests of this folder do, rank 0 by calling it and the others by its name."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from longcat_core.errors import LongCatError
from longcat_core.parallel.bandwidth import Bandwidth
from longcat_core.parallel.division import Division
from longcat_core.parallel.group import Group


def do(group: Group, function: Any, *arguments: object) -> Any:
    """The result of `function(group, *arguments)` in rank 0, while all others call it too."""
    with group.working():
        group.send((f"{function.__module__}.{function.__name__}", *arguments))
        return function(group, *arguments)


def sum_of_shares(group: Group, values: list[float]) -> Tensor:
    """The given values of rank 0 times 1 + 2 + ... size, each rank's share from a broadcast."""
    tensor = group.broadcast(torch.tensor(values if group.rank == 0 else [0.0] * len(values)))
    tensor = tensor * (group.rank + 1)
    dist.all_reduce(tensor)
    return tensor


def described(group: Group, message: object) -> list[str]:
    """What each rank received, as text."""
    texts: list[Any] = [None] * group.size
    dist.all_gather_object(texts, f"{message!r} {torch.get_num_threads()}")
    return texts


def tensors_of(group: Group, message: dict[str, Any]) -> list[str]:
    """The tensors that each rank received, as text, and whether the message's layer has its weight once."""
    texts: list[Any] = [None] * group.size
    same = "same" if message["layer"].weight is message["again"] else "another"
    values = [*message["layer"].state_dict().values(), *(v for v in message.values() if isinstance(v, Tensor))]
    text = ", ".join(f"{value.dtype} {list(value.shape)} {value.detach().float().tolist()}" for value in values)
    dist.all_gather_object(texts, f"{same} {type(message['again']).__name__} {text}")
    return texts


def fails(group: Group, rank: int, how: str) -> None:
    """All ranks wait for each other, but `rank` fails."""
    if group.rank == rank:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise LongCatError("the model does not fit; give --fp8")
    dist.barrier()


def waits(group: Group) -> None:
    """Rank 0 waits for the others, which wait for nothing."""
    if group.rank == 0:
        print("waiting", flush=True)
        dist.barrier()
    time.sleep(600)


def process_of(group: Group) -> list[int]:
    """The id of each rank's process."""
    processes: list[Any] = [None] * group.size
    dist.all_gather_object(processes, os.getpid())
    return processes


def bandwidths(group: Group) -> list[Mapping[int, Bandwidth]]:
    """What each rank takes for the bandwidths."""
    found: list[Any] = [None] * group.size
    dist.all_gather_object(found, Division.of(group).links())
    return found


def written(group: Group, length: int) -> list[list[float]]:
    """What each rank wrote into rank 0's window: its number from 1 on, `length` times."""
    windows = Division.of(group).windows[group.size]
    places = windows.of("test", (group.size, length), torch.float32)
    for place in places:
        place[group.rank] = 1 + group.rank
    windows.arrived()
    found: list[list[float]] = places[group.rank].tolist()
    return found


def released(group: Group) -> None:
    Division.of(group).release()


def has_windows(group: Group) -> bool:
    return bool(Division.of(group).windows)


def chosen(group: Group, written: Mapping[int, float]) -> list[tuple[list[int], Mapping[int, Bandwidth]]]:
    """The windows that each rank keeps and what it takes for the bandwidths, if messages move 100 bytes per second and
    ranks write this many, by their number."""

    def measured(device: object, size: int, tokens: object, windows: object) -> Bandwidth:
        return Bandwidth(100.0, 1.0, 1.0, written[size] if windows else 0.0)

    with patch("longcat_core.parallel.division.measured", measured):
        division = Division(group)
        division.choose()
    found: list[Any] = [None] * group.size
    dist.all_gather_object(found, (sorted(division.windows), division.links()))
    return found
