"""What a setting costs as pictures: PSNR and SSIM frame by frame, and frames side by side with their difference.

Drawn with Pillow, which ComfyUI brings.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files.media import cell_form, wrap
from .comparison import COLOURS, FAINT, INK, MARGIN, PAPER, WIDTH
from .fidelity import Fidelity, Setting, decibels, psnr

if TYPE_CHECKING:
    from PIL import Image

LINES = (*COLOURS, (76, 159, 112), (196, 78, 82), (129, 91, 166), (140, 98, 70), (40, 160, 170), (205, 95, 150))
FLOOR_LINE, GRID = (120, 126, 133), (226, 229, 232)
# Lines are drawn so many times as large and reduced, which smooths them.
FINE = 3
PANELS, LEFT, LEGEND, DASH = (330, 230), 84, 24, 7
CELL, CELL_GAP, ROW_LABEL = 216, 12, 28
# Of a difference, so that all but so many of its pixels (percent) stay below white.
GAINS, KEPT = (1, 2, 4, 8, 16, 32, 64, 128), 99.9

Point = tuple[float, float]


def colour(fidelity: Fidelity, setting: Setting) -> tuple[int, int, int]:
    return FLOOR_LINE if setting is fidelity.floor else LINES[fidelity.others.index(setting) % len(LINES)]


def plot(fidelity: Fidelity) -> Image.Image:
    """PSNR and SSIM of every frame against the reference, of the videos in the middle; the noise floor dashed; RGB."""
    from PIL import Image, ImageDraw

    settings = fidelity.compared
    head = wrap(fidelity.what, _font(15).getlength, WIDTH - 2 * MARGIN)
    top = 66 + 20 * len(head)
    tops = (top + 30, top + 100 + PANELS[0])
    boxes = [(LEFT, y, WIDTH - MARGIN, y + height) for y, height in zip(tops, PANELS, strict=True)]
    legend_at = boxes[-1][3] + 44
    sheet = Image.new("RGB", (WIDTH, legend_at + LEGEND * (len(settings) + (fidelity.floor is None)) + MARGIN), PAPER)
    first = settings[0].distances[0].given
    series = (
        (
            [[psnr(statistics.median_high(mse)) for mse in setting.mse.T.tolist()] for setting in settings],
            _decibel_axis,
            "PSNR (dB)",
        ),
        (
            [[statistics.median_low(ssim) for ssim in setting.ssim.T.tolist()] for setting in settings],
            _share_axis,
            "SSIM",
        ),
    )
    frames = [(first, first + settings[0].mse.shape[1] - 1)] * 2
    fine = Image.new("RGB", (WIDTH * FINE, sheet.height * FINE), PAPER)
    axes = [axis(values) for values, axis, _ in series]
    for box, (values, _, _), (low, high, ticks), span in zip(boxes, series, axes, frames, strict=True):
        pen = ImageDraw.Draw(fine)
        for value, _ in ticks:
            y = _y(value, low, high, box)
            pen.line([(box[0] * FINE, y * FINE), (box[2] * FINE, y * FINE)], fill=GRID, width=FINE)
        # The floor first, so that nothing hides behind it.
        for setting, numbers in sorted(zip(settings, values, strict=True), key=lambda s: s[0] is not fidelity.floor):
            points = [
                (_x(span[0] + i, *span, box), _y(min(number, high), low, high, box)) for i, number in enumerate(numbers)
            ]
            _line(pen, points, colour(fidelity, setting), dashed=setting is fidelity.floor)
    sheet.paste(fine.reduce(FINE), (0, 0))
    pen = ImageDraw.Draw(sheet)
    several = "; the video in the middle" if len(settings[0].distances) > 1 else ""
    pen.text(
        (MARGIN, 22), f"Every frame against {fidelity.reference.name}, same seed{several}", fill=INK, font=_font(24)
    )
    for i, line in enumerate(head):
        pen.text((MARGIN, 60 + 20 * i), line, fill=FAINT, font=_font(15))
    for box, (_, _, name), (low, high, ticks), span in zip(boxes, series, axes, frames, strict=True):
        pen.text((MARGIN, box[1] - 26), name, fill=INK, font=_font(17))
        for value, label in ticks:
            pen.text((box[0] - 8, _y(value, low, high, box)), label, fill=FAINT, font=_font(14), anchor="rm")
        for frame in _frame_ticks(*span):
            pen.text((_x(frame, *span, box), box[3] + 8), str(frame), fill=FAINT, font=_font(14), anchor="ma")
        pen.text((box[2], box[3] + 24), "frame", fill=FAINT, font=_font(14), anchor="ra")
    for i, setting in enumerate(settings):
        y = legend_at + LEGEND * i
        for x in (0, 8, 16) if setting is fidelity.floor else range(0, 21, 4):
            pen.rectangle((MARGIN + x, y + 6, MARGIN + x + 4, y + 12), fill=colour(fidelity, setting))
        told = f"{setting.title}   {decibels(setting.psnr)}, SSIM {setting.typical_ssim:.4f}"
        pen.text((MARGIN + 32, y), _cut(told, _font(15), WIDTH - 2 * MARGIN - 32), fill=INK, font=_font(15))
    if fidelity.floor is None:
        told = _cut(f"no noise floor: {fidelity.no_floor}", _font(15), WIDTH - 2 * MARGIN)
        pen.text((MARGIN, legend_at + LEGEND * len(settings)), told, fill=FAINT, font=_font(15))
    return sheet


def side_by_side(fidelity: Fidelity) -> Image.Image:
    """Frames of the first video, a setting a row: its own, and right of them the difference, amplified; RGB."""
    from PIL import Image, ImageDraw

    reference = fidelity.reference.shots
    size, filter_ = cell_form(*reference.shape[1:3], CELL)
    across = len(reference) * (size[0] + CELL_GAP)
    half = max(across, CELL)
    step = size[1] + ROW_LABEL + CELL_GAP
    settings = [fidelity.reference, *fidelity.compared]
    sheet = Image.new("RGB", (2 * (MARGIN + half) + MARGIN, MARGIN + len(settings) * step + MARGIN), PAPER)
    pen, font = ImageDraw.Draw(sheet), _font(18)
    for row, setting in enumerate(settings):
        parts = [(setting.title, setting.shots)]
        if setting.distances:
            parts = [
                (f"{setting.title}   {decibels(setting.videos[0])}", setting.shots),
                _difference(setting, fidelity),
            ]
        y = MARGIN + row * step
        for x, (label, shots) in zip((MARGIN, 2 * MARGIN + half), parts, strict=False):
            pen.text((x, y), _cut(label, font, half), fill=INK, font=font)
            for column, shot in enumerate(shots):
                cell = Image.fromarray(np.ascontiguousarray(shot)).resize(size, filter_)
                sheet.paste(cell, (x + column * (size[0] + CELL_GAP), y + ROW_LABEL))
    for x in (MARGIN, 2 * MARGIN + half):
        for column, frame in enumerate(fidelity.picks):
            at = x + column * (size[0] + CELL_GAP), MARGIN + len(settings) * step - 4
            pen.text(at, f"frame {frame}", fill=FAINT, font=_font(16))
    return sheet


def _difference(setting: Setting, fidelity: Fidelity) -> tuple[str, np.ndarray]:
    """Label and pixels |setting - reference|, times the largest gain at which nearly nothing turns white."""
    reference = fidelity.reference
    apart = np.abs(setting.shots.astype(np.int16) - reference.shots.astype(np.int16))
    if not apart.any():
        return f"no difference from {reference.name} in these frames", apart.astype(np.uint8)
    bright = max(np.percentile(apart, KEPT), 1)
    gain = max(gain for gain in GAINS if gain == 1 or gain * bright <= 255)
    return f"difference from {reference.name}, times {gain}", np.clip(apart * gain, 0, 255).astype(np.uint8)


# --- axes and lines --------------------------------------------------------------------------------------------------

Axis = tuple[float, float, list[tuple[float, str]]]


def _decibel_axis(series: Sequence[Sequence[float]]) -> Axis:
    """Lowest, highest and ticks; equal frames, of infinite PSNR, stand on top of all others."""
    finite = [value for values in series for value in values if math.isfinite(value)]
    step = 10 if finite and max(finite) - min(finite) > 30 else 5
    low = step * math.floor(min(finite) / step) if finite else 0
    high = step * math.ceil(max(finite) / step) if finite else step
    high = max(high, low + step)
    ticks = [(value, str(value)) for value in range(low, high + 1, step)]
    if len(finite) < sum(map(len, series)):
        high += step
        ticks.append((high, "identical"))
    return low, high, ticks


def _share_axis(series: Sequence[Sequence[float]]) -> Axis:
    """Up to 1, down to where the lowest is, in steps of 1, 2 or 5."""
    room = max(1 - min(value for values in series for value in values), 1e-3)
    unit = 10 ** math.floor(math.log10(room / 2))
    step = next(factor * unit for factor in (1, 2, 5, 10) if room / (factor * unit) <= 5)
    count = math.ceil(room / step - 1e-9)
    places = max(0, -math.floor(math.log10(step)))
    return 1 - count * step, 1.0, [(1 - i * step, f"{1 - i * step:.{places}f}") for i in range(count + 1)]


def _frame_ticks(first: int, last: int) -> list[int]:
    step = next((s for s in (1, 2, 4, 8, 16, 20, 40, 100, 200) if (last - first) / s <= 12), 400)
    return [first, *(frame for frame in range(0, last + 1, step) if frame > first + step / 2)]


def _x(frame: float, first: int, last: int, box: tuple) -> float:
    return (box[0] + box[2]) / 2 if first == last else box[0] + (box[2] - box[0]) * (frame - first) / (last - first)


def _y(value: float, low: float, high: float, box: tuple) -> float:
    return box[3] - (box[3] - box[1]) * (value - low) / (high - low)


def _line(pen: Any, points: list[Point], fill: tuple, dashed: bool) -> None:
    points = [(x * FINE, y * FINE) for x, y in points]
    if len(points) > 1:
        for piece in _dashes(points) if dashed else [points]:
            pen.line(piece, fill=fill, width=2 * FINE, joint="curve")
    radius = 2.5 * FINE
    for x, y in points if not dashed else points[:1] if len(points) == 1 else ():
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)


def _dashes(points: list[Point]) -> list[list[Point]]:
    """Every other stretch of DASH pixels along the line."""
    line = np.array(points)
    along = np.concatenate(([0], np.cumsum(np.hypot(*np.diff(line, axis=0).T))))
    starts = np.arange(0, along[-1], 2 * DASH * FINE)
    pieces = []
    for start in starts:
        inner = along[(along > start) & (along < start + DASH * FINE)]
        at = np.concatenate(([start], inner, [min(start + DASH * FINE, along[-1])]))
        pieces.append([(float(np.interp(a, along, line[:, 0])), float(np.interp(a, along, line[:, 1]))) for a in at])
    return pieces


# --- words -----------------------------------------------------------------------------------------------------------


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _cut(words: str, font: Any, width: float) -> str:
    if font.getlength(words) <= width:
        return words
    while words and font.getlength(f"{words}...") > width:
        words = words[:-1]
    return f"{words}..."
