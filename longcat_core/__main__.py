"""The command `longcat`, also as `python -m longcat_core`."""

from __future__ import annotations

import atexit
import os
import sys


def run() -> int:
    """Run the command with the program's arguments; the exit code. To be called once, as the whole program."""
    codes: list[int] = []
    # Before anything else is registered, so that it is called last.
    atexit.register(_leave, codes)
    # Inside ComfyUI the pack must not install anything, so an installation without extras has no packages.
    try:
        from .cli.main import main

        codes.append(main())
        return codes[0]
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("longcat_core"):
            raise
        print(
            f"longcat: error: the command needs the package {error.name}; run: pip install 'longcat-video[headless]'",
            file=sys.stderr,
        )
        return 2


def _leave(codes: list[int]) -> None:
    """End the process without taking down thousands of modules one by one, which takes a second after a video."""
    try:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
    except (OSError, ValueError):
        # Python says so as it ends.
        return
    if codes:
        os._exit(codes[0])


if __name__ == "__main__":
    sys.exit(run())
