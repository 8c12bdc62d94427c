"""Recognize the background, shapes, colors and motions in a video of the procedural world.

Plain image analysis for the soft, slightly wrong pictures of a small model: it uses medians instead of means, the
nearest named color, overlap with shape templates, and the track on the torus for motion. `analyze` never sees the
prompt.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import LongCatError
from .world import BACKGROUNDS, BASE_FPS, BASE_SIDE, COLORS, SHAPE_AREA, SHAPES, Actor, Color, Scene, shape_distance

# Lengths are pixels at a shorter side of BASE_SIDE, times are seconds, colors are 0..255.
FOREGROUND = 50.0  # least color distance between a shape and the background
SAME_COLOR = 60.0  # colors nearer than this are one shape
MIN_PRESENCE = 0.3  # share of the frames in which a shape must be seen
MIN_SPEED = 7.0  # slower is still; the world's slowest is 18 per second
MAX_SCATTER = 4.0  # median distance from the fitted line, or from the resting place
CIRCLE_RADIUS = (4.5, 18.0)
MIN_TURN = np.radians(60)  # of the track around the orbit's center
MIN_PULSE = 0.25  # range of the radius over its median; the world's pulse has 0.6
WHOLE = 0.93  # of its usual area: a shape this large is not hidden
SHAPE_FRAMES = 24
IRREGULAR = "irregular"


@dataclass(frozen=True)
class Observation:
    """What a video shows. A motion unknown to the world is "irregular"; shapes that are not seen are left out."""

    background: str
    actors: tuple[Actor, ...]


# Whether each attribute is correct: "background", then "0.shape", "0.color" and "0.motion" of each actor named.
Score = dict[str, bool]


def score(video: np.ndarray, scene: Scene, fps: float = BASE_FPS) -> Score:
    """Score a uint8 video [F, H, W, 3] against its prompt's scene. Raises LongCatError for other arrays."""
    return compare(analyze(video, len(scene.actors), fps), scene)


def compare(observation: Observation, scene: Scene | Observation) -> Score:
    """The best assignment of the observed actors to the scene's; an actor without a partner is wrong in everything."""
    best = assign(observation.actors, scene.actors, ("shape", "color", "motion"))
    return {"background": observation.background == scene.background, **best}


def assign(seen: Sequence[object], wanted: Sequence[object], names: Sequence[str]) -> Score:
    """Whether the attributes `names` of each actor that is wanted are right, under the best assignment of those seen;
    an actor without a partner is wrong in everything."""

    def judge(chosen: Sequence[object]) -> Score:
        return {
            f"{index}.{name}": actor is not None and getattr(actor, name) == getattr(asked, name)
            for index, (actor, asked) in enumerate(zip(chosen, wanted, strict=True))
            for name in names
        }

    choices = itertools.permutations([*seen, *[None] * len(wanted)], len(wanted))
    return max(map(judge, choices), key=lambda attributes: sum(attributes.values()))


def analyze(
    video: np.ndarray, n_actors: int, fps: float = BASE_FPS, palette: Mapping[str, Color] = COLORS
) -> Observation:
    """Describe a uint8 video [F, H, W, 3] by its background and up to `n_actors` shapes, largest first.

    palette: names of the shapes' colors.
    """
    video = np.asarray(video)
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or 0 in video.shape:
        raise LongCatError(f"the scorer reads uint8 video [F, H, W, 3], not {video.dtype} {list(video.shape)}")
    if n_actors < 1 or fps <= 0:
        raise LongCatError(
            f"the scorer looks for at least one shape at a positive frame rate, not {n_actors} at {fps} fps"
        )
    pixels = video.astype(np.float32)
    background, base = _background(pixels)
    difference = pixels - base[:, None, None]
    colors = _actor_colors(pixels, difference, n_actors, palette)
    masks = [_majority(alpha > 0.5) for alpha in _unmix(difference, colors - np.median(base, axis=0))]
    scale = min(video.shape[1:3]) / BASE_SIDE
    actors = []
    for index, (color, mask) in enumerate(zip(colors, masks, strict=True)):
        others = masks[:index] + masks[index + 1 :]
        area, center, clear = _track(mask, others)
        if clear.size:
            motion = _motion(
                center[clear] / scale, area[clear] ** 0.5, clear / fps, np.array(mask.shape[:0:-1]) / scale
            )
            actors.append(Actor(_shape(mask, area, center, clear), _nearest(color, palette), motion))
    return Observation(background, tuple(actors))


# --- colors --------------------------------------------------------------------------------------------------------


