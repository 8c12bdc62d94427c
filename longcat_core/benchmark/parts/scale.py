"""Time and memory by the number of tokens."""

from __future__ import annotations

import math
from typing import Any

from ...measure.charts import BLUE, ORANGE, Line, Panel, even_axis, line_chart, log_axis
from ..part import Chart, Part, Results, columns, ok_rows
from ..variants import Bench
from ..workload import Size

# Height, width, frames: 4,680 to 168,960 tokens of the released model.
SIZES = (
    *((480, 832, frames) for frames in (9, 25, 49, 93)),
    *((720, 1280, frames) for frames in (61, 93, 125)),
    (704, 1280, 189),
)
# 48 to 384 tokens.
CPU_SIZES = ((32, 48, 5), (32, 48, 9), (64, 96, 5), (64, 96, 13))


def run(bench: Bench) -> None:
    """Rows of every size, smallest first, batch 1; after one that does not fit, larger ones are skipped."""
    full = False
    for height, width, frames in SIZES if bench.device.type == "cuda" else CPU_SIZES:
        size = Size(height, width, frames, 1)
        row = {"size": str(size), "tokens": size.tokens(bench.model.config), "depth": bench.model.config.depth}
        if full:
            bench.report.add({"name": str(size), **row, "status": "not run", "reason": "a smaller one did not fit"})
            continue
        row = bench.sized(size).network(str(size), bench.full(), **row)
        full = row["status"] == "failed" and "out of memory" in row["reason"].lower()


def chart(results: Results, _: Any) -> Any:
    rows = ok_rows(results, "ms", "tokens")
    x, ms = [math.log10(row["tokens"]) for row in rows], [row["ms"] for row in rows]
    points = list(zip(x, map(math.log10, ms), strict=True))
    panels = [Panel("ms", 260, log_axis(ms), [Line(points, BLUE)])]
    peaks = [(at, row["peak_gib"]) for at, row in zip(x, rows, strict=True) if row.get("peak_gib")]
    if peaks:
        panels.append(Panel("peak GiB", 190, even_axis(0.0, max(peak for _, peak in peaks)), [Line(peaks, ORANGE)]))
    title = f"Time and memory by tokens, {results['inputs'].get('blocks', '?')} blocks, batch 1"
    return line_chart(title, panels, log_axis([row["tokens"] for row in rows]), "tokens")


PART = Part(
    text="## By number of tokens\n\nThe exact path, without guidance.",
    run=run,
    table=columns(size="", tokens="tokens", ms="ms", peak_gib="peak GiB", first_s="first call s", status=""),
    charts=(Chart(chart, ("ms", "tokens")),),
)
