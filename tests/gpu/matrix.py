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
PATIENCE = 20


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


class NanoRun:
    """All jobs on the nano model, a server for each mode, side by side. `poll` gives what is judged since it was called
    last."""

    def __init__(self, work: Sequence[Job], servers: dict[str, Booted], references: References) -> None:
        self.work, self.servers, self.references = work, servers, references
        self.finished: queue.SimpleQueue[tuple[Job, Seen]] = queue.SimpleQueue()
        self.waiting: list[tuple[Job, Seen]] = []
        self.threads: list[threading.Thread] = []

    def start(self, deadline: float) -> None:
        for job in self.work:
            self.references.of(job)
        for mode in self.servers:
            self.threads.append(threading.Thread(target=self._serve, args=(mode, deadline), daemon=True))
            self.threads[-1].start()

    def _serve(self, mode: str, deadline: float) -> None:
        for job in self.work:
            if job.mode == mode and time.monotonic() < deadline:
                self.finished.put((job, self.servers[mode].run(job.prompts)))

    @property
    def busy(self) -> bool:
        return any(thread.is_alive() for thread in self.threads) or not self.finished.empty() or bool(self.waiting)

    def poll(self) -> Iterator[tuple[Job, Verdict, float]]:
        """(job, verdict, seconds) of each whose video on the CPU is there."""
        while not self.finished.empty():
            self.waiting.append(self.finished.get())
        waiting, self.waiting = self.waiting, []
        for job, seen in waiting:
            if self.references.of(job).done():
                yield job, judge(job, seen, self.references.of(job).result()), seen.seconds
            else:
                self.waiting.append((job, seen))


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


def wide_row(row: wide.Row, verdict: Verdict, limit: float, seconds: float, nodes: list[str]) -> dict[str, Any]:
    """What the report keeps of a row of the wide network."""
    found = {"kind": WIDE, "name": row.name, "mode": row.mode, "verdict": verdict.verdict, "said": verdict.said}
    return found | {"psnr": None, "limit": limit, "seconds": round(seconds, 2), "nodes": nodes}


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
    about |= {"limits": limits.page(), "covered": cells.COVERED}
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
        references = References([fleet.server(CPU, f"reference-{i}", THREADS) for i in range(min(beside, 6))])
        nano = NanoRun(rest, {mode: fleet.server(mode) for mode in modes} if rest else {}, references)
        large = wide.WideRun(fleet, wide_rest, wide.FULL if device.type == "cuda" else wide.TINY, device)
        try:
            nano.start(deadline)
            large.start(deadline)
            shown = time.monotonic()
            while (nano.busy or large.busy) and time.monotonic() < deadline + PATIENCE:
                time.sleep(0.1)
                for found in nano.poll():
                    kept.add(row(*found))
                for found in large.poll():
                    kept.add(wide_row(*found))
                if time.monotonic() > shown + 30:
                    shown = time.monotonic()
                    say(f"matrix: {kept.count} rows judged, {len(nano.waiting)} wait for one of the CPU's videos "
                        f"({references.count}), {len(large.waiting)} for another mode")  # fmt: skip
        finally:
            references.stop()
            large.meter.stop()
            fleet.end(output)
    say(f"matrix: {kept.count} of {len(rest) + len(wide_rest)} rows run, {kept.wrong} wrong")
    return kept.count == len(rest) + len(wide_rest) and not kept.wrong
