"""The baselines, the exact path and fp8 side by side, and each as the distilled model runs it."""

from __future__ import annotations

from typing import Any

from ...measure.results import markdown
from ..part import STEPS, Part, Results, by_name, measured_rows, preparation, spread
from ..variants import COMPILED, DISTILLED, EAGER, EXACT, Bench, compare_with, lossy_rows

# Steps of the distilled model.
DISTILLED_STEPS = 16


def exact_paths(bench: Bench) -> None:
    """Rows of the baselines and of the exact path; distilled means batch 1, without guidance."""
    first = bench.baseline(EAGER, False)
    bench.baseline(COMPILED, True)
    bench.network(EXACT, bench.path(EXACT), finish=compare_with(first), phase="path")
    bench.network(f"{EXACT}{DISTILLED}", bench.path(EXACT), 1, phase="distilled")
    if bench.also_compiled:
        bench.network(*bench.compiled(EXACT), finish=compare_with(first), phase="path")


def lossy_paths(bench: Bench) -> None:
    """Rows of fp8, after those of `exact_paths` in the same report."""
    rows = by_name(bench.report.content)
    lossy_rows(bench, rows.get(EAGER, {}), rows.get(EXACT, {}), paths=True)


def run(bench: Bench) -> None:
    exact_paths(bench)
    if bench.fp8:
        lossy_paths(bench)


def table(results: Results, _: Any) -> str:
    compiled, steps = by_name(results).get(COMPILED, {}), results["inputs"].get("steps", 50)
    lines = []
    for row in measured_rows(results):
        ms, distilled = row.get("ms"), row.get("phase") == "distilled"
        over = compiled["ms"] / ms if ms and compiled.get("status") == "ok" and not distilled else None
        count = DISTILLED_STEPS if distilled else steps
        whole = None if ms is None else f"{count * ms / 1000:.0f} s ({count} steps)"
        last = [row.get(key) for key in ("peak_gib", "first_s", "attention", "status")]
        lines.append((row["name"], ms, spread(row), row.get("ratio"), over, whole, *last))
    head = ("", "ms a step", "from, to", "x eager", "x compiled", "a video, estimated", "peak GiB", "first call s")
    return markdown((*head, "attention", ""), lines) + preparation(results)


PART = Part(
    text="## Steps side by side\n\nAll variants run in one process, in turn, on the same weights and inputs.",
    run=run,
    table=table,
    charts=(STEPS,),
)
