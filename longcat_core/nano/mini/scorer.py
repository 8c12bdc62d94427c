"""Recognize ground, camera, and every shape's color, texture, form and motion in a video of LongCat-mini's world.

Plain image analysis for the soft, slightly wrong pictures of a small model; `analyze` never sees the prompt. Where
things are comes from `tracking`; here measurements get names.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import LongCatError
from ..scorer import IRREGULAR, Score, assign
from ..world import BASE_FPS
from .drawing import TORUS, pattern
from .scenes import ACTOR_ATTRIBUTES, BACKGROUNDS, COLORS, SCENE_ATTRIBUTES, TEXTURES, Scene
from .tracking import (
    Fits,
    Ground,
    Pictures,
    camera_track,
    fit,
    ground_of,
    halved,
    hue_of,
    likeness,
    reduce,
    shape_hues,
    shape_masks,
)

# Lengths are pixels at a shorter side of 64, times are seconds, colors are 0..255.
CELLS, PITCHES = (4.5, 11.5), (7.5, 13.5)  # of checked and of spotted grounds
LATTICE = 0.45  # how alike a ground must be to itself displaced by a cell
CAMERA_SPEED = 0.18 * BASE_FPS  # slower is still; the world's slowest is 0.4 pixels per frame
STRAIGHT = 0.7  # way from start to end over the length of the way, of a pan
MIN_SPEED = 0.3 * BASE_FPS  # slower is still; the world's slowest is 0.6 pixels per frame
SCATTER = 2.5  # median distance from the line, or from the resting place
PERIODS = (1.3, 3.4)
AMPLITUDE = 5.0  # of a circle or a swing; the world's smallest is 8
MIN_PULSE = 0.3  # range of the radius over its median; the world's pulse has 0.6
WHOLE = 0.8  # share of a shape that must be seen for its radius to count
TONES = 0.06  # deviation over mean of the brightness inside a shape, below which it is plain; sharp textures have 0.25
TEXTURE_FIT = 0.4  # least correlation with a texture
STRONG = 2 * TONES  # from here on, what correlates with no texture is not plain either
GRID = 40


@dataclass(frozen=True)
class Seen:
    """A shape as a video shows it. A motion unknown to the world is "irregular"."""

    texture: str
    color: str
    shape: str
    motion: str


@dataclass(frozen=True)
class Observation:
    """What a video shows, with the shapes that are seen, the largest first."""

    background: str
    ground: str
    camera: str
    actors: tuple[Seen, ...]


def score(video: np.ndarray, scene: Scene, fps: float = BASE_FPS) -> Score:
    """Score a uint8 video [F, H, W, 3] against its prompt's scene. Raises LongCatError for other arrays."""
    return compare(analyze(video, fps), scene)


def compare(observation: Observation, scene: Scene) -> Score:
    """The best assignment of as many observed shapes as the scene has; one that is missing is wrong in everything."""
    whole = {name: getattr(observation, name) == getattr(scene, name) for name in SCENE_ATTRIBUTES}
    seen = observation.actors[: len(scene.actors)]
    return {**whole, **assign(seen, scene.actors, ACTOR_ATTRIBUTES)}


@torch.no_grad()
def analyze(video: np.ndarray, fps: float = BASE_FPS) -> Observation:
    """Describe a uint8 video [F, H, W, 3]; at most three shapes are looked for."""
    video = np.asarray(video)
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or 0 in video.shape:
        raise LongCatError(f"the scorer reads uint8 video [F, H, W, 3], not {video.dtype} {list(video.shape)}")
    if fps <= 0:
        raise LongCatError(f"the scorer needs a positive frame rate, not {fps}")
    pictures = reduce(torch.from_numpy(video))
    ground = ground_of(pictures)
    camera = camera_track(ground, pictures.scale, fps)
    actors = []
    hues = shape_hues(pictures)
    masks = shape_masks(pictures, hues) if hues else torch.zeros(0, *pictures.hue.shape)
    halves = halved(masks)
    size = torch.tensor(pictures.color.shape[:1:-1]) / pictures.scale
    for index, hue in enumerate(hues):
        found = fit(halves, index, pictures.scale / 2)
        if found is None:
            continue
        shape, fits, best = found
        texture = _texture(pictures, masks[index], fits, best)
        actors.append(Seen(texture, _color(hue), shape, _motion(fits, camera, size, fps)))
    return Observation(
        _background(pictures, ground), _ground(ground, pictures.scale), _camera(camera, fps), tuple(actors)
    )


