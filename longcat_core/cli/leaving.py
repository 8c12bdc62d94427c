"""The end of a command's process."""

from __future__ import annotations

import atexit
import os
import sys


def leave_at_once() -> list[int]:
    """Let this process end without taking down thousands of modules one by one, which takes up to a second.

    To be called before anything else, so that it comes last. The exit code is to be put into the list that this
    returns; without one the process ends as usual.
    """
    codes: list[int] = []
    atexit.register(_leave, codes)
    return codes


def _leave(codes: list[int]) -> None:
    try:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
    except (OSError, ValueError):
        # Python says so as it ends.
        return
    if codes:
        os._exit(codes[0])
