"""Bar charts, line charts and frames side by side, drawn with Pillow, which ComfyUI ships. Every image is RGB."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..errors import LongCatError
from ..generate.lettering import fitting, wrap
from ..generate.media import cell_form
from .fidelity import Fidelity, Setting, decibels, psnr

if TYPE_CHECKING:
    from PIL import Image

Color = tuple[int, int, int]
Point = tuple[float, float]

WIDTH, MARGIN = 960, 28
INK, FAINT, PAPER, GRID = (35, 38, 42), (120, 126, 133), (255, 255, 255), (226, 229, 232)
BLUE, ORANGE, GREEN, GRAY = (59, 111, 182), (217, 130, 43), (76, 159, 112), (154, 163, 173)
COLORS = (BLUE, ORANGE, GREEN, (196, 78, 82), (129, 91, 166), (140, 98, 70), (40, 160, 170), (205, 95, 150))
FLOOR_COLOR = FAINT
# Lines are drawn at this multiple of their size and reduced, which antialiases them.
FINE = 3
LEFT, LEGEND, SAMPLE = 84, 24, 35
# Pixels of a dash and of the gap behind it; a solid line has none.
SOLID, SHORT, DASH, LONG = 0, 3, 7, 14
CELL, CELL_GAP, ROW_LABEL = 216, 12, 28
# A difference is amplified by the largest gain that keeps this percentage of its pixels below white.
GAINS, KEPT = (1, 2, 4, 8, 16, 32, 64, 128), 99.9


def require_pillow(instead: str = "") -> None:
    """Raise LongCatError if Pillow is missing. instead: another way out, appended to the remedy."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise LongCatError(f"charts need Pillow; run: pip install 'pillow>=10.1'{instead}") from error


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def cut(words: str, font: Any, width: float) -> str:
    """`words`, shortened with three dots where they are wider than `width` pixels."""
    if font.getlength(words) <= width:
        return words
    return f"{words[: fitting(words, lambda start: font.getlength(f'{start}...'), width)]}..."


def _sheet(title: str, above: Sequence[str], height: int) -> tuple[Image.Image, Any, int]:
    """A sheet with a title and lines of small print above `height` pixels, its pen, and where those pixels begin."""
    from PIL import Image, ImageDraw

    room = WIDTH - 2 * MARGIN
    lines = [line for words in above for line in wrap(words, _font(15).getlength, room)]
    top = 66 + 20 * len(lines)
    sheet = Image.new("RGB", (WIDTH, top + height), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, 22), cut(title, _font(24), room), fill=INK, font=_font(24))
    for i, line in enumerate(lines):
        pen.text((MARGIN, 60 + 20 * i), line, fill=FAINT, font=_font(15))
    return sheet, pen, top


# --- bars ------------------------------------------------------------------------------------------------------------


class Bar(NamedTuple):
    """A bar without a label belongs to the bar above it. shown: the value as text, written at its end. marks: single
    measurements, whose range is drawn on the bar."""

    label: str
    value: float
    color: Color
    shown: str
    marks: Sequence[float] = ()


class Bars(NamedTuple):
    """Bars on one scale, with a heading above them."""

    heading: str
    bars: Sequence[Bar]


