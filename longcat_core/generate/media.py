"""Media for people to look at: what a clip holds, and contact sheets."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import printable
from ..files.atomic import atomic_path
from ..files.media import VideoReader, check_output_name
from ..files.media.opening import package
from .lettering import Lettering, wrap

COLUMNS, CELL = 4, 280  # of a contact sheet: cells in a row, and their width in pixels
# Of a prompt on a contact sheet; what exceeds these is left out.
MAX_LINES, MAX_CHARACTERS = 60, 20_000


def read_video(path: str | Path) -> tuple[np.ndarray, float]:
    """All frames that a clip holds, uint8 [F, H, W, 3] RGB, and its frames per second.

    For looking at clips: one that is cut short, which every task refuses, gives what is there and a warning. Raises
    LongCatError as `files.media.read_video` does.
    """
    with VideoReader(path, partial=True) as video:
        if video.note:
            warnings.warn(video.note, stacklevel=2)
        return np.stack(list(video)), video.fps


def contact_sheet(path: str | Path, frames: np.ndarray, prompt: str, *, fps: float = 15, count: int = 12) -> None:
    """Write a .png of up to `count` evenly spaced frames, each with its number and time, and the prompt below.

    Small frames are enlarged by a whole factor without smoothing, to about CELL pixels; large ones are reduced. A
    prompt of more than MAX_LINES lines is cut. Warns of characters that no font of this machine has; they are written
    as their codes.
    """
    path = Path(path)
    check_output_name(path, sheet=True)
    image, draw_on, fonts = package("PIL.Image"), package("PIL.ImageDraw"), package("PIL.ImageFont")
    picked = sorted({round(i) for i in np.linspace(0, len(frames) - 1, min(count, len(frames)))})
    columns = min(COLUMNS, len(picked))
    height, width = frames.shape[1:3]
    size, filter_ = cell_form(height, width, CELL)
    margin, label, gap = 20, 24, 14
    font, letters = fonts.load_default(size=14), Lettering(24)
    sheet_width = 2 * margin + columns * size[0] + (columns - 1) * gap
    words = printable(" ".join(prompt.split()), MAX_CHARACTERS)
    lines = wrap(letters.shown(words), letters.measure, sheet_width - 2 * margin, MAX_LINES)
    if letters.lacking:
        warnings.warn(_lacking(letters.lacking), stacklevel=2)
    rows = -(-len(picked) // columns)
    top = margin + rows * (size[1] + label + gap)
    sheet = image.new("RGB", (sheet_width, top + 32 * len(lines) + margin), (250, 250, 250))
    draw = draw_on.Draw(sheet)
    for cell, index in enumerate(picked):
        x = margin + cell % columns * (size[0] + gap)
        y = margin + cell // columns * (size[1] + label + gap)
        sheet.paste(image.fromarray(frames[index]).resize(size, filter_), (x, y))
        draw.text((x, y + size[1] + 4), f"frame {index}, {index / fps:.2f} s", fill=(110, 110, 110), font=font)
    for number, line in enumerate(lines):
        letters.draw(draw, (margin, top + 32 * number), line, (20, 20, 20))
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")


def _lacking(signs: list[str]) -> str:
    which = f"{''.join(signs[:8])}{' and others' if len(signs) > 8 else ''}"
    return (
        f"no font on this machine has the characters {which}, which are written as codes on the contact sheet; install "
        "a font that has them"
    )


def cell_form(height: int, width: int, cell_width: int) -> tuple[tuple[int, int], Any]:
    """(width, height) in pixels of a frame in a contact sheet, and the Pillow filter that resizes it."""
    resampling = package("PIL.Image").Resampling
    if width <= cell_width:
        factor = max(1, round(cell_width / width))
        return (width * factor, height * factor), resampling.NEAREST
    return (cell_width, max(1, round(height * cell_width / width))), resampling.LANCZOS
