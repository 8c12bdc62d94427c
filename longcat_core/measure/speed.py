"""Two settings of one network, timed in turns: what was measured of each, as text and as a chart."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..optimize.attention import BACKENDS
from ..optimize.switches import Optimizations
from .ratio import FEWEST, ratio_of
from .results import markdown, shown

if TYPE_CHECKING:
    from PIL import Image

SEED = 0
# Tokens of an unconditional and a conditional prompt: the default negative prompt's, and a sentence or two.
TEXT_TOKENS = (126, 77)
RULE = (
    "A and B took turns. The range of their ratio holds the true value in 9 of 10 measurements; if it holds 1, A and B "
    "are not distinguishable."
)
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
    """Measurements of one setting. first_s: seconds of the first step of all, compilation included; times_ms:
    milliseconds of each timed step; peak_gib: peak memory, weights included, or None if the device does not report it.
    """

    name: str
    optimizations: Optimizations
    attention: str
    first_s: float
    times_ms: Sequence[float] = field(default_factory=tuple)
    peak_gib: float | None = None

    @property
    def ms(self) -> float:
        return statistics.median(self.times_ms)


def turns(steps: int, often: bool) -> list[tuple[int, int]]:
    """Side (0 or 1) and number of timed steps of each turn, so that a drift of the machine's clocks hits both sides.

    often: A B B A A B ..., for sides that share their weights; else A, all of B, A, because each turn may load weights.
    """
    if often:
        order = [(place + 1) // 2 % 2 for place in range(2 * steps)]
    else:
        order = [0] * math.ceil(steps / 2) + [1] * steps + [0] * (steps // 2)
    return [(side, len(list(group))) for side, group in itertools.groupby(order)]


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
    """One sentence: which side is faster, by how much and with what range, if that can be said."""
    one, other = sides
    ratio = ratio_of(one.times_ms, other.times_ms)
    if not ratio.enough:
        return f"{one.name} and {other.name} are not distinguishable by fewer than {FEWEST} steps of each."
    if not ratio.distinguishable:
        span = f"{ratio.least:.2f} to {ratio.most:.2f}"
        return f"{one.name} and {other.name} are not distinguishable: {other.name} takes {span} times as long."
    fast, slow = (one, other) if ratio.middle > 1 else (other, one)
    ratio = ratio_of(fast.times_ms, slow.times_ms)
    # As many digits as it takes to show that the range lies above 1.
    middle, least, most = (f"{value:.{2 if ratio.least >= 1.01 else 4}f}" for value in ratio[:3])
    return f"{fast.name} is {middle} times as fast as {slow.name} ({least} to {most})."


def _figures(sides: Sequence[TimedSetting]) -> Iterator[tuple[str, str, list[float | None]]]:
    """Name, unit and every side's value of what was measured of at least one of the sides."""
    for name, unit, value in FIGURES:
        values = [value(side) for side in sides]
        if any(number is not None for number in values):
            yield name, unit, values


def text(sides: Sequence[TimedSetting], heading: str, closing: str) -> str:
    """The report: heading, verdict, a table of figures and differing switches, every timed step, closing."""
    rows: list[tuple[Any, ...]] = [(f"{name} ({unit})", *values) for name, unit, values in _figures(sides)]
    rows.insert(1, ("least to most (ms)", *(_range(side) for side in sides)))
    rows.append(("attention", *(side.attention for side in sides)))
    rows += [(name, *map(_on_off, values)) for name, values in differences(sides).items() if name != "attention"]
    table = markdown(("", *(side.name for side in sides)), rows)
    spread = "; ".join(f"{side.name}: {', '.join(shown(ms) for ms in side.times_ms)} ms" for side in sides)
    return "\n\n".join((heading, verdict(sides), table, f"Every timed step: {spread}. {RULE}", closing))


def _range(side: TimedSetting) -> str:
    return f"{shown(min(side.times_ms))} to {shown(max(side.times_ms))}"


def draw(sides: Sequence[TimedSetting], heading: str, closing: str) -> Image.Image:
    """A bar for each side and figure, on that of a step the range of the timed steps and a mark for each; RGB."""
    from .charts import COLORS, Bar, Bars, bar_chart

    groups = []
    for name, unit, values in _figures(sides):
        bars = []
        for side, value, color in zip(sides, values, COLORS, strict=False):
            span, marks = (f" ({_range(side)})", side.times_ms) if name == FIGURES[0][0] else ("", ())
            bars.append(Bar(side.name, value or 0.0, color, f"{shown(value or 0.0)} {unit}{span}", marks))
        groups.append(Bars(name, bars))
    switches = [
        f"{name}: " + ", ".join(f"{side.name} {_on_off(value)}" for side, value in zip(sides, values, strict=True))
        for name, values in differences(sides).items()
    ]
    return bar_chart(verdict(sides), groups, [heading], [*switches, closing])