def bar_chart(
    title: str,
    groups: Sequence[Bars],
    above: Sequence[str] = (),
    below: Sequence[str] = (),
    legend: Sequence[tuple[str, Color]] = (),
) -> Image.Image:
    """Horizontal bars from the top down, each group on its own scale. above, below: lines of small print."""
    bars, font = [bar for group in groups for bar in group.bars], _font(15)
    thick = 34 if len(bars) <= 8 else 20 if all(bar.label for bar in bars) else 13
    # Space above a bar that begins a label, where bars without one follow it.
    gap = 8 if thick < 20 else 0
    left = MARGIN + 12 + min(max(font.getlength(bar.label) for bar in bars), WIDTH * 0.4)
    room = WIDTH - MARGIN - left - max(font.getlength(bar.shown) for bar in bars) - 12
    height = LEGEND * len(legend) + (thick + 4) * len(bars) + gap * sum(bool(bar.label) for bar in bars)
    sheet, pen, top = _sheet(title, above, height + 38 * len(groups) + 24 * len(below) + MARGIN)
    y = top + 6
    for words, color in legend:
        pen.rectangle((MARGIN, y + 4, MARGIN + 20, y + 14), fill=color)
        pen.text((MARGIN + 32, y), words, fill=INK, font=font)
        y += LEGEND
    for group in groups:
        pen.text((MARGIN, y), group.heading, fill=INK, font=_font(18))
        y += 26
        values = [0.0, *(value for bar in group.bars for value in (bar.value, *bar.marks))]
        scale = room / ((max(values) - min(values)) or 1)
        zero = left - scale * min(values)
        for bar in group.bars:
            y += gap if bar.label else 0
            end = zero + scale * bar.value
            pen.text((left - 12, y + thick / 2), cut(bar.label, font, left - MARGIN - 12), INK, font, anchor="rm")
            pen.rectangle((min(zero, end), y, max(zero, end, zero + 1), y + thick), fill=bar.color)
            places = [zero + scale * mark for mark in sorted(bar.marks)]
            pen.line([(place, y + thick / 2) for place in places], INK, width=2)
            for place in places:
                pen.line([(place, y + thick / 4), (place, y + 3 * thick / 4)], INK, width=2)
            pen.text((max(zero, end, *places) + 10, y + thick / 2), bar.shown, INK, font, anchor="lm")
            y += thick + 4
        y += 12
    for words in below:
        pen.text((MARGIN, y), cut(words, font, WIDTH - 2 * MARGIN), fill=FAINT, font=font)
        y += 24
    return sheet


class Stack(NamedTuple):
    """A bar of parts one after the other, each with its name and its value. shown: written at its end."""

    label: str
    parts: Sequence[tuple[str, float]]
    shown: str


def stacked_chart(
    title: str,
    stacks: Sequence[Stack],
    colors: Mapping[str, Color],
    names: Mapping[str, str],
    above: Sequence[str] = (),
) -> Image.Image:
    """Horizontal stacked bars on one scale, with the value of each part that has room for it, and a legend of the parts
    that occur, in their order. colors, names: of parts by name."""
    font, small, thick = _font(15), _font(13), 40
    found = list(dict.fromkeys(part for stack in stacks for part, _ in stack.parts))
    left = MARGIN + 12 + min(max(font.getlength(stack.label) for stack in stacks), WIDTH * 0.3)
    room = WIDTH - MARGIN - left - max(font.getlength(stack.shown) for stack in stacks) - 12
    scale = room / (max(sum(value for _, value in stack.parts) for stack in stacks) or 1)
    rows = math.ceil(len(found) / 2)
    sheet, pen, top = _sheet(title, above, (thick + 10) * len(stacks) + LEGEND * rows + 24 + MARGIN)
    y = top + 6
    for stack in stacks:
        x = left
        pen.text((left - 12, y + thick / 2), cut(stack.label, font, left - MARGIN - 12), INK, font, anchor="rm")
        for part, value in stack.parts:
            end, said = x + scale * value, f"{value:.1f}"
            pen.rectangle((x, y, max(x, end), y + thick), fill=colors[part])
            if small.getlength(said) + 6 < end - x:
                light = sum(colors[part]) > 384
                pen.text(((x + end) / 2, y + thick / 2), said, INK if light else PAPER, small, anchor="mm")
            x = end
        pen.text((x + 10, y + thick / 2), stack.shown, INK, font, anchor="lm")
        y += thick + 10
    y += 12
    for i, part in enumerate(found):
        column, row = divmod(i, rows)
        x, line = MARGIN + column * (WIDTH - 2 * MARGIN) // 2, y + LEGEND * row
        pen.rectangle((x, line + 4, x + 20, line + 14), fill=colors[part])
        pen.text((x + 32, line), cut(names[part], font, WIDTH / 2 - 80), INK, font)
    return sheet


