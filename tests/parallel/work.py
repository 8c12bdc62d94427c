"""What all ranks of the tests of this folder do, rank 0 by calling it and the others by its name."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

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
