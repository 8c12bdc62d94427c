"""`make test-gpu`: python -m tests.gpu [nodes] [tests] [matrix] [speed] [--device cpu] [--output build/gpu] ..."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from ..comfyui.server import PACK, Installation
from . import about, again, matrix, references, report, speed, suites
from .cells import MODES
from .limits import PACKAGES
from .matrix import Choice

MATRIX, SPEED = "matrix", "speed"
# In the order in which they run, one after another: each has the whole machine.
PARTS = (suites.NODES, suites.TESTS, MATRIX)
# Seconds that the matrix gets in any case.
KEPT_FOR_MATRIX = 320
KEPT = PACK / "docs" / report.KEPT


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu")
    parser.add_argument(
        "parts",
        nargs="*",
        default=list(PARTS),
        metavar="PART",
        help=f"of {', '.join(PARTS)}, or {SPEED}, which only measures",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, default=PACK / "build" / "gpu")
    parser.add_argument("--seconds", type=float, default=900, help="begin nothing new after so long")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="files of tests side by side")
    parser.add_argument("--first", action="store_true", help="of the matrix, only the plainest rows")
    parser.add_argument("--only", action="append", default=[], help="of the matrix, rows with this in their name")
    parser.add_argument("--every", type=int, default=1, help="of the matrix, each so many-th row")
    parser.add_argument(
        "--again", action="store_true", help="of what is in --output, only what failed, is wrong or lacks"
    )
    parser.add_argument("--keep", action="store_true", help="run nothing; make the report in --output that of docs")
    parser.add_argument("--references", action="store_true", help="run nothing; make the CPU's videos that are kept")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - {*PARTS, SPEED}:
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join((*PARTS, SPEED))}")
    return arguments


def find_comfyui() -> Installation:
    """ComfyUI and its Python; this Python if no other is named and the checkout has no environment of its own."""
    if not os.environ.get("COMFYUI_PYTHON"):
        path = Path(os.environ.get("COMFYUI_PATH") or Path.home() / "comfy" / "ComfyUI").expanduser().absolute()
        if not (path.parent / "venv").is_dir():
            os.environ["COMFYUI_PYTHON"] = sys.executable
    try:
        return Installation.find()
    except FileNotFoundError as error:
        raise SystemExit(f"make test-gpu: {error}") from error


def main() -> int:
    arguments = options()
    deadline = time.monotonic() + arguments.seconds
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.keep:
        KEPT.write_text(report.dump(report.gather(arguments.output)), encoding="utf-8")
        return 0
    if arguments.references:
        find_comfyui()
        return references.main(matrix.plan(MODES, PACKAGES, first=False))
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("make test-gpu: PyTorch sees no CUDA device; add --device cpu to try the command without one")
    # A run that is ended from outside still ends its servers and writes its report.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    machine = about.gather(device, find_comfyui(), arguments.output)
    if arguments.again:
        again.adopt(arguments.output, machine)

    def run(part: str) -> None:
        if part == MATRIX:
            choice = Choice(arguments.first, arguments.only, arguments.every)
            matrix.main(device, deadline, arguments.output, machine, choice)
        elif part == SPEED:
            speed.main(device, deadline, arguments.output, machine)
        else:
            beside = MATRIX in arguments.parts and not arguments.again
            until = deadline - (KEPT_FOR_MATRIX if beside else 0)
            kept = again.kept(arguments.output, part) if arguments.again else []
            suites.main(part, device.type, arguments.processes, until, arguments.output, machine["identity"], kept)

    try:
        parts = sorted(arguments.parts, key=(*PARTS, SPEED).index)
        # A few files and rows leave room for each other; figures of speed do not.
        together = [part for part in parts if part != SPEED] if arguments.again else []
        with ThreadPoolExecutor(max(1, len(together))) as pool:
            for ended in [pool.submit(run, part) for part in together]:
                ended.result()
        for part in parts:
            if part not in together:
                run(part)
    finally:
        about.write(machine, arguments.output)
        made = report.write(arguments.output)
    print(report.overview(made), flush=True)
    print(f"the report is in {arguments.output / 'report.md'}", flush=True)
    asked = {*arguments.parts} - {MATRIX, SPEED}
    return 0 if report.good(made, asked, MATRIX in arguments.parts) else 1


if __name__ == "__main__":
    sys.exit(main())