# --- lines -----------------------------------------------------------------------------------------------------------


class Axis(NamedTuple):
    """ticks: where they stand, in the units of low and high, and what they say."""

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]

    def place(self, value: float, start: float, end: float) -> float:
        """The pixel of a value on a line from `start` (low) to `end` (high)."""
        if self.low == self.high:
            return (start + end) / 2
        return start + (end - start) * (min(value, self.high) - self.low) / (self.high - self.low)


class Line(NamedTuple):
    """points: (x, y) in the units of the axes, from left to right; y may be infinite, which is drawn at the top. dash:
    in pixels."""

    points: Sequence[Point]
    color: Color
    dash: int = SOLID


class Panel(NamedTuple):
    name: str
    height: int
    y: Axis
    lines: Sequence[Line]


def line_chart(
    title: str,
    panels: Sequence[Panel],
    x: Axis,
    x_name: str,
    above: Sequence[str] = (),
    legend: Sequence[tuple[str, Color, int]] = (),
    note: str = "",
    marks: Sequence[float] = (),
) -> Image.Image:
    """Panels one below the other over one x axis. legend: text, color, dash; note: small print below it; marks:
    places on the x axis with a vertical line."""
    from PIL import Image, ImageDraw

    height = sum(panel.height + 70 for panel in panels) + 4
    sheet, pen, start = _sheet(title, above, height + LEGEND * (len(legend) + bool(note)) + MARGIN)
    boxes, y = [], start + 30
    for panel in panels:
        boxes.append((LEFT, y, WIDTH - MARGIN, y + panel.height))
        y += panel.height + 70
    fine = Image.new("RGB", (WIDTH * FINE, sheet.height * FINE), PAPER)
    fine_pen = ImageDraw.Draw(fine)
    for (left, top, right, bottom), panel in zip(boxes, panels, strict=True):
        for value, _ in panel.y.ticks:
            at = FINE * panel.y.place(value, bottom, top)
            fine_pen.line([(left * FINE, at), (right * FINE, at)], fill=GRID, width=FINE)
        for mark in marks:
            at = FINE * x.place(mark, left, right)
            fine_pen.line([(at, top * FINE), (at, bottom * FINE)], fill=GRAY, width=2 * FINE)
        for line in panel.lines:
            places = [(FINE * x.place(a, left, right), FINE * panel.y.place(b, bottom, top)) for a, b in line.points]
            _draw_line(fine_pen, places, line)
    sheet.paste(fine.reduce(FINE).crop((0, start, *sheet.size)), (0, start))
    for (left, top, right, bottom), panel in zip(boxes, panels, strict=True):
        pen.text((MARGIN, top - 26), panel.name, fill=INK, font=_font(17))
        for value, label in panel.y.ticks:
            pen.text((left - 8, panel.y.place(value, bottom, top)), label, FAINT, _font(14), anchor="rm")
        for value, label in x.ticks:
            pen.text((x.place(value, left, right), bottom + 8), label, FAINT, _font(14), anchor="ma")
        pen.text((right, bottom + 24), x_name, FAINT, _font(14), anchor="ra")
    y = start + height
    for words, color, dash in legend:
        for at in range(0, SAMPLE, 2 * dash or SAMPLE):
            end = min(SAMPLE, at + (dash or SAMPLE))
            pen.rectangle((MARGIN + at, y + 7, MARGIN + end - 1, y + 11), fill=color)
        text = MARGIN + SAMPLE + 12
        pen.text((text, y), cut(words, _font(15), WIDTH - MARGIN - text), INK, _font(15))
        y += LEGEND
    pen.text((MARGIN, y), cut(note, _font(15), WIDTH - 2 * MARGIN), FAINT, _font(15))
    return sheet


def _draw_line(pen: Any, points: Sequence[Point], line: Line) -> None:
    if len(points) > 1:
        for piece in _dashes(points, line.dash) if line.dash else [points]:
            pen.line(piece, fill=line.color, width=2 * FINE, joint="curve")
    radius = 2.5 * FINE
    for x, y in points if not line.dash or len(points) == 1 else ():
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=line.color)


