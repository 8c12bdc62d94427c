"""A worker: the process of a rank other than 0, from joining to its end."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch

from ..errors import LongCatError
from .group import is_communication
from .lifeline import Line, from_json, leave
from .start import join_as

OUT_OF_MEMORY = "out of memory; use more GPUs, give a smaller size or fewer frames, or free the memory of this one"


def main(setup: Mapping[str, Any]) -> None:
    """Serve rank 0, which describes the group in `setup`, until it has enough; then end this process."""
    line = Line(from_json(setup["address"]), setup["rank"])
    try:
        group = join_as(setup["rank"], line, setup)
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
