"""Pictures of results, as PNG bytes. Needs matplotlib (extra `bench`), whose global state is left alone."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

from ..errors import LongCatError
from ..measure.results import name_of

BLUE, ORANGE, GREEN, GREY, RED = "#3b6fb6", "#d9822b", "#4c9f70", "#9aa3ad", "#c44e52"
PHASE_COLOURS = {"baseline": GREY, "added": BLUE, "removed": ORANGE, "fp8": GREEN, "path": BLUE, "distilled": ORANGE}


def require_matplotlib(instead: str = "") -> None:
    """Raises LongCatError, naming the remedy, where matplotlib is not installed. instead: another way out."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise LongCatError(f"plots need matplotlib; run: pip install 'matplotlib>=3.8'{instead}") from error


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="both", alpha=0.25)
    axes.set_axisbelow(True)
    return figure, axes


def _png(figure: Any) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _ok(results: dict[str, Any], *needed: str) -> list[dict[str, Any]]:
    return [
        row
        for row in results["rows"]
        if row.get("status") == "ok" and all(isinstance(row.get(name), (int, float)) for name in needed)
    ]


def bars(rows: list[tuple[str, float, str]], label: str, title: str, form: str = "{:.0f}") -> bytes:
    """Horizontal bars of (name, value, colour), the first on top."""
    figure, axes = _figure(9, 1.2 + 0.34 * len(rows))
    places = range(len(rows))
    drawn = axes.barh(places, [row[1] for row in rows], color=[row[2] for row in rows])
    axes.set_yticks(places, [row[0] for row in rows])
    axes.invert_yaxis()
    axes.bar_label(drawn, labels=[form.format(row[1]) for row in rows], padding=3, fontsize=8)
    axes.margins(x=0.12)
    axes.set_xlabel(label)
    axes.set_title(title, loc="left")
    return _png(figure)


def _steps(results: dict[str, Any]) -> bytes:
    rows = [r for r in _ok(results, "ms") if r.get("phase") not in ("preparation", "attention")]
    size = results["inputs"].get("size", "")
    title = f"One denoising step, {size}, {results['inputs'].get('blocks', '?')} blocks"
    return bars([(r["name"], r["ms"], PHASE_COLOURS.get(r.get("phase"), BLUE)) for r in rows], "ms", title)


def _worth(results: dict[str, Any]) -> bytes:
    """Measured share of the eager baseline's time, added and taken alone, beside the published guess."""
    from .ablation import GUESSED_OF_S

    shares: dict[str, dict[str, float]] = {}
    for row in _ok(results, "share"):
        name = row["name"].removeprefix("without ")
        shares.setdefault(name, {})[row["phase"]] = 100 * row["share"]
        if row.get("guess_s"):
            shares[name]["guess"] = 100 * row["guess_s"] / GUESSED_OF_S
    figure, axes = _figure(9, 1.6 + 0.55 * len(shares))
    kinds = (
        (-0.27, "added", BLUE, "added"),
        (0, "removed", ORANGE, "taken alone from the full set"),
        (0, "fp8", GREEN, "lossy: fp8 over the exact set, 8-bit attention over fp8"),
        (0.27, "guess", GREY, "guess"),
    )
    for offset, kind, colour, label in kinds:
        values = {i: found[kind] for i, found in enumerate(shares.values()) if kind in found}
        if values:
            at = [i + offset for i in values]
            axes.barh(at, list(values.values()), height=0.26, color=colour, label=label)
    axes.set_yticks(range(len(shares)), list(shares))
    axes.invert_yaxis()
    axes.legend(frameon=False)
    axes.set_xlabel("% of the eager baseline's time")
    axes.set_title("What each optimization is worth", loc="left")
    return _png(figure)


def _families(results: dict[str, Any]) -> bytes:
    rows = [(f"{r['name']} ({100 * r['share']:.0f} %)", r["ms"], BLUE) for r in _ok(results, "ms", "share")]
    return bars(rows, "ms on the device", f"Where one step goes: {results['inputs'].get('variant', '')}", "{:.1f}")


def _growth(results: dict[str, Any]) -> bytes:
    rows = _ok(results, "ms", "tokens")
    figure, axes = _figure(8, 4.5)
    tokens = [row["tokens"] for row in rows]
    axes.loglog(tokens, [row["ms"] for row in rows], "o-", color=BLUE, label="ms a step")
    axes.set_xlabel("tokens")
    axes.set_ylabel("ms", color=BLUE)
    peaks = [(row["tokens"], row["peak_gib"]) for row in rows if row.get("peak_gib")]
    if peaks:
        other = axes.twinx()
        other.plot(*zip(*peaks, strict=True), "s--", color=ORANGE)
        other.set_ylabel("peak GiB", color=ORANGE)
        other.set_ylim(bottom=0)
    axes.set_title(f"Time and memory by tokens, {results['inputs'].get('blocks', '?')} blocks, batch 1", loc="left")
    return _png(figure)


def _rates(results: dict[str, Any]) -> bytes:
    rows = [r for r in _ok(results, "ms", "tflops") if r["attention"] == "self"]
    named = [
        (f"{r['name']}, {r['tflops']:.0f} TFLOP/s", r["ms"], BLUE if r["exact"] else ORANGE)
        for r in sorted(rows, key=lambda r: r["ms"])
    ]
    return bars(named, "ms", "Self-attention of one block (orange: lossy)", "{:.1f}")


def _fits(results: dict[str, Any]) -> bytes:
    rows = [(r["name"], r["fit"], BLUE if not r["compiled"] else ORANGE) for r in _ok(results, "fit")]
    return bars(rows, "measured / counted", "Peak memory of a forward over the counted", "{:.3f}")


def _errors(results: dict[str, Any]) -> bytes:
    rows = [(r["name"], r["error"], GREY if "baseline" in r["name"] else BLUE) for r in _ok(results, "error")]
    return bars([r for r in rows if r[1] > 0], "relative error", "Error against the reference, same weights", "{:.4f}")


def _training(results: dict[str, Any]) -> bytes:
    return bars([(r["name"], r["ms"], BLUE) for r in _ok(results, "ms")], "ms", "A training step", "{:.1f}")


# The pictures of every kind of results: (what the file's name ends in, what draws it, what rows must have).
PICTURES: dict[str, tuple[tuple[str, Callable[[dict], bytes], tuple[str, ...]], ...]] = {
    "paths": (("", _steps, ("ms",)),),
    "ablation": (("", _steps, ("ms",)), ("-worth", _worth, ("share",))),
    "profile": (("", _families, ("ms", "share")),),
    "scale": (("", _growth, ("ms", "tokens")),),
    "backends": (("", _rates, ("tflops",)),),
    "memory": (("", _fits, ("fit",)),),
    "exactness": (("", _errors, ("error",)),),
    "policies": (("", _errors, ("error",)),),
    "training": (("", _training, ("ms",)),),
    "continuation": (("", _steps, ("ms",)),),
    "refine": (("", _steps, ("ms",)),),
}


def picture_names(results: dict[str, Any]) -> list[str]:
    """The files that `pictures` may make."""
    return [f"{name_of(results)}{end}.png" for end, _, _ in PICTURES.get(results["kind"], ())]


def pictures(results: dict[str, Any]) -> dict[str, bytes]:
    """PNG files of one file of results, by name; none where no row has what a picture shows."""
    found = {}
    for name, (_, draw, needed) in zip(picture_names(results), PICTURES.get(results["kind"], ()), strict=True):
        if any(math.isfinite(row[needed[0]]) for row in _ok(results, *needed)):
            found[name] = draw(results)
    return found
