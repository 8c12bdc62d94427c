"""Run the matrix: every row on the server of its VRAM mode, the CPU's videos beside, one line for each row."""

from __future__ import annotations

import json
import math
import os
import queue
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..comfyui.server import Installation
from . import cells, jobs, limits, stock, weights, wide
from .cells import CPU, MODES
from .fleet import Booted, Fleet, Seen
from .graphs import LORA_FILE, Prompt
from .jobs import WIDE, Job
from .limits import PACKAGES
from .report import ROWS, read_rows
from .verdicts import WRONG, Verdict, judge

# Threads of each of the servers that compute the CPU's videos.
THREADS = 2
# Seconds after the deadline in which rows that were begun may end.
PATIENCE = 60


@dataclass(frozen=True)
class Choice:
    """Which rows to run. first: the plainest ones; only: parts of names, of which one must occur; every: each so
    many-th row."""

    first: bool = False
    only: Sequence[str] = ()
    every: int = 1

    def of(self, work: list[Any]) -> list[Any]:
        return [job for job in work if not self.only or any(part in job.name for part in self.only)][:: self.every]


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

    @property
    def count(self) -> str:
        """How many are made, of how many."""
        return f"{sum(future.done() for future in self.found.values())} of {len(self.found)}"

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
    found |= {"psnr": psnr, "limit": job.limit, "seconds": round(seconds, 2), "nodes": job.nodes}
    return found | (asdict(job.cell) if job.cell else {})


def run(work: Sequence[Job], servers: dict[str, Booted], references: References, deadline: float) -> Iterator[tuple]:
    """(job, verdict, seconds) of every job that was begun before the deadline, all modes side by side."""
    finished: queue.SimpleQueue[tuple[Job, Seen]] = queue.SimpleQueue()

    def serve(mode: str) -> None:
        for job in work:
            if job.mode == mode and time.monotonic() < deadline:
                finished.put((job, servers[mode].run(job.prompts)))

    threads = [threading.Thread(target=serve, args=(mode,), daemon=True) for mode in servers]
    for thread in threads:
        thread.start()
    waiting: list[tuple[Job, Seen]] = []
    shown, judged = time.monotonic(), 0
    while any(thread.is_alive() for thread in threads) or not finished.empty() or waiting:
        time.sleep(0.1)
        while not finished.empty():
            waiting.append(finished.get())
        ready = [pair for pair in waiting if references.of(pair[0]).done()]
        waiting = [pair for pair in waiting if pair not in ready]
        for job, seen in ready:
            judged += 1
            yield job, judge(job, seen, references.of(job).result()), seen.seconds
        if time.monotonic() > shown + 30:
            shown = time.monotonic()
            say(f"matrix: {judged} rows judged, {len(waiting)} wait for the CPU's video, {references.count} made")
        if time.monotonic() > deadline + PATIENCE:
            break


def plan(modes: Sequence[str], packages: frozenset[str], *, first: bool) -> list[Job]:
    """The jobs on the nano model. first: only the plainest."""
    if first:
        return [jobs.of_cell(cell, number, packages) for number, cell in enumerate(cells.first_cells(modes))]
    work = [jobs.of_stock(name, mode) for name in stock.ROWS for mode in modes]
    found = cells.pairs(list(weights.AXIS), modes)
    return work + [jobs.of_cell(cell, number, packages) for number, cell in enumerate(found)]


def packages_of(installation: Installation) -> frozenset[str]:
    """Which of limits.PACKAGES ComfyUI's Python has."""
    code = "import sys, importlib.util as u; print(*(name for name in sys.argv[1:] if u.find_spec(name)))"
    command = [str(installation.python), "-c", code, *sorted(PACKAGES)]
    return frozenset(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


class Rows:
    """The file of rows, to which each is added as it comes."""

    def __init__(self, output: Path, identity: str) -> None:
        self.file = (output / ROWS).open("a", encoding="utf-8")
        self.identity, self.count, self.wrong = identity, 0, 0

    def add(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps({"identity": self.identity} | row) + "\n")
        self.file.flush()
        self.count += 1
        self.wrong += row["verdict"] == WRONG
        db = "" if row["psnr"] is None else str(row["psnr"])
        say(f"{row['verdict']:7} {row['seconds']:6.1f} s {db:>6} {row['name']} {row['said']}".rstrip())


def run_wide(fleet: Fleet, work: Sequence[wide.Row], device: torch.device, deadline: float, kept: Rows) -> None:
    """Run the rows of the wide network."""
    size = wide.FULL if device.type == "cuda" else wide.TINY
    wide.write(fleet.models, size, device)
    for row, verdict, limit, seconds, nodes in wide.run(fleet, work, size, device, deadline):
        found = {"kind": WIDE, "name": row.name, "mode": row.mode, "verdict": verdict.verdict, "said": verdict.said}
        kept.add(found | {"psnr": None, "limit": limit, "seconds": round(seconds, 2), "nodes": nodes})


def main(device: torch.device, deadline: float, output: Path, about: dict[str, Any], choice: Choice) -> bool:
    """Run what is not done yet; whether every row is there and none is wrong."""
    modes, total = (CPU,), 0
    if device.type == "cuda":
        modes, total = MODES, torch.cuda.get_device_properties(device).total_memory
    else:
        say("matrix: on a CPU there is one VRAM mode; the others are left out")
    installation = Installation.find()
    work = choice.of(plan(modes, packages_of(installation), first=choice.first))
    wide_work = [] if choice.first else choice.of(wide.rows(wide.MODES if device.type == "cuda" else (CPU,)))
    about["planned"] = dict(Counter(job.kind for job in work)) | ({WIDE: len(wide_work)} if wide_work else {})
    about["limits"] = limits.page()
    before = {name for name, kept in read_rows(output, about["identity"]).items() if kept["verdict"] != WRONG}
    rest = [job for job in work if job.name not in before]
    # Later modes are compared with the first one.
    wide_rest = wide_work if any(row.name not in before for row in wide_work) else []
    say(f"matrix: {len(rest) + len(wide_rest)} of {len(work) + len(wide_work)} rows to run")
    kept = Rows(output, about["identity"])
    with tempfile.TemporaryDirectory(prefix="longcat-gpu-") as folder:
        models = Path(folder) / "models"
        for form, why in weights.write(models).items():
            say(f"matrix: {form} could not be written: {why}")
        weights.lora(models / "loras" / LORA_FILE)
        fleet = Fleet(installation, Path(folder), models, total)
        beside = max(1, ((os.cpu_count() or 1) - len(modes)) // THREADS)
        references = References([fleet.server(CPU, f"reference-{i}", THREADS) for i in range(min(beside, 8))])
        try:
            for job in rest:
                references.of(job)
            run_wide(fleet, wide_rest, device, deadline, kept)
            servers = {mode: fleet.server(mode) for mode in modes} if rest else {}
            for job, verdict, seconds in run(rest, servers, references, deadline):
                kept.add(row(job, verdict, seconds))
        finally:
            references.stop()
            fleet.end(output)
    say(f"matrix: {kept.count} of {len(rest) + len(wide_rest)} rows run, {kept.wrong} wrong")
    return kept.count == len(rest) + len(wide_rest) and not kept.wrong
