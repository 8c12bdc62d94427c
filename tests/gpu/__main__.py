"""`make test-gpu`: python -m tests.gpu [tests] [nodes] [matrix] [--device cpu] [--output build/gpu] ..."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from ..comfyui.server import PACK
from . import suites

PARTS = (suites.TESTS, suites.NODES, "matrix")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu")
    parser.add_argument("parts", nargs="*", default=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, default=PACK / "build" / "gpu")
    parser.add_argument("--seconds", type=float, default=900, help="begin nothing new after so long")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="files of tests side by side")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    deadline = time.monotonic() + arguments.seconds
    arguments.output.mkdir(parents=True, exist_ok=True)
    good = True
    for part in arguments.parts:
        if part in (suites.TESTS, suites.NODES):
            good &= suites.main(part, arguments.device, arguments.processes, deadline, arguments.output)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
