"""How time and memory grow with the number of tokens, and how the counted memory fits the measured."""

from __future__ import annotations

import gc
from typing import Any

import torch

from ..measure.clock import GIB, attempt, clean_up, measure, peak_bytes, reset_peak
from ..measure.results import Report
from ..optimize.memory import activation_bytes
from ..optimize.switches import Optimizations
from . import workload
from .ablation import Bench
from .workload import Size

# Height, width, frames: 4,680 to 168,960 tokens of the released model, as batch 1.
SIZES = (
    (480, 832, 9),
    (480, 832, 25),
    (480, 832, 49),
    (480, 832, 93),
    (720, 1280, 61),
    (720, 1280, 93),
    (720, 1280, 125),
    (704, 1280, 189),
)
# For processors: 48 to 384 tokens.
SMALL_SIZES = ((32, 48, 5), (32, 48, 9), (64, 96, 5), (64, 96, 13))
# Where the counted memory is held against the measured: 480p with guidance, 720p without and with.
FIT_SIZES = ((480, 832, 93, 2), (480, 832, 93, 1), (720, 1280, 93, 1), (720, 1280, 93, 2))
SMALL_FIT_SIZES = ((32, 48, 5, 2), (64, 96, 9, 1))


def scale(bench: Bench, report: Report, sizes: Any = None) -> None:
    """A row for every size, smallest first; after the first that does not fit, the rest is left out."""
    chosen = bench.full()
    sizes = sizes or (SIZES if bench.device.type == "cuda" else SMALL_SIZES)
    full = False
    for height, width, frames in sizes:
        size = Size(height, width, frames, 1)
        row = {"size": str(size), "tokens": size.tokens(bench.model.config), "depth": bench.model.config.depth}
        if full:
            report.add({"name": str(size), **row, "status": "not run", "reason": "a smaller one did not fit"})
            continue
        row = report.add(bench.sized(size).run_network(str(size), chosen, **row))
        full = row["status"] == "failed" and "out of memory" in row["reason"].lower()


@torch.no_grad()
def memory(bench: Bench, report: Report, sizes: Any = None) -> None:
    """Peak of a forward over what the model and its inputs hold, and over `activation_bytes`: blocks compiled or not.

    The second forward of each is measured: what is kept between steps belongs to neither count.
    """
    sizes = sizes or (FIT_SIZES if bench.device.type == "cuda" else SMALL_FIT_SIZES)
    config, itemsize = bench.model.config, bench.model.dtype.itemsize
    for numbers in sizes:
        size = Size(*numbers)
        counted = activation_bytes(config, size.latents(config.in_channels), itemsize)
        for name, values in (("eager", bench.full() | {"compile": "off"}), ("compiled", bench.full())):
            row = {"name": f"{size}, batch {size.batch}, {name}", "size": str(size), "batch": size.batch}
            row |= {"compiled": name == "compiled", "counted_gib": counted / GIB, "tokens": size.tokens(config)}

            def run(size: Size = size, values: dict = values, counted: int = counted) -> dict[str, Any]:
                workload.exactly(bench.model, Optimizations(**values))
                with workload.Notes(bench.model) as notes:
                    forward = workload.network_forward(bench.model, workload.Inputs(config, size, bench.device))
                    forward()
                    gc.collect()
                    reset_peak(bench.device)
                    held = torch.cuda.memory_allocated(bench.device) if bench.device.type == "cuda" else 0
                    ms = measure(forward, bench.device, 0, bench.budget).ms
                peak = peak_bytes(bench.device)
                measured = None if peak is None else peak - held
                found = {"measured_gib": None if measured is None else measured / GIB, "ms": ms, "notes": notes}
                return found | {"fit": None if measured is None else measured / counted}

            row = report.add(attempt(row, bench.budget, run))
            clean_up(bench.device)
            figure = f"fit {row['fit']}" if row["status"] == "ok" else row["reason"]
            bench.say(f"memory of {row['name']}: {figure}")
