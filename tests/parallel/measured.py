"""Ranks that serve as always and tell rank 0 how many bytes of tensors they hold after each pass."""

from __future__ import annotations

import gc
from typing import Any

import torch

from longcat_core.parallel.group import Group
from longcat_core.parallel.mirror import Follower
from longcat_core.parallel.mirror import serve as serve_passes

# For `start(devices, MEASURED)`.
MEASURED = __name__


def serve(group: Group) -> None:
    evaluate = Follower.evaluate

    def measured(self: Follower, message: Any) -> None:
        evaluate(self, message)
        group._store.set(_key(group.rank), str(_held()))

    Follower.evaluate = measured  # type: ignore[method-assign]
    serve_passes(group)


def _key(rank: int) -> str:
    return f"bytes of rank {rank}"


def _held() -> int:
    gc.collect()
    storages = [x.untyped_storage() for x in gc.get_objects() if issubclass(type(x), torch.Tensor) and not x.is_meta]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def held(group: Group, rank: int) -> int:
    """What another rank held after a pass since the last call; waits for it."""
    found = int(group._store.get(_key(rank)))
    group._store.delete_key(_key(rank))
    return found
