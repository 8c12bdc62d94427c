"""What is to be reached, and whether results do: for a step, whose rows `paths` makes, and for refining."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from ..measure.results import markdown, shown
from .ablation import COMPILED, EAGER, EXACT, FP8, FP8_8BIT
from .refine_step import SPARSE_EXACT, SPARSE_FP8

DISTILLED, DISTILLED_STEPS = ", distilled", 16
# What the public implementations take on an H100 80GB at 480x832x93 with guidance, in seconds a step.
PUBLIC = {EAGER: 11.88, COMPILED: 9.45}
PUBLIC_SIZE, PUBLIC_TOLERANCE, PUBLIC_BLOCKS = "480x832x93", 0.05, 48
# The same of one evaluation that refines: latents 48x88x160, no guidance, block-sparse attention.
PUBLIC_REFINE, REFINE_SIZE = 18.13, "704x1280x189"
EXACT_LIMIT = 1.1

Row = dict[str, Any]


class Target(NamedTuple):
    """name: of a row; limit: in `unit`. kind: the row's step, first call, peak or steps of a distilled video, or how
    many times faster it is than the row `over`: of that alone more is better."""

    name: str
    what: str
    limit: float
    unit: str
    kind: Literal["step", "ratio", "peak", "first", "whole"]
    over: str = ""

    def value(self, rows: dict[str, Row]) -> float | None:
        """What the rows have of it, in `unit`; None where they do not."""
        row, other = (rows.get(name, {}) for name in (self.name, self.over))
        if row.get("status") != "ok" or (self.over and other.get("status") != "ok"):
            return None
        if self.kind == "ratio":
            return other["ms"] / row["ms"]
        if self.kind in ("peak", "first"):
            return row["peak_gib" if self.kind == "peak" else "first_s"]
        return (DISTILLED_STEPS if self.kind == "whole" else 1) * row["ms"] / 1000

    def met(self, value: float) -> bool:
        return value >= self.limit if self.kind == "ratio" else value <= self.limit

    @property
    def asked(self) -> str:
        return f"{'>=' if self.kind == 'ratio' else '<='} {self.limit:g} {self.unit}"


TARGETS = (
    Target(EXACT, "step with guidance", 6.0, "s", "step"),
    Target(EXACT, "against the compiled baseline", 1.55, "x", "ratio", COMPILED),
    Target(EXACT, "against the eager baseline", 1.95, "x", "ratio", EAGER),
    Target(EXACT, "peak memory", 30.0, "GiB", "peak"),
    Target(EXACT, "first call", 12.0, "s", "first"),
    Target(FP8, "step with guidance", 5.0, "s", "step"),
    Target(FP8, "against the compiled baseline", 1.9, "x", "ratio", COMPILED),
    Target(FP8, "against the eager baseline", 2.35, "x", "ratio", EAGER),
    Target(FP8, "peak memory", 19.0, "GiB", "peak"),
    Target(FP8, "first call", 15.0, "s", "first"),
    Target(FP8_8BIT, "step with guidance", 4.2, "s", "step"),
    Target(f"{EXACT}{DISTILLED}", f"{DISTILLED_STEPS} steps, no guidance", 50.0, "s", "whole"),
    Target(f"{FP8}{DISTILLED}", f"{DISTILLED_STEPS} steps, no guidance", 42.0, "s", "whole"),
)
REFINE_TARGETS = (
    Target(SPARSE_EXACT, "evaluation of the refinement", 9.5, "s", "step"),
    Target(SPARSE_FP8, "evaluation of the refinement", 7.0, "s", "step"),
)
# By kind of results: the targets, and the size and batch that they are for.
FOR = {"paths": (TARGETS, PUBLIC_SIZE, 2), "refine": (REFINE_TARGETS, REFINE_SIZE, 1)}


def by_name(results: dict[str, Any]) -> dict[str, Row]:
    return {row["name"]: row for row in results["rows"]}


def comparable(results: dict[str, Any]) -> bool:
    """Whether results are of the size, batch and depth that targets and public figures are for."""
    inputs, (_, size, batch) = results["inputs"], FOR[results["kind"]]
    return (inputs.get("size"), inputs.get("batch"), inputs.get("blocks")) == (size, batch, PUBLIC_BLOCKS)


def missed(results: dict[str, Any]) -> Iterator[tuple[Target, float]]:
    """Targets that comparable results do not meet, with what was measured."""
    rows = by_name(results)
    for target in FOR[results["kind"]][0] if comparable(results) else ():
        value = target.value(rows)
        if value is not None and not target.met(value):
            yield target, value


def table(results: dict[str, Any], exactness: dict[str, Any] | None) -> str:
    """Targets of `paths` beside what was measured, and the baseline beside the public implementations' figures."""
    rows, same = by_name(results), comparable(results)
    lines = []
    for target in TARGETS:
        value = target.value(rows)
        if value is None:
            verdict = f"not measured ({rows.get(target.name, {}).get('status', 'not run')})"
        else:
            verdict = ("met" if target.met(value) else "missed") if same else "of another run"
        measured = "-" if value is None else f"{shown(value)} {target.unit}"
        lines.append((target.name, target.what, target.asked, measured, verdict))
    # In fp32 there is no 16-bit path to compare with.
    rounded = exactness is not None and exactness["inputs"].get("dtype") != "float32"
    for row in exactness["rows"] if rounded else ():
        if row["name"] == EXACT and row.get("ratio") is not None:
            verdict = "met" if row["ratio"] <= EXACT_LIMIT else "missed"
            told = f"{shown(row['ratio'])} x"
            lines.append((EXACT, "error over the plain 16-bit path's", f"<= {EXACT_LIMIT} x", told, verdict))
    notes = ""
    if not same:
        notes = (
            f"\n\nThe targets are for {PUBLIC_SIZE}, {PUBLIC_BLOCKS} blocks, batch 2 on an H100; this run was another."
        )
    return f"{markdown(('path', 'what', 'target', 'measured', ''), lines)}{notes}\n\n{_anchors(rows)}"


def _anchors(rows: dict[str, Row]) -> str:
    """The baseline beside the public implementations' figures, which were measured elsewhere and are constants here."""
    lines = []
    for name, public in PUBLIC.items():
        row = rows.get(name, {})
        if row.get("status") != "ok":
            lines.append((name, f"{public} s", "-", "-", "not measured"))
            continue
        seconds = row["ms"] / 1000
        off = seconds / public - 1
        within = "within" if abs(off) <= PUBLIC_TOLERANCE else "not within"
        lines.append((name, f"{public} s", f"{shown(seconds)} s", f"{off:+.1%}", f"{within} {PUBLIC_TOLERANCE:.0%}"))
    return markdown(("", "public LongCat-Video, H100", "measured", "difference", ""), lines)
