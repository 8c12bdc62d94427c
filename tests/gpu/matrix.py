"""Run the matrix: every row on the server of its VRAM mode, the CPU's videos beside, one line for each row."""

from __future__ import annotations

import contextlib
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..comfyui.server import Installation
from . import cells, jobs, limits, stock, weights, wide
from .cells import CPU, MODES
from .fleet import Booted, Fleet, Seen
from .graphs import LORA_FILE
from .jobs import WIDE, Job
from .limits import PACKAGES
from .references import FILE, THREADS, References
from .report import ROWS, read_rows
from .verdicts import WRONG, Verdict, judge

# Servers of the nano model for each mode. Alone, a prompt of it waits for the CPU more than for the card.
PER_MODE = 2
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


def row(job: Job, verdict: Verdict, seconds: float) -> dict[str, Any]:
    """What the report keeps of a job."""
    psnr = None if verdict.psnr is None else "equal" if math.isinf(verdict.psnr) else round(verdict.psnr, 1)
    found = {"kind": job.kind, "name": job.name, "mode": job.mode, "verdict": verdict.verdict, "said": verdict.said}
    found |= {"psnr": psnr, "limit": job.limit, "seconds": round(seconds, 2), "nodes": job.nodes}
    return found | (asdict(job.cell) if job.cell else {})


class NanoRun:
    """All jobs on the nano model, by the servers of each mode, side by side. `poll` gives what is judged since it was
    called last."""

    def __init__(self, work: Sequence[Job], servers: dict[str, list[Booted]], references: References) -> None:
        self.servers, self.references = servers, references
        self.todo: dict[str, queue.SimpleQueue[Job]] = {mode: queue.SimpleQueue() for mode in servers}
        for job in work:
            self.todo[job.mode].put(job)
        self.finished: queue.SimpleQueue[tuple[Job, Seen]] = queue.SimpleQueue()
        self.waiting: list[tuple[Job, Seen]] = []
        self.threads: list[threading.Thread] = []

    def start(self, deadline: float) -> None:
        for mode, servers in self.servers.items():
            for server in servers:
                self.threads.append(threading.Thread(target=self._serve, args=(server, mode, deadline), daemon=True))
                self.threads[-1].start()

    def _serve(self, server: Booted, mode: str, deadline: float) -> None:
        with contextlib.suppress(queue.Empty):
            while time.monotonic() < deadline:
                job = self.todo[mode].get_nowait()
                self.finished.put((job, server.run(job.prompts)))

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


def nano_servers(fleet: Fleet, work: Sequence[Job]) -> dict[str, list[Booted]]:
    """PER_MODE for each mode that has work, or as many as it has jobs."""
    count = Counter(job.mode for job in work)
    return {
        mode: [fleet.server(mode, f"{mode.strip('-').replace(' ', '-')}-{i}") for i in range(min(PER_MODE, jobs))]
        for mode, jobs in count.items()
    }


def plan(modes: Sequence[str], packages: frozenset[str], *, first: bool) -> list[Job]:
    """The jobs on the nano model. first: only the plainest."""
    if first:
        return [jobs.of_cell(cell, number, packages) for number, cell in enumerate(cells.first_cells(modes))]
    found = cells.pairs(list(weights.AXIS), modes)
    work = [jobs.of_cell(cell, number, packages) for number, cell in enumerate(found)]
    return work + [jobs.of_stock(name, mode) for name in stock.ROWS for mode in modes]


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
        beside = min(6, max(1, (os.cpu_count() or 1) // 2 // THREADS))
        references = References(rest, [fleet.server(CPU, f"reference-{i}", THREADS) for i in range(beside)])
        if references.stale:
            say(f"matrix: the CPU computes {len(references.stale)} videos that {FILE.name} lacks; "
                "python -m tests.gpu --references keeps them")  # fmt: skip
        nano = NanoRun(rest, nano_servers(fleet, rest), references)
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
