"""A worker: the process of a rank other than 0, from joining to its end."""

from __future__ import annotations

import json
import signal
import traceback
import warnings
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist

from ..errors import LongCatError
from .group import TIMEOUT, is_communication
from .lifeline import Line, from_json, leave
from .start import RANKS, SETUP, UNTIL_NEEDED, joins, torchrun_store
from .torchrun import torchrun_rank

OUT_OF_MEMORY = "out of memory; use more GPUs, give a smaller size or fewer frames, or free the memory of this one"


def work(setup: Mapping[str, Any]) -> None:
    """Serve the rank 0 that started this process and describes the group in `setup`; then end this process."""
    line = Line(from_json(setup["address"]), setup["rank"])
    host, port = setup["store"]
    _serve(line, setup["rank"], setup, dist.TCPStore(host, port, None, False, TIMEOUT, False))


def join() -> None:
    """Serve rank 0 as a process of torchrun, once it needs a group; then end this process."""
    store = torchrun_store()
    store.wait([SETUP], UNTIL_NEEDED)
    setup = json.loads(store.get(SETUP))
    if setup is None:
        return
    rank = torchrun_rank()
    line = Line(from_json(setup["address"]), rank)
    # From now on rank 0 ends this process, also if a signal came to all.
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    _serve(line, rank, setup, dist.PrefixStore(RANKS, store))


def _serve(line: Line, rank: int, setup: Mapping[str, Any], store: dist.Store) -> None:
    # Rank 0 gives the same ones.
    warnings.simplefilter("ignore")
    try:
        group = joins(rank, line, setup, store)
        import_module(setup["serve"], __package__).serve(group)
        group.end()
    except BaseException as error:
        if not isinstance(error, LongCatError | torch.OutOfMemoryError) and not is_communication(error):
            traceback.print_exc()
        line.report(in_words(error), is_communication(error))
        leave(1)
    leave()


def in_words(error: BaseException) -> str:
    """What a rank failed of, for a user."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return OUT_OF_MEMORY
    return str(error) if isinstance(error, LongCatError) else f"{type(error).__name__}: {error}"