def _nearest_index(pixels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Index of the nearest palette color [K, 3] for pixels [..., 3]."""
    # |p - c|^2 without |p|^2, which is the same for every c
    return np.argmin((palette**2).sum(-1) - 2 * pixels @ palette.T, axis=-1)


def _nearest(color: np.ndarray, table: Mapping[str, Color]) -> str:
    return list(table)[int(_nearest_index(color, np.array(list(table.values()), np.float32)))]


def _background(pixels: np.ndarray) -> tuple[str, np.ndarray]:
    """Name of the most common background color, and its median in each frame [F, 3]."""
    index = _nearest_index(pixels, np.array(list(BACKGROUNDS.values()), np.float32))
    commonest = np.bincount(index.ravel()).argmax()
    overall = np.median(pixels[index == commonest], axis=0)
    frames = [frame[chosen == commonest] for frame, chosen in zip(pixels, index, strict=True)]
    base = np.stack([np.median(frame, axis=0) if len(frame) else overall for frame in frames])
    return list(BACKGROUNDS)[commonest], base


def _actor_colors(
    pixels: np.ndarray, difference: np.ndarray, n_actors: int, palette: Mapping[str, Color]
) -> np.ndarray:
    """Median colors [K, 3] of the K <= n_actors largest groups of foreground pixels that lie inside a shape."""
    inside = _neighbors(np.linalg.norm(difference, axis=-1) > FOREGROUND) == 9
    found = pixels[inside]
    index = _nearest_index(found, np.array(list(palette.values()), np.float32))
    groups = [found[index == name] for name in range(len(palette))]
    # One flat color may fall under two names; groups whose middles are close are joined, the largest first.
    joined: list[np.ndarray] = []
    for group in sorted((group for group in groups if len(group)), key=len, reverse=True):
        middle = np.median(group, axis=0)
        for position, other in enumerate(joined):
            if np.linalg.norm(np.median(other, axis=0) - middle) < SAME_COLOR:
                joined[position] = np.concatenate([other, group])
                break
        else:
            joined.append(group)
    joined = sorted(joined, key=len, reverse=True)[:n_actors]
    least = 0.002 * inside.size  # about 12 pixels of 64x96
    return np.array([np.median(group, axis=0) for group in joined if len(group) > least], np.float32).reshape(-1, 3)


def _unmix(difference: np.ndarray, directions: np.ndarray) -> list[np.ndarray]:
    """Shares >= 0 of one or two colors in each pixel: difference [..., 3] ~ sum of share_k * directions_k.

    A soft edge between white and black is half white this way; by nearest color it could pass for purple.
    """
    alone = [np.maximum(difference @ d / max(float(d @ d), 1.0), 0) for d in directions]
    if len(directions) < 2:
        return alone
    first, second = directions
    shares = difference @ np.linalg.pinv(directions)
    errors = [np.linalg.norm(difference - a[..., None] * d, axis=-1) for a, d in zip(alone, directions, strict=True)]
    first_better = errors[0] < errors[1]
    # Blue and yellow on gray cancel out: two such shares would fit any noise, and one alone tells them apart.
    mixed = (shares >= 0).all(axis=-1) & bool(first @ second > 0)
    return [
        np.where(mixed, shares[..., 0], np.where(first_better, alone[0], 0)),
        np.where(mixed, shares[..., 1], np.where(first_better, 0, alone[1])),
    ]


# --- masks on the torus -----------------------------------------------------------------------------------------------


def _neighbors(mask: np.ndarray) -> np.ndarray:
    """How many of the 3x3 pixels around each pixel are set, for masks [F, H, W]."""
    count = mask.astype(np.int8)
    for axis in (1, 2):
        count = count + np.roll(count, 1, axis) + np.roll(count, -1, axis)
    return count


def _majority(mask: np.ndarray) -> np.ndarray:
    return _neighbors(mask) >= 5


def _wrapped(offset: np.ndarray, period: np.ndarray | float) -> np.ndarray:
    return (offset + period / 2) % period - period / 2


def _track(mask: np.ndarray, others: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Areas [F], centers [F, 2] (x, y) and the indices of the frames to trust; empty if the shape is barely there.

    A frame in which the shape touches another and has lost area is trusted only if too few others are left.
    """
    frames, height, width = mask.shape
    area = mask.sum(axis=(1, 2)).astype(np.float64)
    center = np.stack([_center(mask.sum(axis=1), width), _center(mask.sum(axis=2), height)], axis=-1)
    seen = area > 0.25 * np.median(area[area > 0]) if area.any() else area > 0
    if seen.sum() < max(2, MIN_PRESENCE * frames):
        return area, center, np.array([], int)
    near = [(_neighbors(mask) > 0) & (_neighbors(other) > 0) for other in others]
    touching = np.any([touch.any(axis=(1, 2)) for touch in near], axis=0) if near else np.zeros(frames, bool)
    free = seen & ~touching
    if free.any():
        free |= seen & (area > WHOLE * np.median(area[free]))
    return area, center, np.flatnonzero(free if free.sum() >= max(4, frames / 4) else seen)


def _center(profile: np.ndarray, period: int) -> np.ndarray:
    """Center on a circle of `period` pixels of each row of weights [F, period]."""
    place = np.arange(period)
    angle = np.angle(profile @ np.exp(2j * np.pi * place / period))
    start = angle[:, None] * period / (2 * np.pi)
    # The circular mean leans for lopsided shapes; the plain mean of the offsets from it does not.
    offset = (profile * _wrapped(place - start, period)).sum(1) / np.maximum(profile.sum(1), 1)
    return start[:, 0] + offset


# --- shape and motion -------------------------------------------------------------------------------------------------


def _shape(mask: np.ndarray, area: np.ndarray, center: np.ndarray, clear: np.ndarray) -> str:
    """The shape whose template of the same area and center overlaps best, over up to SHAPE_FRAMES frames."""
    chosen = clear[np.linspace(0, len(clear) - 1, min(SHAPE_FRAMES, len(clear))).astype(int)]
    _, height, width = mask.shape
    x = _wrapped(np.arange(width) - center[chosen, :1], width)[:, None, :]
    y = _wrapped(np.arange(height) - center[chosen, 1:], height)[:, :, None]
    overlaps = []
    for name in SHAPES:
        radius = (area[chosen] / SHAPE_AREA[name]) ** 0.5
        template = shape_distance(name, *map(torch.from_numpy, (x, y, radius[:, None, None]))).numpy() < 0
        union = (template | mask[chosen]).sum(axis=(1, 2))
        overlaps.append(np.median((template & mask[chosen]).sum(axis=(1, 2)) / np.maximum(union, 1)))
    return SHAPES[int(np.argmax(overlaps))]


def _motion(center: np.ndarray, radius: np.ndarray, time: np.ndarray, size: np.ndarray) -> str:
    """Names the motion of a track [N, 2] at times [N] on a torus of the given size (width, height)."""
    if len(time) < 3:
        return IRREGULAR
    path = _unwrap(center, time, size)
    start, velocity = _robust_fit(np.stack([np.ones_like(time), time], axis=1), path)
    off_line = np.median(np.linalg.norm(path - start - time[:, None] * velocity, axis=1))
    if _circles(path, off_line):
        return "circle"
    if np.linalg.norm(velocity) >= MIN_SPEED:
        if off_line > MAX_SCATTER:
            return IRREGULAR
        horizontal = abs(velocity[0]) > abs(velocity[1])
        ahead = velocity[0 if horizontal else 1] > 0
        return ("right" if ahead else "left") if horizontal else ("down" if ahead else "up")
    if np.median(np.linalg.norm(path - np.median(path, axis=0), axis=1)) > MAX_SCATTER:
        return IRREGULAR
    smooth = np.median(np.stack([radius[:-2], radius[1:-1], radius[2:]]), axis=0)
    low, middle, high = np.percentile(smooth, (5, 50, 95))
    return "pulse" if high - low > MIN_PULSE * middle else "still"


def _unwrap(center: np.ndarray, time: np.ndarray, size: np.ndarray) -> np.ndarray:
    """The track without jumps at the borders; over a gap the shape is assumed to keep its median velocity."""
    gap = np.diff(time)[:, None]
    step = np.diff(center, axis=0)
    velocity = np.median((_wrapped(step, size) / gap)[gap[:, 0] < 1.5 * gap.min()], axis=0)
    expected = velocity * gap
    return np.concatenate([np.zeros((1, 2)), np.cumsum(expected + _wrapped(step - expected, size), axis=0)])


def _robust_fit(design: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Least squares [N, P] -> [N, D], reweighted so that outlier frames count little."""
    weight = np.ones(len(design))
    for _ in range(5):
        solution = np.linalg.lstsq(design * weight[:, None], target * weight[:, None], rcond=None)[0]
        error = np.linalg.norm(target - design @ solution, axis=1)
        weight = 1 / np.sqrt(1 + (error / max(2 * np.median(error), 0.5)) ** 2)
    return solution


def _circles(path: np.ndarray, off_line: float) -> bool:
    """Whether a path keeps going around a circle of the world's size, which fits clearly better than a line."""
    # Kasa's fit: x^2 + y^2 = 2 ax + 2 by + c is linear in the center (a, b)
    solution = np.linalg.lstsq(np.column_stack([2 * path, np.ones(len(path))]), (path**2).sum(1), rcond=None)[0]
    spoke = path - solution[:2]
    radius = np.median(np.linalg.norm(spoke, axis=1))
    off_circle = np.median(np.abs(np.linalg.norm(spoke, axis=1) - radius))
    if not CIRCLE_RADIUS[0] <= radius <= CIRCLE_RADIUS[1] or off_circle > min(0.25 * radius, 0.6 * off_line):
        return False
    angle = np.unwrap(np.arctan2(spoke[:, 1], spoke[:, 0]))
    return bool(abs(angle[-1] - angle[0]) >= MIN_TURN)
