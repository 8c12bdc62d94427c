"""Two settings of one network, timed: what was measured of each, as text and as a chart."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..optimize.attention import BACKENDS
from ..optimize.switches import Optimizations
from .charts import COLORS, Bar, Bars, bar_chart
from .results import markdown, shown

if TYPE_CHECKING:
    from PIL import Image

SEED = 0
# Tokens of an unconditional and a conditional prompt: the default negative prompt's, and a sentence or two.
TEXT_TOKENS = (126, 77)
# Every switch with its optimization off.
PLAIN = {
    "fused_qkv": False,
    "fused_ffn": False,
    "explicit_fp32": False,
    "text_mode": "padded",
    "reuse_text": False,
    "reuse_modulation": False,
    "attention": "sdpa-flash",
    "compile": "off",
    "fused_step": False,
    "fused_kernels": False,
    "fused_text": False,
}


def plain(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """PLAIN for a network on `device` in `dtype`; attention is FlashAttention-2 where that runs."""
    half = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    return PLAIN if half else PLAIN | {"attention": "sdpa"}


def kernel_name(attend: Any) -> str:
    """The backend that an attention function belongs to."""
    return next((backend.name for backend in BACKENDS if backend.attend is attend), "?")


@dataclass
class TimedSetting:
    """Measurements of one setting. first_s: seconds of the first step, compilation included; times_ms: milliseconds
    of each later step; peak_gib: their peak memory, weights included, or None where the device does not report it."""

    name: str
    optimizations: Optimizations
    attention: str
    first_s: float
    times_ms: Sequence[float] = field(default_factory=tuple)
    peak_gib: float | None = None

    @property
    def ms(self) -> float:
        return statistics.median(self.times_ms)


# Name, unit, value.
FIGURES: tuple[tuple[str, str, Callable[[TimedSetting], float | None]], ...] = (
    ("a step", "ms", lambda side: side.ms),
    ("first step", "s", lambda side: side.first_s),
    ("peak memory", "GiB", lambda side: side.peak_gib),
)


def differences(sides: Sequence[TimedSetting]) -> dict[str, list[Any]]:
    """Switches that differ between the sides, with the value of each side."""
    values = [asdict(side.optimizations) for side in sides]
    return {name: [v[name] for v in values] for name in values[0] if len({str(v[name]) for v in values}) > 1}


def _on_off(value: Any) -> str:
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


def verdict(sides: Sequence[TimedSetting]) -> str:
    """One sentence: which side is faster, and by how much."""
    one, other = sides
    ratio = other.ms / one.ms
    if abs(ratio - 1) < 0.01:
        return f"{one.name} and {other.name} take the same time."
    fast, slow = (one, other) if ratio > 1 else (other, one)
    return f"{fast.name} is {max(ratio, 1 / ratio):.2f} times as fast as {slow.name}."


def _figures(sides: Sequence[TimedSetting]) -> Iterator[tuple[str, str, list[float | None]]]:
    """Name, unit and every side's value of what was measured of at least one of the sides."""
    for name, unit, value in FIGURES:
        values = [value(side) for side in sides]
        if any(number is not None for number in values):
            yield name, unit, values


def text(sides: Sequence[TimedSetting], heading: str, closing: str) -> str:
    """The report: heading, verdict, a table of figures and differing switches, every timed step, closing."""
    rows = [(f"{name} ({unit})", *values) for name, unit, values in _figures(sides)]
    rows.append(("attention", *(side.attention for side in sides)))
    rows += [(name, *map(_on_off, values)) for name, values in differences(sides).items() if name != "attention"]
    table = markdown(("", *(side.name for side in sides)), rows)
    spread = [f"{side.name}: {', '.join(shown(ms) for ms in side.times_ms)} ms" for side in sides]
    return "\n\n".join((heading, verdict(sides), table, "Every timed step: " + "; ".join(spread) + ".", closing))


def draw(sides: Sequence[TimedSetting], heading: str, closing: str) -> Image.Image:
    """A bar for each side and figure; RGB."""
    groups = [
        Bars(name, [
            Bar(side.name, value or 0.0, color, f"{shown(value or 0.0)} {unit}")
            for side, value, color in zip(sides, values, COLORS, strict=False)
        ])
        for name, unit, values in _figures(sides)
    ]  # fmt: skip
    switches = [
        f"{name}: " + ", ".join(f"{side.name} {_on_off(value)}" for side, value in zip(sides, values, strict=True))
        for name, values in differences(sides).items()
    ]
    return bar_chart(verdict(sides), groups, [heading], [*switches, closing])
