"""Where things are in a video of LongCat-mini's world: ground, camera, and the place and size of every shape.

Everything is measured in small pictures (`SIDE` pixels on the shorter side), which average out noise and are fast. A
shape is one hue, because both of its tones have it. Its outline is fitted to the pixels that are known to be in or
out; those behind other shapes and outside the picture are unknown. So a shape is found that is partly hidden.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..world import BASE_SIDE
from .drawing import outline
from .scenes import MAX_ACTORS, SHAPES

SIDE = 96
# Colors 0..255. The ground's tones have a saturation of at most 0.42, the shapes' of at least 0.75.
MIN_CHROMA, MIN_SATURATION = 40.0, 0.58
# Degrees of hue. Named hues are at least 24 apart.
BIN, SMOOTH, REACH = 2, 5.0, 16.0
MIN_SHARE = 0.001  # of all pixels of the video, for a color to be a shape
# Lengths in pixels at a shorter side of 64.
MAX_SPEED = 63.0  # of the camera in a second; a sway's fastest is 46
WINDOW = 53.0
RADII = torch.logspace(math.log10(5.2), math.log10(16.0), 12, dtype=torch.float64)
SHAPE_FRAMES = 10
HIDDEN = 0.1  # how much a fit with less hidden is preferred
MIN_IOU, MIN_VISIBLE = 0.6, 0.35  # of a fit that is trusted


@dataclass(frozen=True)
class Pictures:
    """A video, reduced. color [F, 3, h, w] in 0..255; scale: pixels per unit of length; shapes: [F, h, w], where color
    is strong; hue [F, h, w] in degrees."""

    color: Tensor
    scale: float
    shapes: Tensor
    hue: Tensor


def reduce(video: Tensor) -> Pictures:
    """video: uint8 [F, H, W, 3]."""
    color = video.movedim(-1, 1).float()
    factor = max(1, round(min(color.shape[-2:]) / SIDE))
    color = F.avg_pool2d(color, factor) if factor > 1 else color
    most, least = color.amax(1), color.amin(1)
    shapes = (most - least > MIN_CHROMA) & (most - least > MIN_SATURATION * most)
    return Pictures(color, min(color.shape[-2:]) / BASE_SIDE, shapes, hue_of(color))


def hue_of(color: Tensor) -> Tensor:
    """Degrees of the hue of colors [..., 3, h, w], or [..., 3, 1, 1]."""
    red, green, blue = color.unbind(-3)
    return torch.rad2deg(torch.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue)) % 360


def _near(mask: Tensor, reach: int) -> Tensor:
    """Pixels up to `reach` from those of a mask [..., h, w]."""
    wide = F.max_pool2d(mask.float().flatten(0, -3)[:, None], 2 * reach + 1, 1, reach)
    return wide[:, 0].view(mask.shape) > 0.5


def _mean(values: Tensor) -> Tensor:
    """Of the 3x3 pixels around each of [N, h, w]; 0 beyond the border."""
    return F.avg_pool2d(values.float()[:, None], 3, 1, 1)[:, 0]


# --- ground and camera ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ground:
    """brightness [F, h, w], 0 on average where `seen` [F, h, w], which leaves out shapes and their edges."""

    brightness: Tensor
    seen: Tensor


def ground_of(pictures: Pictures) -> Ground:
    seen = ~_near(pictures.shapes, 2)
    brightness = pictures.color.mean(1)
    total = seen.sum((1, 2), keepdim=True).clamp(min=1)
    mean = (brightness * seen).sum((1, 2), keepdim=True) / total
    return Ground((brightness - mean) * seen, seen.float())


def camera_track(ground: Ground, scale: float, fps: float) -> Tensor:
    """Positions [F, 2] (x, y) of the camera on the ground, from 0, in units of length.

    The step between two frames is the displacement at which the pictures differ least, on pixels that are ground in
    both, found to a fraction of a pixel by parabolas. Longer steps would be ambiguous, since patterns repeat.
    """
    if len(ground.seen) < 2:
        return torch.zeros(len(ground.seen), 2)
    reach = math.ceil(MAX_SPEED / fps * scale)
    # Multiples of 12 are fast.
    size = [12 * math.ceil((side + reach) / 12) for side in ground.seen.shape[1:]]
    plain, mask, square = (
        torch.fft.rfft2(values, s=size) for values in (ground.brightness, ground.seen, ground.brightness**2)
    )
    before, after = slice(None, -1), slice(1, None)
    spectrum = square[before].conj() * mask[after] + mask[before].conj() * square[after]
    spectrum -= 2 * plain[before].conj() * plain[after]
    apart = torch.fft.irfft2(spectrum, s=size)
    both = torch.fft.irfft2(mask[before].conj() * mask[after], s=size)
    lags = [torch.arange(-reach, reach + 1) % side for side in size]
    error = (apart / both.clamp(min=0.02 * ground.seen[0].numel()))[:, lags[0]][:, :, lags[1]]
    step = -(_peak(-error) - reach) / scale
    if len(step) > 2:
        step = torch.cat((step[:1], step.unfold(0, 3, 1).median(-1).values, step[-1:]))
    return torch.cat((torch.zeros(1, 2), step.cumsum(0)))


def _peak(score: Tensor) -> Tensor:
    """Place [N, 2] (x, y) of the largest value of each [h, w], to a fraction of a pixel."""
    count, height, width = score.shape
    best = score.flatten(1).argmax(1)
    row, column, index = best // width, best % width, torch.arange(count)

    def refined(at: Tensor, most: int, line: Tensor) -> Tensor:
        left, middle, right = (line[index, (at + k).clamp(0, most)] for k in (-1, 0, 1))
        bend = left - 2 * middle + right
        shift = torch.where(bend < -1e-12, 0.5 * (left - right) / bend, torch.zeros_like(bend)).clamp(-0.5, 0.5)
        return at + torch.where((at > 0) & (at < most), shift, torch.zeros_like(shift))

    return torch.stack(
        (refined(column, width - 1, score[index, row]), refined(row, height - 1, score[index, :, column])), -1
    )


def likeness(ground: Ground, reach: int) -> Tensor:
    """How alike the ground is to itself displaced by 0..reach pixels [reach + 1 (y), reach + 1 (x)], 1 for 0."""
    picked = torch.linspace(0, len(ground.seen) - 1, min(12, len(ground.seen))).long()
    size = [side + reach + 1 for side in ground.seen.shape[1:]]
    parts = []
    for values in (ground.brightness, ground.seen):
        power = torch.fft.rfft2(values[picked], s=size).abs().square().sum(0)
        whole = torch.fft.irfft2(power, s=size)
        # Displaced to the left is as good as to the right.
        parts.append((whole + whole.roll(-1, 1).flip(1))[: reach + 1, : reach + 1])
    product, pairs = parts
    alike = product / pairs.clamp(min=1)
    return alike / alike[0, 0].clamp(min=1e-6)


# --- shapes -----------------------------------------------------------------------------------------------------------


def shape_hues(pictures: Pictures) -> list[float]:
    """Hues in degrees of up to MAX_ACTORS shapes, the one with most pixels in the video first."""
    angle = torch.deg2rad(pictures.hue)
    east, north = (_mean(part(angle) * pictures.shapes) for part in (torch.cos, torch.sin))
    # Inside a shape: neighbors are shape too, and of one hue.
    inside = pictures.shapes & (torch.hypot(east, north) > 0.985)
    found = pictures.hue[inside]
    bins = 360 // BIN
    histogram = torch.bincount((found / BIN).long().clamp(max=bins - 1), minlength=bins).double()
    center = (torch.arange(bins) + 0.5) * BIN
    apart = (center[:, None] - center + 180) % 360 - 180
    kernel = torch.exp(-0.5 * (apart / SMOOTH) ** 2).double()
    hues = []
    for _ in range(MAX_ACTORS):
        peak = int((kernel @ histogram).argmax())
        near = apart[peak].abs() <= REACH
        mass = histogram * near
        if mass.sum() <= MIN_SHARE * inside.numel():
            break
        hue = float(center[peak] - (mass * apart[peak]).sum() / mass.sum()) % 360
        hues.append((float(mass.sum()), hue))
        histogram = histogram * ~near
    return [hue for _, hue in sorted(hues, reverse=True)]


def shape_masks(pictures: Pictures, hues: list[float]) -> Tensor:
    """Pixels [A, F, h, w] of each hue."""
    apart = [((pictures.hue - hue + 180) % 360 - 180).abs() for hue in hues]
    nearest = torch.full_like(pictures.hue, 1.5 * REACH)
    for one in apart:
        nearest = torch.minimum(nearest, one)
    return torch.stack([pictures.shapes & (one == nearest) for one in apart])


def halved(masks: Tensor) -> Tensor:
    """Shares 0..1 of masks [A, F, h, w] at half the size, without lines and single pixels. That is enough for outlines,
    and four times as fast."""
    small = F.avg_pool2d(masks.float().flatten(0, 1)[:, None], 2, ceil_mode=True)[:, 0]
    return (small * (_mean(small) > 0.4)).unflatten(0, masks.shape[:2])


@lru_cache(maxsize=4)
def _templates(window: int, scale: float) -> tuple[Tensor, Tensor]:
    """Spectra [S, R, window, window / 2 + 1] of every shape at every radius, in a corner; and their areas [S, R]."""
    place = ((torch.arange(window) + window // 2) % window - window // 2).double() / scale
    x, y, radius = place[None, None, :], place[None, :, None], RADII[:, None, None]
    edges = torch.stack([outline(i, x, y, radius) for i in range(len(SHAPES))])
    inside = (0.5 - edges * scale).clamp(0, 1).float()
    return torch.fft.rfft2(inside), inside.sum((-2, -1))


@dataclass(frozen=True)
class Fits:
    """A shape in N frames. frames [N]; center [N, 2] (x, y) in the picture and radius [N], in units of length; visible
    [N]: share of it that is seen."""

    frames: Tensor
    center: Tensor
    radius: Tensor
    visible: Tensor


@dataclass(frozen=True)
class _Windows:
    """Cuts around a shape in N frames: inside, known [N, W, W]; corner [N, 2] (x, y), of the cuts in the picture."""

    frames: Tensor
    inside: Tensor
    known: Tensor
    corner: Tensor

    def __getitem__(self, rows: Tensor) -> _Windows:
        return _Windows(self.frames[rows], self.inside[rows], self.known[rows], self.corner[rows])


def _windows(masks: Tensor, index: int, scale: float) -> _Windows | None:
    """Cuts of the frames in which enough of a shape is seen. scale: of the masks [A, F, h, w], of shares 0..1."""
    mask = masks[index]
    area = mask.sum((1, 2))
    largest = area.quantile(0.9)
    frames = (area > (0.12 * largest).clamp(min=3)).nonzero()[:, 0]
    if not len(frames):
        return None
    masks, mask, (height, width) = masks[:, frames], mask[frames], mask.shape[1:]
    window = 8 * math.ceil(WINDOW * scale / 8)
    others = masks[torch.arange(len(masks)) != index]
    hidden = _near(others.amax(0) > 0.25, 1) if len(others) else torch.zeros_like(mask, dtype=torch.bool)
    known = ~hidden | (mask > 0.5)
    rows, columns = (torch.arange(side, dtype=torch.float32) for side in (height, width))
    total = mask.sum((1, 2))
    middle = torch.stack(((mask.sum(1) * columns).sum(1) / total, (mask.sum(2) * rows).sum(1) / total), -1)
    corner = middle.round().long() - window // 2
    x = corner[:, :1] + torch.arange(window)
    y = corner[:, 1:] + torch.arange(window)
    there = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
    at = y.clamp(0, height - 1)[:, :, None] * width + x.clamp(0, width - 1)[:, None, :]

    def cut(values: Tensor) -> Tensor:
        return values.float().flatten(1).gather(1, at.flatten(1)).view(at.shape) * there

    return _Windows(frames, cut(mask), cut(known), corner)


def _overlap(windows: _Windows, templates: Tensor, areas: Tensor) -> tuple[Tensor, Tensor]:
    """Overlap over union of known pixels, and the share of a template that is seen, at every displacement:
    both [N, ..., W, W] for templates [..., W, W / 2 + 1]."""
    size = windows.inside.shape[1:]
    more = (None,) * (templates.ndim - 2)
    inside, known = (torch.fft.rfft2(values)[:, *more] for values in (windows.inside, windows.known))
    common = torch.fft.irfft2(templates.conj() * inside, s=size)
    covered = torch.fft.irfft2(templates.conj() * known, s=size)
    whole = windows.inside.sum((1, 2))[:, *more, None, None]
    return common / (whole + covered - common).clamp(min=1), common / areas[..., None, None]


def fit(masks: Tensor, index: int, scale: float) -> tuple[str, Fits, Tensor] | None:
    """The shape that one of `masks` [A, F, h, w], of shares 0..1, shows; where it is, and the rows of the fits that
    show it best; or None if it is hardly seen. scale: of the masks."""
    windows = _windows(masks, index, scale)
    if windows is None:
        return None
    size = windows.inside.shape[-1]
    templates, areas = _templates(size, scale)
    # The least hidden frames, in which few pixels border on what is unknown.
    area = windows.inside.sum((1, 2))
    contact = (_near(windows.inside > 0.5, 1) & (windows.known < 0.5)).sum((1, 2))
    clear = area * (1 - contact / (3 * area.sqrt())).clamp(min=0.05)
    best = clear.argsort(descending=True, stable=True)[:SHAPE_FRAMES]
    overlap, visible = _overlap(windows[best], templates, areas)
    shape = int((overlap + HIDDEN * visible).flatten(2).amax(2).mean(0).argmax())
    return SHAPES[shape], *_located(windows, templates[shape], areas[shape], scale, best)


def _located(windows: _Windows, templates: Tensor, areas: Tensor, scale: float, best: Tensor) -> tuple[Fits, Tensor]:
    overlap, visible = _overlap(windows, templates, areas)
    count = len(overlap)
    quality = overlap + HIDDEN * visible
    which = quality.flatten(2).amax(2).argmax(1)
    rows = torch.arange(count)
    score = quality[rows, which]
    # In halves: a pixel lies between two of the pictures'.
    center = (windows.corner + _peak(score) + 0.25) / scale
    flat = score.flatten(1).argmax(1)
    seen = visible[rows, which].flatten(1)[rows, flat]
    good = overlap[rows, which].flatten(1)[rows, flat] >= MIN_IOU
    good &= seen >= MIN_VISIBLE
    radius = RADII[which].float()
    ranked = torch.full((count,), len(best), dtype=torch.long)
    ranked[best] = torch.arange(len(best))
    kept = good.nonzero()[:, 0]
    fits = Fits(windows.frames[kept], center[kept], radius[kept], seen[kept])
    order = ranked[kept].argsort(stable=True)
    return fits, order[: int((ranked[kept] < len(best)).sum())]
