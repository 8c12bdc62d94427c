"""The peak memory of a forward over the estimate."""

from __future__ import annotations

import gc
from typing import Any

import torch

from ...measure.charts import BLUE, ORANGE
from ...measure.clock import GIB, measure, peak_gib, reset_peak
from ...optimize.memory import activation_bytes
from ...optimize.switches import Optimizations
from .. import workload
from ..part import Chart, Part, Results, bars, columns, ok_rows
from ..variants import Bench
from ..workload import Size

# Height, width, frames, batch: 480p with and without guidance, 720p without and with.
SIZES = ((480, 832, 93, 2), (480, 832, 93, 1), (720, 1280, 93, 1), (720, 1280, 93, 2))
CPU_SIZES = ((32, 48, 5, 2), (64, 96, 9, 1))


@torch.no_grad()
def run(bench: Bench) -> None:
    """Rows of each size, eager and compiled: peak beyond the model and its inputs, over `activation_bytes`.

    The second forward is measured: neither count includes what is kept between steps.
    """
    config, itemsize = bench.model.config, bench.model.dtype.itemsize
    for numbers in SIZES if bench.device.type == "cuda" else CPU_SIZES:
        size = Size(*numbers)
        counted = activation_bytes(config, size.latents(config.in_channels), itemsize)
        for name, values in (("eager", bench.full() | {"compile": "off"}), ("compiled", bench.full())):
            row = {"name": f"{size}, batch {size.batch}, {name}", "size": str(size), "batch": size.batch}
            row |= {"compiled": name == "compiled", "counted_gib": counted / GIB, "tokens": size.tokens(config)}

            def one(size: Size = size, values: dict = values, counted: int = counted) -> dict[str, Any]:
                workload.exactly(bench.model, Optimizations(**values))
                with workload.Notes(bench.model) as notes:
                    forward = workload.network_forward(bench.model, workload.Inputs(config, size, bench.device))
                    forward()
                    gc.collect()
                    reset_peak(bench.device)
                    held = torch.cuda.memory_allocated(bench.device) / GIB if bench.device.type == "cuda" else 0
                    ms = measure(forward, bench.device, 0, bench.budget).ms
                peak = peak_gib(bench.device)
                measured = None if peak is None else peak - held
                fit = None if measured is None else measured * GIB / counted
                return {"measured_gib": measured, "ms": ms, "notes": notes, "fit": fit}

            bench.add(row, one)


def table(results: Results, targets: Any) -> str:
    headings = {"name": "", "tokens": "tokens", "counted_gib": "estimated GiB", "measured_gib": "measured GiB"}
    fits = [row["fit"] for row in results["rows"] if row.get("fit") is not None]
    largest = f"Largest fit: {max(fits):.3f}." if fits else "This device does not report its peak."
    return columns(**headings, fit="fit", status="")(results, targets) + f"\n\n{largest}"


def chart(results: Results, _: Any) -> Any:
    return bars(
        ok_rows(results, "fit"),
        "Peak memory of a forward over the estimate",
        "measured / estimated",
        "fit",
        "{:.3f}",
        color=lambda row: ORANGE if row["compiled"] else BLUE,
    )


PART = Part(
    text="""## Memory

Peak of a forward beyond what the model holds, beside the estimate of `longcat_core.optimize.memory.activation_bytes`.
*Fit* is measured over estimated; estimates must be multiplied by the largest (`MEMORY_FIT_OWN` there).""",
    run=run,
    columns=("name", "counted_gib", "measured_gib", "fit", "status"),
    table=table,
    charts=(Chart(chart, ("fit",)),),
)
