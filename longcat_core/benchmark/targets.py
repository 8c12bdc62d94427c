"""Targets and public figures from a JSON file beside the page, and where the time of missed targets goes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..errors import LongCatError
from ..files.records import read_record
from ..measure.results import markdown, shown
from .part import Results, Row, by_name, met_or_missed
from .parts import sparse
from .parts.paths import DISTILLED_STEPS
from .parts.refine import ALONE, EIGHT_BIT, SPARSE
from .variants import DISTILLED, EXACT, FP8, FP8_8BIT

ResultsByName = dict[str, Results]

FLOOR = """## What the floor allows

Every missed target, in the target's own unit. *Attention alone*: its kernels as measured below, times the number of
blocks. *In the step* and *projections*: attention and GEMMs of that path in the profiler; for a distilled step, half of
those with guidance. *Rest*: what remains of the measured value after attention alone and projections; for memory,
everything but the weights; for a first call, everything but one step, which is compilation and warm-up. *Floor*:
attention alone plus the projections at the speed at which an H100 multiplies such matrices by themselves; for memory,
the weights; for a first call, one step."""
NO_PROFILE = "no profile of this path"


# Fields of rows that a target limits as they are.
_FIELDS = {"peak": "peak_gib", "first": "first_s", "weights": "weights_gib"}


class Target(NamedTuple):
    """name: of a row; limit: in `unit`. kind: the row's step, first call, peak, or steps of a distilled video, which
    must stay below the limit, or its speedup over the row `over`, which must reach it. mixed: all steps of a video that
    must stay below the limit; `steps` says how many go as in the row `over`, and how many there are in all. times: the
    row's step over that of `over`, which must stay below the limit. weights: their size."""

    name: str
    what: str
    kind: Literal["step", "ratio", "peak", "first", "whole", "mixed", "times", "weights"]
    limit: float
    unit: str
    over: str = ""
    steps: tuple[float, float] = (0, 1)

    def value(self, rows: dict[str, Row]) -> float | None:
        """The value in `unit`, or None if it was not measured."""
        row, other = (rows.get(name, {}) for name in (self.name, self.over))
        if row.get("status") != "ok" or (self.over and other.get("status") != "ok"):
            return None
        if self.kind == "ratio":
            return other["ms"] / row["ms"]
        if self.kind == "mixed":
            others, steps = self.steps
            return (others * other["ms"] + (steps - others) * row["ms"]) / 1000
        if self.kind == "times":
            return row["ms"] / other["ms"]
        if self.kind in _FIELDS:
            return row[_FIELDS[self.kind]]
        return (DISTILLED_STEPS if self.kind == "whole" else 1) * row["ms"] / 1000

    def is_met(self, value: float) -> bool:
        return value >= self.limit if self.kind == "ratio" else value <= self.limit

    @property
    def bound(self) -> str:
        return f"{'>=' if self.kind == 'ratio' else '<='} {self.limit:g} {self.unit}"


class TimeShare(NamedTuple):
    """Milliseconds of one evaluation, each None if unknown: attention alone, attention and GEMMs in the profile, and
    attention alone plus the projections at their own speed."""

    alone: float | None
    within: float | None
    gemms: float | None
    floor: float | None

    def times(self, factor: float) -> TimeShare:
        return TimeShare(*(None if ms is None else factor * ms for ms in self))

    def plus(self, other: TimeShare) -> TimeShare:
        return TimeShare(*(None if None in pair else sum(pair) for pair in zip(self, other, strict=True)))  # type: ignore[arg-type]


