"""Of every target that was missed: where its time goes, and what would be left at the speed of the kernels alone."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..measure.results import markdown, shown
from .ablation import EXACT
from .refine_step import ALONE, SPARSE
from .targets import DISTILLED, DISTILLED_STEPS, Row, Target, by_name, missed

Found = dict[str, dict[str, Any]]

# Projections of one block by themselves on an H100 80GB (PyTorch 2.11, CUDA 13), in ms over CEILING_ROWS tokens: the
# GEMM rows of "Ceilings" in the reference's performance.md, for fp8 those with row-wise scales, as this network has.
CEILING_ROWS, CEILING_WIDTH = 2 * 37_440, 4096
CEILINGS_MS = {
    "bf16": {"qkv": 10.3, "proj": 3.68, "cross q": 3.68, "cross proj": 3.68, "gate_up": 19.4, "down": 9.85},
    "fp8": {"qkv": 6.08, "proj": 1.95, "cross q": 1.95, "cross proj": 1.95, "gate_up": 11.0, "down": 5.59},
}
TEXT = f"""## What the floor allows

Of every target that was missed, in seconds of what the target counts. *Attention alone*: its kernels by themselves, as
measured below, times the blocks. *In the step* and *projections*: attention and GEMMs of that path in the profiler; of
a distilled step, half of those with guidance. *Rest*: what is measured beyond attention alone and projections; of
memory all but the weights, of a first call all but a step, which is compiling and warming up. *Floor*: attention alone,
and the projections as fast as an H100 multiplies such matrices by themselves ({sum(CEILINGS_MS["bf16"].values()):.1f}
ms a block with guidance in bf16, {sum(CEILINGS_MS["fp8"].values()):.1f} in fp8); of memory the weights, of a first call
a step."""
NO_PROFILE = "no profile of this path"


class Parts(NamedTuple):
    """Milliseconds of one evaluation, or None where nothing tells: attention by itself and in the profile, GEMMs in the
    profile, and GEMMs at the ceiling."""

    alone: float | None
    within: float | None
    gemms: float | None
    ceiling: float | None

    @property
    def floor(self) -> float | None:
        return None if self.alone is None or self.ceiling is None else self.alone + self.ceiling


def ceiling_ms(precision: str, tokens: int, blocks: int) -> float:
    """Projections of a whole network over so many tokens (of all samples), at the ceiling of `bf16` or `fp8`."""
    return sum(CEILINGS_MS[precision].values()) * blocks * tokens / CEILING_ROWS


def _alone(backends: dict[str, Any] | None, row: Row, results: dict[str, Any]) -> float | None:
    """Self- and cross-attention of all blocks by the kernels that the row names, measured at the same size."""
    inputs = results["inputs"]
    if backends is None or any(backends["inputs"].get(key) != inputs.get(key) for key in ("size", "batch")):
        return None
    found = {(r["attention"], r["name"]): r["ms"] for r in backends["rows"] if r["status"] == "ok"}
    self_ms = found.get(("self", row.get("attention")))
    cross_ms = found.get(("cross", row.get("text_attention")))
    return None if self_ms is None or cross_ms is None else inputs["blocks"] * (self_ms + cross_ms)


def _profiled(found: Found, path: str, results: dict[str, Any]) -> dict[str, float]:
    """Milliseconds by family of the profile of a path, made under the same inputs."""
    for other in found.values():
        same = all(other["inputs"].get(key) == results["inputs"].get(key) for key in ("size", "batch", "blocks"))
        if other["kind"] == "profile" and other["inputs"].get("variant") == path and same:
            return {row["name"]: row["ms"] for row in other["rows"] if row.get("phase") == "family"}
    return {}


def parts(name: str, results: dict[str, Any], found: Found) -> Parts:
    """Of one evaluation of the row `name` in results of `paths` or of `refine`."""
    rows, inputs = by_name(results), results["inputs"]
    wide = inputs.get("hidden_size", CEILING_WIDTH) == CEILING_WIDTH
    path, blocks = name.removesuffix(DISTILLED), inputs["blocks"]
    precision = "bf16" if path.endswith(EXACT) else "fp8"
    ceiling = ceiling_ms(precision, inputs["batch"] * inputs["tokens"], blocks) if wide else None
    if results["kind"] == "refine":
        row = rows.get(ALONE[SPARSE], {})
        alone = blocks * row["ms"] if row.get("status") == "ok" else None
    else:
        alone = _alone(found.get("backends"), rows[name], results)
    families = _profiled(found, path, results)
    whole = Parts(alone, families.get("attention"), families.get("GEMM"), ceiling)
    if name == path:
        return whole
    return Parts(*(None if ms is None else ms / 2 for ms in whole))


def _less(value: float, *others: float | None) -> float | None:
    return None if None in others else value - sum(others)


def _cells(target: Target, value: float, results: dict[str, Any], found: Found) -> tuple[Any, ...]:
    """attention alone, in the step, projections, rest, floor."""
    row = by_name(results)[target.name]
    if target.kind == "peak":
        weights = row.get("weights_gib")
        return None, None, None, _told(_less(value, weights), "GiB"), _told(weights, "GiB")
    if target.kind == "first":
        rest = value - row["ms"] / 1000
        return None, None, None, f"{shown(rest)} s ({rest / value:.0%})", _told(row["ms"] / 1000, "s")
    of = parts(target.name, results, found)
    scale = (DISTILLED_STEPS if target.kind == "whole" else 1) / 1000
    alone, within, gemms, floor = (None if ms is None else scale * ms for ms in (*of[:3], of.floor))
    rest = _told(_less(scale * row["ms"], alone, gemms), "s")
    if target.kind == "ratio":
        floor = None if floor is None else by_name(results)[target.over]["ms"] / 1000 / floor
    projections = NO_PROFILE if gemms is None else _told(gemms, "s")
    return _told(alone, "s"), _told(within, "s"), projections, rest, _told(floor, target.unit)


def _told(value: float | None, unit: str) -> str | None:
    return None if value is None else f"{shown(value)} {unit}"


def section(found: Found) -> str:
    """The section of the page, from results by name; "" where no target was missed, or no results can tell."""
    lines = []
    for kind in ("paths", "refine"):
        results = found.get(kind)
        for target, value in missed(results) if results else ():
            cells = _cells(target, value, results, found)
            lines.append((f"{target.name}: {target.what}", target.asked, _told(value, target.unit), *cells))
    head = ("", "target", "measured", "attention alone", "in the step", "projections", "rest", "floor")
    return f"{TEXT}\n\n{markdown(head, lines)}" if lines else ""
