"""Run the matrix: every row on the server of its VRAM mode, the CPU's videos beside, one line for each row."""

from __future__ import annotations

import json
import math
import os
import queue
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..comfyui.server import Installation
from . import cells, jobs, stock, weights
from .cells import CPU, MODES
from .fleet import Booted, Fleet
from .graphs import LORA_FILE, Prompt
from .jobs import Job
from .verdicts import WRONG, Verdict, judge

ROWS = "matrix.jsonl"
# Threads of each of the servers that compute the CPU's videos.
THREADS = 2


def say(text: str) -> None:
    print(text, flush=True)


class References:
    """The CPU's video of each key, computed once, by several servers."""

    def __init__(self, servers: Sequence[Booted]) -> None:
        self.free: queue.SimpleQueue[Booted] = queue.SimpleQueue()
        for server in servers:
            self.free.put(server)
        self.found: dict[tuple[str, ...], Future] = {}
        self.pool = ThreadPoolExecutor(len(servers))

    def of(self, job: Job) -> Future:
        if job.key not in self.found:
            self.found[job.key] = self.pool.submit(self._run, job.reference)
        return self.found[job.key]

    def _run(self, prompts: Sequence[Prompt]) -> Any:
        server = self.free.get()
        try:
            return server.run(prompts)
        finally:
            self.free.put(server)

    def stop(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)


def row(job: Job, verdict: Verdict, seconds: float) -> dict[str, Any]:
    """What the report keeps of a job."""
    psnr = None if verdict.psnr is None else "equal" if math.isinf(verdict.psnr) else round(verdict.psnr, 1)
    found = {"kind": job.kind, "name": job.name, "mode": job.mode, "verdict": verdict.verdict, "said": verdict.said}
    return found | {"psnr": psnr, "limit": job.limit, "seconds": round(seconds, 2), "nodes": job.nodes}


def done(output: Path, identity: str) -> dict[str, dict[str, Any]]:
    """Rows that earlier runs of the same tree on the same machine left, by name."""
    path, found = output / ROWS, {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            kept = json.loads(line)
            if kept["identity"] == identity:
                found[kept["name"]] = kept
    return found


def run(work: Sequence[Job], servers: dict[str, Booted], references: References, deadline: float) -> Iterator[tuple]:
    """(job, verdict, seconds) of every job that was begun before the deadline, all modes side by side."""
    finished: queue.SimpleQueue[tuple] = queue.SimpleQueue()
    for job in work:
        references.of(job)

    def serve(mode: str) -> None:
        for job in work:
            if job.mode == mode and time.monotonic() < deadline:
                seen = servers[mode].run(job.prompts)
                finished.put((job, judge(job, seen, references.of(job).result()), seen.seconds))

    threads = [threading.Thread(target=serve, args=(mode,), daemon=True) for mode in servers]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) or not finished.empty():
        try:
            yield finished.get(timeout=0.2)
        except queue.Empty:
            continue


def plan(modes: Sequence[str], *, first: bool, only: Sequence[str], every: int) -> list[Job]:
    """The jobs of a run. only: parts of names, of which one must occur; every: take each so many-th."""
    if first:
        work = [jobs.of_cell(cell, number) for number, cell in enumerate(cells.first_cells(modes))]
    else:
        work = [jobs.of_stock(name, mode) for name in stock.ROWS for mode in modes]
        work += [jobs.of_cell(cell, number) for number, cell in enumerate(cells.pairs(list(weights.AXIS), modes))]
    work = [job for job in work if not only or any(part in job.name for part in only)]
    return work[::every]


def main(
    device: str, deadline: float, output: Path, identity: str, *, first: bool, only: Sequence[str], every: int
) -> bool:
    """Run what is not done yet; whether every row is there and none is wrong."""
    modes, total = (CPU,), 0
    if device == "cuda":
        import torch

        modes, total = MODES, torch.cuda.get_device_properties(0).total_memory
    work = plan(modes, first=first, only=only, every=every)
    before = {name for name, kept in done(output, identity).items() if kept["verdict"] != WRONG}
    rest = [job for job in work if job.name not in before]
    say(f"matrix: {len(rest)} of {len(work)} rows to run")
    wrong = count = 0
    with tempfile.TemporaryDirectory(prefix="longcat-gpu-") as folder:
        models = Path(folder) / "models"
        for form, why in weights.write(models).items():
            say(f"matrix: {form} could not be written: {why}")
        weights.lora(models / "loras" / LORA_FILE)
        fleet = Fleet(Installation.find(), Path(folder), models, total)
        servers = {mode: fleet.server(mode) for mode in modes}
        beside = max(1, ((os.cpu_count() or 1) - 2 * len(modes)) // THREADS)
        references = References([fleet.server(CPU, f"reference-{i}", THREADS) for i in range(min(beside, len(rest)))])
        try:
            with (output / ROWS).open("a", encoding="utf-8") as file:
                for job, verdict, seconds in run(rest, servers, references, deadline):
                    kept = row(job, verdict, seconds)
                    file.write(json.dumps({"identity": identity} | kept) + "\n")
                    file.flush()
                    count += 1
                    wrong += verdict.verdict == WRONG
                    db = "" if kept["psnr"] is None else f"{kept['psnr']}"
                    say(f"{verdict.verdict:7} {seconds:5.1f} s {db:>6} {job.name} {verdict.said}".rstrip())
        finally:
            references.stop()
            fleet.end(output)
    say(f"matrix: {count} of {len(rest)} rows run, {wrong} wrong")
    return count == len(rest) and not wrong