class Targets:
    """The content of a file of targets."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content
        self.public_refine_s: float = content["refine"]["public_s"]

    @classmethod
    def beside(cls, page: Path) -> Targets | None:
        """Targets from PAGE-targets.json, None if there is no such file. Raises LongCatError for a broken one."""
        path = page.with_name(f"{page.stem}-targets.json")
        if not path.exists():
            return None
        content = read_record(path, dict[str, Any], "a file of targets", "restore or remove it")
        try:
            return cls(content)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise LongCatError(f"cannot read {path} as targets ({error}); restore or remove it") from error

    def of(self, kind: str) -> list[Target]:
        """Targets of results of the kind `paths`, `refine`, `sparse`, `avatar` or `gpus`."""
        return [Target(**target) for target in self.content[kind]["targets"]]

    def verdicts(self, results: Results) -> str:
        """A table of the targets of comparable results, each met, missed or not measured."""
        lines, rows = [], by_name(results)
        for target in self.of(results["kind"]):
            value = target.value(rows)
            verdict = "not measured" if value is None else met_or_missed(target.is_met(value))
            lines.append((target.name, target.what, target.bound, value, verdict))
        return markdown(("path", "what", "target", "measured", ""), lines)

    @property
    def guesses(self) -> dict[str, float]:
        """Published guesses of what an optimization is worth, in percent of a video's time."""
        guesses = self.content["guesses"]
        return {name: 100 * seconds / guesses["of_s"] for name, seconds in guesses["seconds"].items()}

    def comparable(self, results: Results) -> bool:
        """Whether results have the size, batch and depth of the targets."""
        known = self.content[results["kind"]]
        return all(results["inputs"].get(key) == known[key] for key in ("size", "batch", "blocks"))

    def missed(self, results: Results) -> Iterator[tuple[Target, float]]:
        """Targets that comparable results do not meet, with the measured value."""
        rows = by_name(results)
        for target in self.of(results["kind"]) if self.comparable(results) else ():
            value = target.value(rows)
            if value is not None and not target.is_met(value):
                yield target, value

    def table(self, results: Results, exactness: Results | None) -> str:
        """Targets of `paths` beside the measured values, and the baseline beside the public implementations."""
        rows, same, known = by_name(results), self.comparable(results), self.content["paths"]
        lines = []
        for target in self.of("paths"):
            value = target.value(rows)
            if value is None:
                verdict = f"not measured ({rows.get(target.name, {}).get('status', 'not run')})"
            else:
                verdict = met_or_missed(target.is_met(value)) if same else "of another run"
            lines.append((target.name, target.what, target.bound, _in_unit(value, target.unit), verdict))
        # An fp32 run has no 16-bit path to compare with.
        rounded = exactness if exactness and exactness["inputs"].get("dtype") != "float32" else {"rows": []}
        ratio = by_name(rounded).get(EXACT, {}).get("ratio")
        if ratio is not None:
            most = self.content["exactness"]["ratio"]
            bound = f"<= {most} x", f"{shown(ratio)} x", met_or_missed(ratio <= most)
            lines.append((EXACT, "error over the plain 16-bit path's", *bound))
        note = f"{known['size']}, {known['blocks']} blocks, batch {known['batch']} on an H100"
        notes = "" if same else f"\n\nThe targets are for {note}; this run was another."
        return f"{markdown(('path', 'what', 'target', 'measured', ''), lines)}{notes}\n\n{self._public(rows)}"

    def _public(self, rows: dict[str, Row]) -> str:
        lines, tolerance = [], self.content["paths"]["public_tolerance"]
        for name, public in self.content["paths"]["public_s"].items():
            row, cells = rows.get(name, {}), ("-", "-", "not measured")
            if row.get("status") == "ok":
                off = row["ms"] / 1000 / public - 1
                within = "within" if abs(off) <= tolerance else "not within"
                cells = f"{shown(row['ms'] / 1000)} s", f"{off:+.1%}", f"{within} {tolerance:.0%}"
            lines.append((name, f"{public} s", *cells))
        return markdown(("", "public LongCat-Video, H100", "measured", "difference", ""), lines)

    # --- where the time of a missed target goes ---

    def floor(self, found: ResultsByName) -> str:
        """The section on missed targets, from results by name; "" if all are met or the results are of another run."""
        lines = []
        for results in (found[kind] for kind in ("paths", "refine", "sparse") if kind in found):
            for target, value in self.missed(results):
                cells = self._cells(target, value, results, found)
                lines.append((f"{target.name}: {target.what}", target.bound, _in_unit(value, target.unit), *cells))
        head = ("", "target", "measured", "attention alone", "in the step", "projections", "rest", "floor")
        return f"{FLOOR}\n\n{markdown(head, lines)}" if lines else ""

    def _cells(self, target: Target, value: float, results: Results, found: ResultsByName) -> tuple[str | None, ...]:
        """Attention alone, in the step, projections, rest, floor."""
        rows = by_name(results)
        row = rows[target.name]
        if target.kind == "peak":
            weights = row.get("weights_gib")
            return None, None, None, _in_unit(_minus(value, weights), "GiB"), _in_unit(weights, "GiB")
        if target.kind == "first":
            rest = value - row["ms"] / 1000
            return None, None, None, f"{shown(rest)} s ({rest / value:.0%})", _in_unit(row["ms"] / 1000, "s")
        others, steps = (
            target.steps if target.kind == "mixed" else (0, DISTILLED_STEPS if target.kind == "whole" else 1)
        )
        share = self.share(target.name, results, found).times((steps - others) / 1000)
        spent = (steps - others) * row["ms"] / 1000
        if others:
            share = share.plus(self.share(target.over, results, found).times(others / 1000))
            spent = value
        floor = share.floor
        if floor is not None and target.kind == "ratio":
            floor = rows[target.over]["ms"] / 1000 / floor
        projections = NO_PROFILE if share.gemms is None else _in_unit(share.gemms, "s")
        rest = _in_unit(_minus(spent, share.alone, share.gemms), "s")
        return _in_unit(share.alone, "s"), _in_unit(share.within, "s"), projections, rest, _in_unit(floor, target.unit)

    def share(self, name: str, results: Results, found: ResultsByName) -> TimeShare:
        """Of one evaluation of the row `name` in results of `paths`, `refine` or `sparse`."""
        rows, inputs = by_name(results), results["inputs"]
        path, blocks = name.removesuffix(DISTILLED), inputs["blocks"]
        if results["kind"] == "refine":
            measured = [rows.get(ALONE[kind], {}) for kind in ((EIGHT_BIT, SPARSE) if FP8 in name else (SPARSE,))]
            alone = next((blocks * row["ms"] for row in measured if row.get("status") == "ok"), None)
        elif results["kind"] == "sparse":
            alone = _sparse_alone(name, results)
            # The attention of sparse steps is that of FP8 where dense ones have 8 bits.
            sparser = path.startswith(sparse.SPARSE)
            path = path.replace(FP8_8BIT, FP8) if sparser else path.removeprefix(f"{sparse.DENSE}, ")
        else:
            alone = _attention_alone(found.get("backends"), rows[name], results)
        families, floor = _profiled_families(found, path, results), None
        width = self.content["projections"]["hidden_size"]
        if alone is not None and inputs.get("hidden_size", width) == width:
            precision = "bf16" if path.endswith(EXACT) else "fp8"
            floor = alone + self.projections_ms(precision, inputs["batch"] * inputs["tokens"], blocks)
        whole = TimeShare(alone, families.get("attention"), families.get("GEMM"), floor)
        return whole.times(0.5) if name.endswith(DISTILLED) else whole

    def projections_ms(self, precision: str, tokens: int, blocks: int) -> float:
        """Projections of all blocks by themselves, over the tokens of all samples, in `bf16` or `fp8`."""
        known = self.content["projections"]
        return sum(known["ms"][precision].values()) * blocks * tokens / known["tokens"]


