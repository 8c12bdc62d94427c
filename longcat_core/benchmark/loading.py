"""How fast a checkpoint loads, beside how fast its disk reads."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..checkpoints.formats import OFFICIAL
from ..checkpoints.load import load_transformer, official_state
from ..files.read_ahead import THREADS
from ..files.safetensors_io import write_safetensors
from ..measure.clock import attempt, clean_up, synchronize
from ..measure.results import Report
from ..optimize.quantization import Policy
from .ablation import Bench

# What loading must reach of the disk's own rate, and for files of how many bytes: what is small takes other time.
SHARE, LARGE = 0.8, 10**9
BLOCK = 1 << 24
RAW = "reading the file"


def forget(path: Path) -> bool:
    """Have the system drop what it keeps of a file in memory; whether it can be asked to."""
    if not hasattr(os, "posix_fadvise"):
        return False
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def read_whole(path: Path) -> None:
    """Read a file and drop it, as loading reads: by as many threads, each a stretch of it."""
    size = path.stat().st_size

    def stretch(i: int) -> None:
        buffer = bytearray(BLOCK)
        with open(path, "rb", buffering=0) as file:
            for start in range(i * BLOCK, size, THREADS * BLOCK):
                file.seek(start)
                file.readinto(buffer)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(stretch, range(THREADS)))


def loading(bench: Bench, report: Report) -> None:
    """Rows of reading a file of the bench's model and of loading it, from the disk each time: gb_s, and share of the
    disk's rate. The file lies in the folder of the results for as long as this takes."""
    device, dtype = bench.device, bench.model.dtype
    folder = report.path.parent
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        path = Path(place) / "model.safetensors"
        write_safetensors(path, official_state(bench.model, OFFICIAL))
        size = path.stat().st_size
        cold = forget(path)
        report.content["inputs"] |= {"file_gb": size / 1e9, "cold": cold}

        def load(fp8: Policy | None) -> None:
            load_transformer(path, dtype=dtype, device=device, fp8=fp8)
            synchronize(device)

        runs: dict[str, Callable[[], None]] = {
            RAW: lambda: read_whole(path),
            "loading": lambda: load(None),
            "loading to fp8": lambda: load(Policy()),
        }
        times: dict[str, list[float]] = {name: [] for name in runs}
        rows = {name: {"name": name, "phase": "load"} for name in runs}
        # In turn, since a disk's rate changes from minute to minute.
        for _ in range(bench.repeats):
            for name, run in runs.items():

                def timed(name: str = name, run: Callable[[], None] = run) -> dict[str, Any]:
                    forget(path)
                    started = time.perf_counter()
                    run()
                    times[name].append(time.perf_counter() - started)
                    return {}

                if rows[name].get("status", "ok") == "ok":
                    rows[name] = attempt(rows[name], bench.budget, timed)
                clean_up(device)
    raw = statistics.median(times[RAW]) if times[RAW] else None
    for name, row in rows.items():
        if times[name]:
            seconds = statistics.median(times[name])
            row |= {"status": "ok", "seconds": seconds, "times_s": times[name], "gb_s": size / seconds / 1e9}
            row.pop("reason", None)
            if name != RAW and raw is not None:
                row |= {"share": raw / seconds, "target": SHARE if name == "loading" and size >= LARGE else None}
        report.add(row)
        figure = f"{row['gb_s']:.2f} GB/s" if row["status"] == "ok" else row["reason"]
        bench.say(f"load, {name}: {figure}")