def _dashes(points: Sequence[Point], dash: int) -> Iterator[list[Point]]:
    """Every other stretch of `dash` pixels along the line."""
    line = np.array(points)
    along = np.concatenate(([0], np.cumsum(np.hypot(*np.diff(line, axis=0).T))))
    for start in np.arange(0, along[-1], 2 * dash * FINE):
        inner = along[(along > start) & (along < start + dash * FINE)]
        at = np.concatenate(([start], inner, [min(start + dash * FINE, along[-1])]))
        yield [(float(np.interp(a, along, line[:, 0])), float(np.interp(a, along, line[:, 1]))) for a in at]


def _step(room: float, most: int) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that divides `room` into at most `most` parts."""
    unit = 10 ** math.floor(math.log10(room / most))
    return next(factor * unit for factor in (1, 2, 5, 10) if room / (factor * unit) <= most)


def even_axis(low: float, high: float, most: int = 6) -> Axis:
    """From `low` to `high`, rounded outwards to ticks in at most about `most` steps."""
    step = _step(high - low, most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    places = max(0, -math.floor(math.log10(step)))
    return Axis(first * step, last * step, [(i * step, f"{i * step:.{places}f}") for i in range(first, last + 1)])


def log_axis(values: Sequence[float]) -> Axis:
    """Of base-10 logarithms of positive values; ticks at 1, 2 and 5 times powers of ten."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    ticks = [factor * 10**power for power in range(low, high + 1) for factor in (1, 2, 5)]
    below = max((tick for tick in ticks if tick <= min(values)), default=ticks[0])
    above = min((tick for tick in ticks if tick >= max(values)), default=ticks[-1])
    shown = [(math.log10(tick), f"{tick:,}") for tick in ticks if below <= tick <= above]
    return Axis(math.log10(below), math.log10(above), shown)


# --- fidelity --------------------------------------------------------------------------------------------------------


def styles(count: int) -> list[tuple[Color, int]]:
    """Color and dash of `count` lines: all colors solid, then all with long dashes, then with short ones.

    No two of 24 lines look the same, and none looks like the noise floor.
    """
    pairs = [(color, dash) for dash in (SOLID, LONG, SHORT) for color in COLORS]
    return list(itertools.islice(itertools.cycle(pairs), count))


def fidelity_plot(fidelity: Fidelity) -> Image.Image:
    """PSNR and SSIM of every frame against the reference, each the median over the videos; the noise floor dashed."""
    settings, floor = fidelity.compared, fidelity.floor
    looks = dict(zip((setting.name for setting in settings), styles(len(fidelity.others)), strict=False))
    if floor is not None:
        looks[floor.name] = FLOOR_COLOR, DASH
    first, last = settings[0].distances[0].given, settings[0].distances[0].given + settings[0].mse.shape[1] - 1
    # The floor first: on top it would hide what coincides with it.
    order = settings if floor is None else [floor, *fidelity.others]
    mse = [[psnr(statistics.median_high(frame)) for frame in setting.mse.T.tolist()] for setting in order]
    ssim = [[statistics.median_low(frame) for frame in setting.ssim.T.tolist()] for setting in order]

    def panel(name: str, height: int, axis: Axis, series: Sequence[Sequence[float]]) -> Panel:
        lines = [
            Line(list(enumerate(values, first)), *looks[setting.name])
            for setting, values in zip(order, series, strict=True)
        ]
        return Panel(name, height, axis, lines)

    def legend(setting: Setting) -> tuple[str, Color, int]:
        return f"{setting.title}   {decibels(setting.psnr)}, SSIM {setting.typical_ssim:.4f}", *looks[setting.name]

    several = "; median over the videos" if len(settings[0].distances) > 1 else ""
    shares = even_axis(min(0.999, *map(min, ssim)), 1.0, 5)
    return line_chart(
        f"Every frame against {fidelity.reference.name}, same seed{several}",
        (panel("PSNR (dB)", 330, _decibel_axis(mse), mse), panel("SSIM", 230, shares, ssim)),
        Axis(first, last, [(frame, str(frame)) for frame in _frame_ticks(first, last)]),
        "frame",
        [fidelity.what, *["A segment begins at the vertical line."] * bool(fidelity.joins)],
        [legend(setting) for setting in settings],
        "" if floor else f"no noise floor: {fidelity.no_floor}",
        # Between the last frame of a segment and the first one of the next.
        [join - 0.5 for join in fidelity.joins],
    )