# --- the scene --------------------------------------------------------------------------------------------------------


def _background(pictures: Pictures, ground: Ground) -> str:
    """The two tones between which most pixels of the ground lie."""
    few = slice(None, None, 8)
    pixels = pictures.color[few].movedim(1, -1)[ground.seen[few] > 0]
    distances = []
    for first, second in torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32):
        line = second - first
        along = ((pixels - first) @ line / (line @ line)).clamp(0, 1)
        distances.append((pixels - first - along[:, None] * line).norm(dim=-1).clamp(max=60).mean())
    return list(BACKGROUNDS)[int(torch.stack(distances).argmin())]


def _ground(ground: Ground, scale: float) -> str:
    """By lattice: checks turn into their opposite one cell on, spots come again one pitch on, clouds do neither."""
    alike = likeness(ground, math.ceil(PITCHES[1] * scale))

    def best(bounds: tuple[float, float], along: float) -> float:
        return max(
            (along * float(alike[0, k] + alike[k, 0]) + float(alike[k, k])) / 3
            for k in range(max(1, math.floor(bounds[0] * scale)), math.ceil(bounds[1] * scale) + 1)
        )

    checked, spotted = best(CELLS, -1), best(PITCHES, 1)
    if max(checked, spotted) < LATTICE:
        return "cloudy"
    # Two cells on, checks come again too.
    return "checked" if checked >= LATTICE else "spotted"


def _camera(track: Tensor, fps: float) -> str:
    """Names the way of the camera [F, 2]."""
    frames = len(track)
    if frames < 3:
        return IRREGULAR
    smooth = track.unfold(0, min(5, frames), 1).mean(-1)
    reach = smooth.amax(0) - smooth.amin(0)
    # A pan goes on, while a sway turns back.
    if reach.max() < min(9.0, CAMERA_SPEED * (frames - 1) / fps):
        return "still"
    axis = int(reach.argmax())
    if reach[1 - axis] > 0.7 * reach[axis]:
        return IRREGULAR
    way = float(smooth[-1, axis] - smooth[0, axis])
    straight = abs(way) / float(smooth[:, axis].diff().abs().sum())
    if straight < STRAIGHT:
        return "sway" if axis == 0 else IRREGULAR
    return (("left", "right"), ("up", "down"))[axis][way > 0]


# --- shapes -----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _named_hues() -> Tensor:
    return hue_of(torch.tensor(list(COLORS.values()), dtype=torch.float32)[..., None, None])[:, 0, 0]


def _color(hue: float) -> str:
    return list(COLORS)[int(((_named_hues() - hue + 180) % 360 - 180).abs().argmin())]


@lru_cache(maxsize=1)
def _patterns() -> tuple[Tensor, Tensor]:
    """Dark parts [T, P, GRID^2] of each texture but plain in P places and sizes, and the grid [GRID] in radii."""
    grid = torch.linspace(-1, 1, GRID)
    moves = torch.linspace(-0.3, 0.3, 7)
    drawn = [
        pattern(i, grid[None, :] * size + x, grid[:, None] * size + y, torch.tensor(1.0)).flatten()
        for i in range(1, len(TEXTURES))
        for size in (0.88, 0.94, 1.0, 1.06, 1.12)
        for x in moves
        for y in moves
    ]
    return torch.stack(drawn).view(len(TEXTURES) - 1, -1, GRID * GRID), grid


def _texture(pictures: Pictures, mask: Tensor, fits: Fits, best: Tensor) -> str:
    """The texture whose dark parts correlate best with those of a shape, in the frames `best` of `fits`."""
    patterns, grid = _patterns()
    rows = best if len(best) else torch.arange(min(10, len(fits.frames)))
    if not len(rows):
        return IRREGULAR
    frames, center = fits.frames[rows], fits.center[rows] * pictures.scale
    reach = fits.radius[rows] * pictures.scale
    height, width = mask.shape[1:]
    x, y = (center[:, i, None] + reach[:, None] * grid for i in (0, 1))
    at = torch.stack(
        torch.broadcast_tensors(2 * x[:, None, :] / (width - 1) - 1, 2 * y[:, :, None] / (height - 1) - 1), -1
    )
    inner = F.avg_pool2d(mask[frames].float()[:, None], 3, 1, 1)
    values = torch.cat((pictures.color[frames].amax(1, keepdim=True), inner), 1)
    bright, inside = F.grid_sample(values, at, align_corners=True).flatten(2).unbind(1)
    weight = (inside > 0.95).float()
    total = weight.sum(1).clamp(min=1)
    usual = (bright * weight).sum(1) / total
    change = (bright - usual[:, None]) * weight
    power = change.square().sum(1)
    deviation = (power / total).sqrt() / usual.clamp(min=1)
    if deviation.median() < TONES:
        return "plain"
    dark = patterns.flatten(0, 1).T
    mean = weight @ dark / total[:, None]
    spread = (weight @ dark.square() - total[:, None] * mean.square()).clamp(min=1e-6)
    alike = -(change @ dark) / (spread * power.clamp(min=1e-6)[:, None]).sqrt()
    found = alike.view(len(rows), len(patterns), -1).amax(2).mean(0)
    if found.max() >= TEXTURE_FIT:
        return TEXTURES[1 + int(found.argmax())]
    return "plain" if deviation.median() < STRONG else IRREGULAR


