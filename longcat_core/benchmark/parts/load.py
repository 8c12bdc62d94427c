"""The speed of loading a checkpoint beside that of reading its file."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ...checkpoints.formats import OFFICIAL
from ...checkpoints.load import load_transformer, official_state
from ...files.read_ahead import THREADS
from ...files.safetensors_io import write_safetensors
from ...measure.clock import OK, attempt, clean_up, synchronize
from ...measure.results import markdown, shown
from ...optimize.quantization import Policy
from ..part import Part, Results, Row, met_or_missed
from ..variants import Bench

# Loading must reach this share of the disk's rate, for files from this size in bytes: small ones have other costs.
SHARE, LARGE = 0.8, 10**9
BLOCK = 1 << 24
RAW = "reading the file"


def drop_from_cache(path: Path) -> bool:
    """Ask the system to drop a file from its cache; returns whether it can be asked."""
    if not hasattr(os, "posix_fadvise"):
        return False
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def read_whole(path: Path) -> None:
    """Read a file the way loading does, on as many threads, and discard it."""
    size = path.stat().st_size

    def stretch(i: int) -> None:
        buffer = bytearray(BLOCK)
        with open(path, "rb", buffering=0) as file:
            for start in range(i * BLOCK, size, THREADS * BLOCK):
                file.seek(start)
                file.readinto(buffer)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(stretch, range(THREADS)))


def run(bench: Bench) -> None:
    """Rows of reading a file of the bench's model and of loading it, each time from the disk: gb_s, and share of the
    rate of reading. The file stays in the folder of results only for the duration."""
    device, dtype, report = bench.device, bench.model.dtype, bench.report
    folder = report.path.parent
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        path = Path(place) / "model.safetensors"
        write_safetensors(path, official_state(bench.model, OFFICIAL))
        size = path.stat().st_size
        cold = drop_from_cache(path)
        report.content["inputs"] |= {"file_gb": size / 1e9, "cold": cold}

        def load(fp8: Policy | None) -> None:
            load_transformer(path, dtype=dtype, device=device, fp8=fp8)
            synchronize(device)

        runs = {
            RAW: lambda: read_whole(path),
            "loading": lambda: load(None),
            "loading to fp8": lambda: load(Policy()),
        }
        times: dict[str, list[float]] = {name: [] for name in runs}
        rows: dict[str, Row] = {name: {"name": name, "phase": "load"} for name in runs}

        def seconds(name: str) -> Row:
            drop_from_cache(path)
            started = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - started)
            return {}

        # Alternating, since a disk's rate drifts.
        for _ in range(bench.repeats):
            for name in runs:
                if rows[name].get("status", OK) == OK:
                    rows[name] = attempt(rows[name], bench.budget, seconds, name)
                clean_up(device)
    raw = statistics.median(times[RAW]) if times[RAW] else None
    for name, taken in times.items():
        row = rows[name]
        if taken:
            median = statistics.median(taken)
            row = {"name": name, "phase": "load", "status": OK, "seconds": median, "times_s": taken}
            row["gb_s"] = size / median / 1e9
            if name != RAW and raw is not None:
                row |= {"share": raw / median, "target": SHARE if name == "loading" and size >= LARGE else None}
        bench.keep(row)


def table(results: Results, _: Any) -> str:
    lines = []
    for row in results["rows"]:
        share, least = row.get("share"), row.get("target")
        bound = None if share is None or least is None else f">= {least:.0%}: {met_or_missed(share >= least)}"
        of_disk = None if share is None else f"{share:.0%}"
        lines.append((row["name"], row.get("seconds"), row.get("gb_s"), of_disk, bound, row["status"]))
    inputs = results["inputs"]
    cached = "" if inputs.get("cold") else " The system's cache held it, since this system cannot be asked to drop it."
    return markdown(("", "s", "GB/s", "share", "target", ""), lines) + f"\n\n{shown(inputs['file_gb'])} GB.{cached}"


PART = Part(
    text="""## Loading

Medians, from a file that the system was asked to drop from its cache; loading alternates with reading the file on as
many threads. *Share* is of the rate of reading. For fp8, weights are quantized as they arrive.""",
    run=run,
    table=table,
)
