"""The worth of each optimization: added in turn to the plain network, and removed alone from the full set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...measure.charts import BLUE, GRAY, GREEN, ORANGE, Bar, Bars, bar_chart
from ...measure.ratio import ratio_of
from ...measure.results import markdown
from ..part import STEPS, Chart, Part, Results, Row, by_name, ok_rows
from ..variants import COMPILED, EAGER, Bench, compare_with, lossy_rows

if TYPE_CHECKING:
    from PIL import Image


# Switches of `Optimizations`, in the order in which they are added, and their names in rows. The plain network's
# `attention` is FlashAttention-2 on CUDA.
SWITCHES = {
    "fused_qkv": "fused q, k, v",
    "fused_ffn": "fused gate and up",
    "explicit_fp32": "explicit casts, no autocast",
    "text_mode": "text padding folded",
    "reuse_text": "text keys once per prompt",
    "reuse_modulation": "modulation once per timestep",
    "attention": "fastest exact attention",
    "compile": "blocks compiled",
    "fused_step": "fused sampler step",
    "fused_kernels": "own Triton kernels",
    "fused_text": "own kernel for text",
}
# What the plain network itself adds to the baseline.
LAYOUT = "layout", "one token layout"
# Color and legend of each phase, and of published guesses.
SERIES = {
    "added": (BLUE, "added"),
    "removed": (ORANGE, "removed alone from the full set"),
    "fp8": (GREEN, "lossy: fp8 over the exact set, 8-bit attention over fp8"),
    "guess": (GRAY, "published guess"),
}


def run(bench: Bench) -> None:
    """Rows of the phases baseline, added and removed, and last, since it changes the weights, fp8."""
    first = before = bench.baseline(EAGER, False)
    bench.baseline(COMPILED, True)
    plain, full = bench.plain(), bench.full()
    values = dict(plain)
    for switch, what in (LAYOUT, *SWITCHES.items()):
        if switch in SWITCHES:
            values[switch] = full[switch]
        row = bench.network(what, values, finish=compare_with(first, before), phase="added", switch=switch)
        before = row if row["status"] == "ok" or switch not in SWITCHES else before
    for switch, what in SWITCHES.items():
        if plain[switch] != full[switch]:
            without, finish = full | {switch: plain[switch]}, compare_with(first, before, removed=True)
            bench.network(f"without {what}", without, finish=finish, phase="removed", switch=switch)
    if bench.fp8:
        lossy_rows(bench, first, before, paths=False)


def _percent(row: Row, rows: dict[str, Row]) -> str:
    """The share of a row, with a note if its times and those of the row that it is compared with overlap."""
    if row.get("share") is None:
        return "-"
    times, others = row.get("times_ms"), rows.get(row.get("over", ""), {}).get("times_ms")
    ratio = ratio_of(times, others) if times and others else None
    unclear = ratio is not None and ratio.least <= 1 <= ratio.most
    return f"{100 * row['share']:+.1f} %{', not distinguishable' if unclear else ''}"


def table(results: Results, targets: Any) -> str:
    phases: dict[str, dict[str, Row]] = {}
    for row in results["rows"]:
        phases.setdefault(row.get("phase", ""), {})[row["name"]] = row
    lines: list[tuple[Any, ...]] = []
    alone, rows = phases.get("removed", {}), by_name(results)
    for name, row in phases.get("baseline", {}).items():
        lines.append((name, row.get("ms"), None, None, None, None, row.get("peak_gib"), row["status"]))
    for phase, sign in (("added", "+ "), ("fp8", "")):
        for name, row in phases.get(phase, {}).items():
            taken = _percent(alone.get(f"without {name}", {}), rows) if phase == "added" else None
            figures = row.get("ms"), row.get("ratio"), row.get("worth_ms"), _percent(row, rows), taken
            lines.append((f"{sign}{name}", *figures, row.get("peak_gib"), row["status"]))
    head = ["", "ms a step", "x eager", "worth ms", "share", "share, removed alone", "peak GiB", ""]
    if targets is None:
        return markdown(head, lines)
    guesses = {f"+ {name}": f"{percent:.1f} %" for name, percent in targets.guesses.items()}
    wider = [(*line[:-2], guesses.get(line[0]), *line[-2:]) for line in lines]
    return markdown([*head[:-2], "published guess", *head[-2:]], wider)


def worth(results: Results, targets: Any) -> Image.Image:
    """Share of the eager baseline's time, added and removed alone, beside published guesses."""
    shares: dict[str, dict[str, float]] = {}
    for row in ok_rows(results, "share"):
        shares.setdefault(row["name"].removeprefix("without "), {})[row["phase"]] = 100 * row["share"]
    for name, percent in {} if targets is None else targets.guesses.items():
        if name in shares:
            shares[name]["guess"] = percent
    bars = [
        Bar("" if i else name, value, SERIES[phase][0], f"{value:+.1f} %")
        for name, found in shares.items()
        for i, (phase, value) in enumerate(found.items())
    ]
    used = {phase for found in shares.values() for phase in found}
    legend = [(words, color) for phase, (color, words) in SERIES.items() if phase in used]
    groups = [Bars("% of the eager baseline's time", bars)]
    return bar_chart("What each optimization is worth", groups, legend=legend)


PART = Part(
    text="""## What each optimization is worth

*Added*: optimizations are added in this order to the plain network, and each is compared with the row before it.
*Removed alone*: the full set without it, compared with the full set. Worth is a share of the eager baseline's time. It
is *not distinguishable* where the times of the two rows overlap.""",
    run=run,
    table=table,
    charts=(STEPS, Chart(worth, ("share",), "-worth")),
)
