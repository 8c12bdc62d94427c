"""Run the matrix: python -m tests.gpu.matrix [--device cpu] [--first] [--seconds N] [--output build/gpu]."""

from __future__ import annotations

import argparse
import json
import queue
import sys
import tempfile
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from ..comfyui.server import PACK, Installation
from . import fleet, graphs
from .cells import CPU, MODES, Cell, first_cells
from .fleet import Booted
from .verdicts import WRONG, judge


def say(text: str) -> None:
    print(text, flush=True)


class References:
    """The CPU's video of each prompt, computed once, by a server of its own."""

    def __init__(self, booted: Booted) -> None:
        self.booted, self.found, self.lock = booted, {}, threading.Lock()
        self.pool = ThreadPoolExecutor(1)

    def of(self, cell: Cell) -> Future:
        key = (cell.weights, cell.sampler, cell.extra, cell.task)
        with self.lock:
            if key not in self.found:
                number = len(self.found)
                prompt = graphs.nano(cell, graphs.BF16, f"reference-{number}")
                self.found[key] = self.pool.submit(self.booted.run, prompt)
            return self.found[key]


def run(cells: list[Cell], servers: dict[str, Booted], references: References, deadline: float, output: Path) -> bool:
    """Run every cell on the server of its mode, all modes side by side; whether no cell is wrong."""
    rows, lock = [], threading.Lock()
    finished: queue.Queue = queue.Queue()

    def serve(mode: str) -> None:
        for number, cell in enumerate(cells):
            if cell.mode == mode and time.monotonic() < deadline:
                finished.put((cell, servers[mode].run(graphs.nano(cell, graphs.BF16, f"cell-{number}"))))

    for cell in cells:
        references.of(cell)
    threads = [threading.Thread(target=serve, args=(mode,), daemon=True) for mode in servers]
    for thread in threads:
        thread.start()
    with (output / "matrix.jsonl").open("a", encoding="utf-8") as file:
        while any(thread.is_alive() for thread in threads) or not finished.empty():
            try:
                cell, seen = finished.get(timeout=0.2)
            except queue.Empty:
                continue
            verdict = judge(cell, seen, references.of(cell).result())
            with lock:
                rows.append(verdict)
            file.write(json.dumps(asdict(cell) | asdict(verdict) | {"seconds": seen.seconds}) + "\n")
            file.flush()
            db = "" if verdict.psnr is None else f" {verdict.psnr:.1f} dB"
            say(f"{verdict.verdict:7} {seen.seconds:6.1f} s{db} {cell.name} {verdict.said}")
    return bool(rows) and not any(row.verdict == WRONG for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--first", action="store_true", help="only the plainest cells, 12 on a GPU")
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--output", type=Path, default=PACK / "build" / "gpu")
    arguments = parser.parse_args()
    started = time.monotonic()
    arguments.output.mkdir(parents=True, exist_ok=True)
    installation = Installation.find()
    modes, total = (CPU,), 0
    if arguments.device == "cuda":
        import torch

        modes, total = MODES, torch.cuda.get_device_properties(0).total_memory
    with tempfile.TemporaryDirectory() as folder:
        servers = fleet.make(modes, installation, Path(folder), total)
        reference = fleet.make((CPU,), installation, Path(folder) / "reference", total)[CPU]
        try:
            good = run(list(first_cells(modes)), servers, References(reference), started + arguments.seconds,
                       arguments.output)  # fmt: skip
        finally:
            for booted in (*servers.values(), reference):
                booted.drop()
            for name, booted in {**servers, "reference": reference}.items():
                log = booted.server.log_path
                if log.exists():
                    name = name.strip("-").replace(" ", "-")
                    (arguments.output / f"{name}.log").write_bytes(log.read_bytes())
                booted.server.remove()
    say(f"{'no cell is wrong' if good else 'WRONG'}, {time.monotonic() - started:.0f} s")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