def _attention_alone(backends: Results | None, row: Row, results: Results) -> float | None:
    """Attention of all blocks by the kernels that the row names, as measured at the same size."""
    inputs = results["inputs"]
    if backends is None or any(backends["inputs"].get(key) != inputs.get(key) for key in ("size", "batch")):
        return None
    found = {(r["attention"], r["name"]): r["ms"] for r in backends["rows"] if r["status"] == "ok"}
    self_ms = found.get(("self", row.get("attention")))
    cross_ms = found.get(("cross", row.get("text_attention")))
    return None if self_ms is None or cross_ms is None else inputs["blocks"] * (self_ms + cross_ms)


def _sparse_alone(name: str, results: Results) -> float | None:
    """Attention of all blocks in a step of results of `sparse`: dense, or by the fastest exact kernel at the density of
    the steps."""
    rows, inputs = by_name(results), results["inputs"]
    if name.startswith(sparse.DENSE):
        kind = FP8_8BIT if FP8_8BIT in name else EXACT
        found_ms = [rows.get(sparse.DENSE_ALONE[kind], {}).get("ms")]
    else:
        density = inputs["sparse"]["density"]
        found_ms = [r.get("ms") for r in rows.values() if r.get("density") == density and r.get("exact")]
    least = min(filter(None, found_ms), default=None)
    return None if least is None else inputs["blocks"] * least


def _profiled_families(found: ResultsByName, path: str, results: Results) -> dict[str, float]:
    """Milliseconds by family from the profile of a path with the same inputs on the same kind of GPU."""
    gpu = results["machine"].get("gpu")
    for other in found.values():
        same = all(other["inputs"].get(key) == results["inputs"].get(key) for key in ("size", "batch", "blocks"))
        same = same and other["machine"].get("gpu") == gpu
        if other["kind"] == "profile" and other["inputs"].get("variant") == path and same:
            return {row["name"]: row["ms"] for row in other["rows"] if row.get("phase") == "family"}
    return {}


def _minus(value: float, *others: float | None) -> float | None:
    return None if None in others else value - sum(filter(None, others))


def _in_unit(value: float | None, unit: str) -> str | None:
    return None if value is None else f"{shown(value)} {unit}"
