"""The peak memory of a forward over the estimate."""

from __future__ import annotations

import gc
from typing import Any

import torch

from ...measure.charts import BLUE, ORANGE
from ...measure.clock import GIB, measure
from ...optimize.memory import activation_bytes
from ...optimize.switches import Optimizations
from .. import workload
from ..part import Part, Results, Row, bars, columns
from ..variants import FULL, Bench
from ..workload import Inputs, Size

# Height, width, frames, batch: 480p with and without guidance, 720p without and with.
SIZES = ((480, 832, 93, 2), (480, 832, 93, 1), (720, 1280, 93, 1), (720, 1280, 93, 2))
CPU_SIZES = ((32, 48, 5, 2), (64, 96, 9, 1))


def run(bench: Bench) -> None:
    """Rows of each size, eager and compiled: peak beyond the model and its inputs, over `activation_bytes`."""
    config, itemsize = bench.model.config, bench.model.dtype.itemsize
    for numbers in SIZES if bench.device.type == "cuda" else CPU_SIZES:
        size = Size(*numbers)
        counted = activation_bytes(config, size.latents(config.in_channels), itemsize) / GIB
        for name, mode in (("eager", "off"), ("compiled", FULL.compile)):
            row = {"name": f"{size}, batch {size.batch}, {name}", "size": str(size), "batch": size.batch}
            row |= {"compiled": name == "compiled", "counted_gib": counted, "tokens": size.tokens(config)}
            bench.add(row, _peak, bench, size, Optimizations(**bench.full() | {"compile": mode}), counted)


@torch.no_grad()
def _peak(bench: Bench, size: Size, chosen: Optimizations, counted: float) -> Row:
    """Of the second forward: neither count includes what is kept between steps."""
    with workload.switched(bench.model, chosen) as notes:
        forward = workload.network_forward(bench.model, Inputs(bench.model.config, size, bench.device))
        forward()
        gc.collect()
        held = torch.cuda.memory_allocated(bench.device) / GIB if bench.device.type == "cuda" else 0.0
        timing = measure(forward, bench.device, 0, bench.budget)
    measured = None if timing.peak_gib is None else timing.peak_gib - held
    fit = None if measured is None else measured / counted
    return {"measured_gib": measured, "ms": timing.ms, "notes": notes, "fit": fit}


def table(results: Results, targets: Any) -> str:
    headings = {"name": "", "tokens": "tokens", "counted_gib": "estimated GiB", "measured_gib": "measured GiB"}
    fits = [row["fit"] for row in results["rows"] if row.get("fit") is not None]
    largest = f"Largest fit: {max(fits):.3f}." if fits else "This device does not report its peak."
    return columns(**headings, fit="fit", status="")(results, targets) + f"\n\n{largest}"


CHART = bars(
    "Peak memory of a forward over the estimate",
    "measured / estimated",
    "fit",
    "{:.3f}",
    color=lambda row: ORANGE if row["compiled"] else BLUE,
)

PART = Part(
    text="""## Memory

Peak memory of a forward beyond what the model holds, and the estimate of
`longcat_core.optimize.memory.activation_bytes`. *Fit* is the measured peak over the estimate. Estimates must be
multiplied by the largest fit (`MEMORY_FIT_OWN` there).""",
    run=run,
    table=table,
    charts=(CHART,),
)