def _decibel_axis(series: Sequence[Sequence[float]]) -> Axis:
    """Identical frames, of infinite PSNR, stand on top of all others."""
    finite = [value for values in series for value in values if math.isfinite(value)] or [0.0, 10.0]
    # At least 5 dB, so that differences of a fraction of that look small.
    low, high = min(finite), max(finite)
    around = max(0.0, 5 - (high - low)) / 2
    low, high, ticks = even_axis(low - around, high + around)
    if math.inf in itertools.chain(*series):
        high += ticks[1][0] - ticks[0][0]
        ticks = [*ticks, (high, "identical")]
    return Axis(low, high, ticks)


def _frame_ticks(first: int, last: int) -> list[int]:
    step = next((s for s in (1, 2, 4, 8, 16, 20, 40, 100, 200) if (last - first) / s <= 12), 400)
    return [first, *(frame for frame in range(0, last + 1, step) if frame > first + step / 2)]


def side_by_side(fidelity: Fidelity) -> Image.Image:
    """Frames of the first video, one row for each setting: on the left its own, on the right the amplified difference
    from the reference."""
    from PIL import Image, ImageDraw

    reference = fidelity.reference.shots
    _, height, width, _ = reference.shape
    size, resampling = cell_form(height, width, CELL)
    half = max(len(reference) * (size[0] + CELL_GAP), CELL)
    step = size[1] + ROW_LABEL + CELL_GAP
    settings = [fidelity.reference, *fidelity.compared]
    sheet = Image.new("RGB", (2 * (MARGIN + half) + MARGIN, MARGIN + len(settings) * step + MARGIN), PAPER)
    pen = ImageDraw.Draw(sheet)
    columns = (MARGIN, 2 * MARGIN + half)
    for y, setting in zip(itertools.count(MARGIN, step), settings, strict=False):
        parts = [(setting.title, setting.shots)]
        if setting.distances:
            own = f"{setting.title}   {decibels(setting.videos[0])}", setting.shots
            parts = [own, _difference(setting, fidelity)]
        for x, (label, shots) in zip(columns, parts, strict=False):
            pen.text((x, y), cut(label, _font(18), half), fill=INK, font=_font(18))
            for column, shot in enumerate(shots):
                cell = Image.fromarray(np.ascontiguousarray(shot)).resize(size, resampling)
                sheet.paste(cell, (x + column * (size[0] + CELL_GAP), y + ROW_LABEL))
    for x in columns:
        for column, frame in enumerate(fidelity.picks):
            at = x + column * (size[0] + CELL_GAP), MARGIN + len(settings) * step - 4
            pen.text(at, f"frame {frame}", fill=FAINT, font=_font(16))
    return sheet


def _difference(setting: Setting, fidelity: Fidelity) -> tuple[str, np.ndarray]:
    """Label and pixels of |setting - reference| times the gain."""
    reference = fidelity.reference
    apart = np.abs(setting.shots.astype(np.int16) - reference.shots.astype(np.int16))
    if not apart.any():
        return f"no difference from {reference.name} in these frames", apart.astype(np.uint8)
    bright = max(np.percentile(apart, KEPT), 1)
    gain = max(gain for gain in GAINS if gain == 1 or gain * bright <= 255)
    return f"difference from {reference.name}, times {gain}", np.clip(apart * gain, 0, 255).astype(np.uint8)
