"""`make test-gpu`: python -m tests.gpu [tests] [nodes] [matrix] [--device cpu] [--output build/gpu] ..."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from ..comfyui.server import PACK
from . import matrix, suites

MATRIX = "matrix"
PARTS = (suites.TESTS, suites.NODES, MATRIX)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu")
    parser.add_argument("parts", nargs="*", default=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, default=PACK / "build" / "gpu")
    parser.add_argument("--seconds", type=float, default=900, help="begin nothing new after so long")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="files of tests side by side")
    parser.add_argument("--first", action="store_true", help="of the matrix, only the plainest cells")
    parser.add_argument("--only", action="append", default=[], help="of the matrix, rows with this in their name")
    parser.add_argument("--every", type=int, default=1, help="of the matrix, each so many-th row")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    deadline = time.monotonic() + arguments.seconds
    arguments.output.mkdir(parents=True, exist_ok=True)
    good = True
    for part in arguments.parts:
        if part in (suites.TESTS, suites.NODES):
            good &= suites.main(part, arguments.device, arguments.processes, deadline, arguments.output)
        else:
            choice = {"first": arguments.first, "only": arguments.only, "every": arguments.every}
            good &= matrix.main(arguments.device, deadline, arguments.output, "", **choice)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
