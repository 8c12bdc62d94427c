"""See in a video who talks: each face's color and form, and how far its mouth is open in every frame.

Plain image analysis, which never sees the prompt or the sound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import LongCatError
from ..scorer import FOREGROUND, _background, _nearest_index
from ..world import SHAPE_AREA
from .world import CLOSED, FACE_COLORS, HEADS, INK, MOUTH_HALF, MOUTH_Y, OPENED

# The part of a mouth's width over which its height is taken, and the mean height of an ellipse there.
MIDDLE, BULGE = 0.5, 0.957
# Rows around the middle of a mouth, in radii, in which it is looked for.
ABOVE, BELOW = 0.36, 0.46


@dataclass(frozen=True)
class Seen:
    """One face. opening: [F] in 0..1, of its mouth."""

    head: str
    color: str
    opening: np.ndarray


def look(video: np.ndarray, faces: int) -> tuple[str, tuple[Seen | None, ...]]:
    """The background's color and the faces, from left to right; None for one that is not seen.

    video: uint8 [F, H, W, 3]. faces: how many to look for; two are looked for in one half each. Raises
    LongCatError for other arrays.
    """
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or 0 in video.shape:
        raise LongCatError(f"the scorer reads uint8 video [F, H, W, 3], not {video.dtype} {list(video.shape)}")
    pixels = video.astype(np.float32)
    background, base = _background(pixels)
    difference = np.linalg.norm(pixels - base[:, None, None], axis=-1)
    parts = np.array_split(np.arange(video.shape[2]), faces)
    return background, tuple(_face(pixels[:, :, part], difference[:, :, part] > FOREGROUND) for part in parts)


def _face(pixels: np.ndarray, front: np.ndarray) -> Seen | None:
    """The face in this part of the picture. front: what is not background, [F, H, W]."""
    palette = np.array([*FACE_COLORS.values(), INK], np.float32)
    index = np.where(front, _nearest_index(pixels, palette), len(palette) - 1)
    counts = np.bincount(index[index < len(FACE_COLORS)], minlength=len(FACE_COLORS))
    if counts.max() < 0.05 * front.size:
        return None
    color = int(counts.argmax())
    skin = np.median(pixels[index == color], axis=0)
    head = _filled((index == color).mean(0) > 0.3)
    area = float(head.sum())
    rows, columns = np.nonzero(head)
    y, x = (rows.min() + rows.max()) / 2, (columns.min() + columns.max()) / 2
    shape = HEADS[int(np.argmax([_overlap(head, name, x, y, area) for name in HEADS]))]
    radius = (area / SHAPE_AREA[shape]) ** 0.5
    return Seen(shape, list(FACE_COLORS)[color], _opening(pixels, skin, x, y, radius))


def _filled(mask: np.ndarray) -> np.ndarray:
    """A mask [H, W] without the holes that eyes and mouth leave, and without single pixels."""
    rows, columns = mask.sum(1) > 3, mask.sum(0) > 3
    mask = mask & rows[:, None] & columns
    across = np.maximum.accumulate(mask, 1) & np.maximum.accumulate(mask[:, ::-1], 1)[:, ::-1]
    down = np.maximum.accumulate(mask, 0) & np.maximum.accumulate(mask[::-1], 0)[::-1]
    return across & down | mask


def _overlap(head: np.ndarray, name: str, x: float, y: float, area: float) -> float:
    """Intersection over union of a head and a form of the same area and center."""
    across, down = np.abs(np.arange(head.shape[1]) - x), np.abs(np.arange(head.shape[0])[:, None] - y)
    form = (
        np.hypot(across, down) < (area / np.pi) ** 0.5 if name == "circle" else np.maximum(across, down) < area**0.5 / 2
    )
    return float((form & head).sum() / (form | head).sum())


def _opening(pixels: np.ndarray, skin: np.ndarray, x: float, y: float, radius: float) -> np.ndarray:
    """How far the mouth of a face is open, [F], by the share of ink in the middle of its columns."""
    half, middle = MIDDLE * MOUTH_HALF * radius, y + MOUTH_Y * radius
    columns = slice(round(x - half), round(x + half) + 1)
    rows = slice(max(0, round(middle - ABOVE * radius)), round(middle + BELOW * radius) + 1)
    direction = np.array(INK, np.float32) - skin
    ink = ((pixels[:, rows, columns] - skin) @ direction / (direction @ direction)).clip(0, 1)
    height = ink.mean(2).sum(1)
    return (height / (2 * BULGE * radius) - CLOSED) / OPENED


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's, 0 where one of the two does not change."""
    count = min(len(first), len(second))
    a, b = (np.asarray(x[:count], np.float64) - np.mean(x[:count]) for x in (first, second))
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / size if size > 1e-9 else 0.0


def shuffled(openings: Sequence[np.ndarray], loudness: Sequence[np.ndarray]) -> float:
    """The mean correlation of mouths with what others say."""
    pairs = [correlation(o, s) for i, o in enumerate(openings) for j, s in enumerate(loudness) if i != j]
    return float(np.mean(pairs)) if pairs else 0.0
