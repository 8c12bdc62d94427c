"""The command `longcat`, also as `python -m longcat_core`."""

from __future__ import annotations

import sys

from .cli.leaving import leave_at_once


def run() -> int:
    """Run the command with the program's arguments; the exit code. To be called once, as the whole program."""
    codes = leave_at_once()
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


if __name__ == "__main__":
    sys.exit(run())
