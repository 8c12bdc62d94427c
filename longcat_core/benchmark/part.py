"""The record that describes one part of the benchmark, and the tables and charts that parts share."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ..measure.charts import BLUE, GRAY, GREEN, ORANGE, Bar, Bars, Color, bar_chart
from ..measure.results import markdown, name_of, shown

if TYPE_CHECKING:
    from PIL import Image

    from .variants import Bench

Row = dict[str, Any]
Results = dict[str, Any]

PHASE_COLORS = {"baseline": GRAY, "added": BLUE, "removed": ORANGE, "fp8": GREEN, "path": BLUE, "distilled": ORANGE}


class Chart(NamedTuple):
    """draw: from results and `Targets` or None to an RGB image; fields: numbers that a row must have to be drawn;
    suffix: what sets the file apart from other charts of the part."""

    draw: Callable[[Results, Any], Image.Image]
    fields: tuple[str, ...]
    suffix: str = ""


@dataclass(frozen=True)
class Part:
    """One part of `longcat bench`.

    text: heading and introduction of its section on the page; run: measures and adds rows to the bench's report (None:
    the part needs no bench and has a command of its own);
    table: the section's table, from results and `Targets` or None; sized: the bench at the size at which the part runs.
    """

    text: str
    run: Callable[[Bench], None] | None
    table: Callable[[Results, Any], str]
    charts: tuple[Chart, ...] = ()
    sized: Callable[[Bench], Bench] = lambda bench: bench

    def chart_names(self, results: Results) -> list[str]:
        """Names of the files that `draw` may make."""
        return [f"{name_of(results)}{chart.suffix}.png" for chart in self.charts]

    def draw(self, results: Results, targets: Any = None) -> dict[str, bytes]:
        """PNG files by name; a chart without any row to draw is left out."""
        found = {}
        for name, chart in zip(self.chart_names(results), self.charts, strict=True):
            if ok_rows(results, *chart.fields):
                buffer = io.BytesIO()
                chart.draw(results, targets).save(buffer, format="PNG")
                found[name] = buffer.getvalue()
        return found


def ok_rows(results: Results, *fields: str) -> list[Row]:
    """Rows that were measured and have a finite number in each of `fields`."""

    def number(value: Any) -> bool:
        return isinstance(value, (int, float)) and math.isfinite(value)

    return [row for row in results["rows"] if row.get("status") == "ok" and all(number(row.get(f)) for f in fields)]


def by_name(results: Results) -> dict[str, Row]:
    return {row["name"]: row for row in results["rows"]}


def columns(**headings: str) -> Callable[[Results, Any], str]:
    """A table of rows' fields, each under its heading."""

    def table(results: Results, _: Any) -> str:
        return markdown(tuple(headings.values()), [[row.get(name) for name in headings] for row in results["rows"]])

    return table


def measured_rows(results: Results) -> list[Row]:
    """All rows but those of preparation."""
    return [row for row in results["rows"] if row.get("phase") != "preparation"]


def preparation(results: Results) -> str:
    """A sentence on the time of preparation, as a paragraph that follows a table."""
    rows = [row for row in results["rows"] if row.get("phase") == "preparation" and row["status"] == "ok"]
    return "".join(f"\n\nQuantizing the weights took {shown(row['first_s'])} s." for row in rows)


def spread(row: Row) -> str:
    """The fastest and slowest call."""
    times = row.get("times_ms") or []
    return f"{shown(min(times))} to {shown(max(times))}" if times else "-"


def met_or_missed(passed: bool) -> str:
    return "met" if passed else "missed"


def bars(
    title: str,
    heading: str,
    field: str,
    form: str = "{:.0f}",
    color: Callable[[Row], Color] = lambda row: BLUE,
    label: Callable[[Row], str] = lambda row: row["name"],
    rows: Callable[[list[Row]], Sequence[Row]] = lambda rows: rows,
) -> Chart:
    """A chart with one bar for each row. title: a format of the inputs; form: of the value at the bar's end; rows:
    chooses and orders rows."""

    def draw(results: Results, _: Any = None) -> Image.Image:
        found = [
            Bar(label(row), row[field], color(row), form.format(row[field])) for row in rows(ok_rows(results, field))
        ]
        inputs = {"size": "", "blocks": "?", "variant": ""} | results["inputs"]
        return bar_chart(title.format(**inputs), [Bars(heading, found)])

    return Chart(draw, (field,))


# Milliseconds of every variant, colored by phase.
STEPS = bars(
    "One denoising step, {size}, {blocks} blocks",
    "ms",
    "ms",
    color=lambda row: PHASE_COLORS.get(row.get("phase", ""), BLUE),
    rows=lambda rows: [row for row in rows if row.get("phase") not in ("preparation", "attention")],
)
