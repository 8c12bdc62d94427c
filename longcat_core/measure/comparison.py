"""Two settings of one network side by side: what was measured of each, as text and as a picture.

The picture is drawn with Pillow, which ComfyUI brings, and not with matplotlib, which it does not.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from .results import markdown, shown

if TYPE_CHECKING:
    from PIL import Image

    from ..model.config import Optimizations

WIDTH, MARGIN, LABEL, BAR, GAP = 960, 28, 190, 34, 12
INK, FAINT, PAPER = (35, 38, 42), (120, 126, 133), (255, 255, 255)
COLOURS = ((59, 111, 182), (217, 130, 43))


@dataclass
class Side:
    """name; the switches; first_s: the first step, with what compiles; times_ms: the later steps; peak_gib: of them,
    weights included, or None where the device does not tell."""

    name: str
    optimizations: Optimizations
    attention: str
    first_s: float
    times_ms: Sequence[float] = field(default_factory=tuple)
    peak_gib: float | None = None

    @property
    def ms(self) -> float:
        return statistics.median(self.times_ms)


# What is shown of a side: name, unit, value.
FIGURES: tuple[tuple[str, str, Callable[[Side], float | None]], ...] = (
    ("a step", "ms", lambda side: side.ms),
    ("first step", "s", lambda side: side.first_s),
    ("peak memory", "GiB", lambda side: side.peak_gib),
)


def differences(sides: Sequence[Side]) -> dict[str, list[Any]]:
    """Switches that are not the same in all, with the value of each side."""
    values = [asdict(side.optimizations) for side in sides]
    return {name: [v[name] for v in values] for name in values[0] if len({str(v[name]) for v in values}) > 1}


def _spoken(value: Any) -> str:
    return {True: "on", False: "off"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def verdict(sides: Sequence[Side]) -> str:
    """One sentence: which is faster, by how much."""
    one, other = sides
    ratio = other.ms / one.ms
    if abs(ratio - 1) < 0.01:
        return f"{one.name} and {other.name} take the same time."
    fast, slow = (one, other) if ratio > 1 else (other, one)
    return f"{fast.name} is {max(ratio, 1 / ratio):.2f} times as fast as {slow.name}."


def text(sides: Sequence[Side], heading: str, closing: str) -> str:
    """The report: heading, a table of figures, the switches that differ, closing."""
    rows = [
        (f"{name} ({unit})", *(value(side) for side in sides))
        for name, unit, value in FIGURES
        if any(value(side) is not None for side in sides)
    ]
    rows.append(("attention", *(side.attention for side in sides)))
    rows += [(name, *map(_spoken, values)) for name, values in differences(sides).items() if name != "attention"]
    table = markdown(("", *(side.name for side in sides)), rows)
    spread = [f"{side.name}: {', '.join(shown(ms) for ms in side.times_ms)} ms" for side in sides]
    return "\n\n".join((heading, verdict(sides), table, "Every timed step: " + "; ".join(spread) + ".", closing))


def draw(sides: Sequence[Side], heading: str, closing: str) -> Image.Image:
    """Bars of every figure, a side below the other; RGB."""
    from PIL import Image, ImageDraw, ImageFont

    figures = [figure for figure in FIGURES if any(figure[2](side) for side in sides)]
    block = len(sides) * (BAR + 4) + GAP + 26
    differing = differences(sides)
    height = 150 + block * len(figures) + 24 * len(differing) + 40
    sheet = Image.new("RGB", (WIDTH, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    large, normal, small = (ImageFont.load_default(size) for size in (26, 18, 15))

    def write(x: float, y: float, words: str, font: Any = normal, fill: Any = INK, anchor: str = "la") -> None:
        while font is not large and pen.textlength(words, font) > WIDTH - MARGIN - x and len(words) > 4:
            words = words[:-4] + "..."
        pen.text((x, y), words, fill=fill, font=font, anchor=anchor)

    write(MARGIN, 22, verdict(sides), large)
    write(MARGIN, 62, heading, small, FAINT)
    y = 100
    for name, unit, value in figures:
        found = [value(side) or 0.0 for side in sides]
        write(MARGIN, y, name)
        y += 26
        room = WIDTH - 2 * MARGIN - LABEL - 130
        for side, number, colour in zip(sides, found, COLOURS, strict=True):
            length = room * number / max(found) if max(found) else 0
            write(MARGIN + LABEL - 12, y + BAR / 2, side.name, small, anchor="rm")
            pen.rectangle((MARGIN + LABEL, y, MARGIN + LABEL + max(length, 1), y + BAR), fill=colour)
            write(MARGIN + LABEL + length + 10, y + BAR / 2, f"{shown(number)} {unit}", small, anchor="lm")
            y += BAR + 4
        y += GAP
    for name, values in differing.items():
        told = ", ".join(f"{side.name} {_spoken(value)}" for side, value in zip(sides, values, strict=True))
        write(MARGIN, y, f"{name}: {told}", small, FAINT)
        y += 24
    write(MARGIN, y + 6, closing, small, FAINT)
    return sheet