def _motion(fits: Fits, camera: Tensor, size: Tensor, fps: float) -> str:
    """Names a shape's motion over the ground: its way in the picture, with the camera's added."""
    time = fits.frames.double().numpy() / fps
    if len(time) < 4:
        return IRREGULAR
    path = _unwrapped((fits.center + camera[fits.frames]).double().numpy(), time, TORUS * size.double().numpy())
    rest = float(np.median(np.linalg.norm(path - np.median(path, axis=0), axis=1)))
    line, velocity = _fitted(path, [np.ones_like(time), time])
    off_line = _scatter(line)
    span = float(time[-1] - time[0])
    speed = float(np.linalg.norm(velocity[1]))
    best, amplitude = np.inf, np.zeros(2)
    for period in np.linspace(*PERIODS, 16):
        # Less than half a turn is as well a bent line.
        if span < 0.45 * period:
            break
        angle = 2 * np.pi * time / period
        left, waves = _fitted(path, [np.ones_like(time), np.cos(angle), np.sin(angle)])
        if (error := _scatter(left)) < best:
            best, amplitude = error, np.hypot(waves[1], waves[2])
    if amplitude.max() >= AMPLITUDE and best < 0.5 * off_line and best < SCATTER and amplitude.max() < 25:
        if amplitude.min() > 0.55 * amplitude.max():
            return "circle"
        return "swing" if amplitude[0] > amplitude[1] and amplitude[1] < 0.4 * amplitude[0] else IRREGULAR
    if speed >= MIN_SPEED and speed * span > 2.5:
        if off_line > SCATTER:
            return IRREGULAR
        axis = int(abs(velocity[1]).argmax())
        return (("left", "right"), ("up", "down"))[axis][int(velocity[1, axis] > 0)]
    if rest > SCATTER:
        return IRREGULAR
    radius = fits.radius[fits.visible >= WHOLE].numpy()
    radius = radius if len(radius) >= 4 else fits.radius.numpy()
    low, middle, high = np.percentile(radius, (5, 50, 95))
    return "pulse" if high - low > MIN_PULSE * middle else "still"


def _unwrapped(path: np.ndarray, time: np.ndarray, torus: np.ndarray) -> np.ndarray:
    """A way [N, 2] without jumps around the torus; over a gap a shape is assumed to keep its mean velocity."""
    gap = np.diff(time)[:, None]
    step = (np.diff(path, axis=0) + torus / 2) % torus - torus / 2
    near = gap[:, 0] < 1.5 * gap.min()
    velocity = np.clip(step[near].sum(0) / gap[near].sum(), -20.0, 20.0)
    expected = velocity * gap * (gap > 1.5 * gap.min())
    step = expected + (step - expected + torus / 2) % torus - torus / 2
    return np.concatenate([path[:1], path[0] + np.cumsum(step, axis=0)])


def _fitted(path: np.ndarray, columns: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """What least squares leave of a way [N, 2], and the coefficients [P, 2]; frames that lie far off count little."""
    design = np.stack(list(columns), axis=1)
    weight = np.ones((len(path), 1))
    for _ in range(3):
        solution = np.linalg.lstsq(design * weight, path * weight, rcond=None)[0]
        left = path - design @ solution
        error = np.linalg.norm(left, axis=1, keepdims=True)
        weight = 1 / np.sqrt(1 + (error / max(2 * float(np.median(error)), 0.5)) ** 2)
    return left, solution


def _scatter(left: np.ndarray) -> float:
    return float(np.median(np.linalg.norm(left, axis=1)))
