"""What torchrun says to the processes that it starts; imports nothing heavy."""

from __future__ import annotations

import os


def torchrun_size() -> int:
    """The number of processes that torchrun started together with this one; 0 without torchrun or if it is alone."""
    size = os.environ.get("WORLD_SIZE", "") if {"RANK", "LOCAL_RANK"} <= os.environ.keys() else ""
    return int(size) if size.isdecimal() and int(size) > 1 else 0


def torchrun_rank() -> int:
    """Of this process; 0 without torchrun."""
    return int(os.environ["RANK"]) if torchrun_size() else 0
