"""Draw scenes of LongCat-mini's world, many clips at once, on the device of their placements.

The world is a plane that the camera looks at. Its ground never repeats under a cloudy texture. Shapes live on a torus
half as large again as the picture: one that leaves is gone for a while and comes back as it was. Lengths are pixels at
a shorter side of 64 and motion is fixed per second, so a placement gives the same video at every size and frame rate.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import LongCatError
from ...optimize.compilation import Regional
from ..world import BASE_FPS, BASE_SIDE, Rows, shape_distance, to_bytes, wrap
from .scenes import BACKGROUNDS, COLORS, DARK, GROUNDS, MAX_ACTORS, SHAPES, TEXTURES, Actor, Scene

HEIGHT, WIDTH, FRAMES = 192, 320, 61
TORUS = 1.5  # the shapes' torus, in pictures
RADIUS = (8.0, 12.0)
SPEED = (0.6, 1.2)  # pixels per frame at BASE_FPS
CAMERA_SPEED = (0.4, 0.9)
ORBIT_RADIUS, ORBIT_PERIOD = (8.0, 12.0), (1.6, 2.4)  # pixels, seconds
SWING, SWING_PERIOD = (11.0, 16.0), (1.8, 2.6)
PULSE_DEPTH, PULSE_PERIOD = 0.3, (1.2, 1.8)
SWAY, SWAY_PERIOD = (10.0, 16.0), (2.2, 3.2)
SEEN = (0.3, 1.8)  # seconds at which a shape is near the middle
SPREAD = (0.16, 0.32)  # distance from the middle then, in pictures
CELL = (6.5, 9.5)  # of a checked ground; spots stand 1.3 cells apart
WAVES, WAVELENGTH = 6, (12.0, 36.0)  # of a cloudy ground
_WAYS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
# Sides of a shape's texture in units of its radius.
STRIPE, CHECK, SPOT_PITCH, SPOT = 0.34, 0.42, 0.6, 0.2
RING_HOLE, DIAMOND = 0.5, 1.2


@dataclass(frozen=True)
class Placements(Rows):
    """B scenes of up to A = 3 actors, front first. Lengths in pixels at a shorter side of 64, times in seconds."""

    tones: Tensor  # [B, 2, 3] of the ground, in 0..1
    ground: Tensor  # [B] index into GROUNDS
    cell: Tensor  # [B]
    offset: Tensor  # [B, 2] of the ground's pattern
    waves: Tensor  # [B, WAVES, 3] wave vector (radians per pixel) and phase of a cloudy ground
    camera: Tensor  # [B, 5] velocity x, y per second; sway's amplitude, rate and phase
    color: Tensor  # [B, A, 3] in 0..1
    texture: Tensor  # [B, A] index into TEXTURES
    shape: Tensor  # [B, A] index into SHAPES, -1 for no actor
    seen: Tensor  # [B, A] time at which the actor is at `place`
    place: Tensor  # [B, A, 2] x, y in the picture then, as a fraction of width and height
    velocity: Tensor  # [B, A, 2] per second
    radius: Tensor  # [B, A]
    orbit: Tensor  # [B, A, 2] amplitudes along x and y of a turn, 0 for none
    depth: Tensor  # [B, A] relative change of the radius, 0 for no pulse
    rate: Tensor  # [B, A] radians per second of orbit, swing or pulse
    phase: Tensor  # [B, A] radians


def place(scenes: Sequence[Scene], seed: int) -> Placements:
    """Random positions, speeds, sizes and patterns for `scenes`, on the CPU; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    batch = len(scenes)

    def rand(*shape: int) -> Tensor:
        return torch.rand(batch, *shape, generator=generator, dtype=torch.float64)

    def between(bounds: tuple[float, float], *shape: int) -> Tensor:
        return bounds[0] + (bounds[1] - bounds[0]) * rand(*shape)

    rows = [[*scene.actors, *[None] * (MAX_ACTORS - len(scene.actors))] for scene in scenes]

    def table(value: Callable[[Actor], Any], nothing: Any = 0.0) -> Tensor:
        return torch.tensor([[nothing if a is None else value(a) for a in row] for row in rows], dtype=torch.float64)

    def whole(value: Callable[[Scene], Any]) -> Tensor:
        return torch.tensor([value(scene) for scene in scenes], dtype=torch.float64)

    wavelength, way = between(WAVELENGTH, WAVES), between((0, 2 * math.pi), WAVES)
    vector = torch.stack((way.cos(), way.sin()), -1) * (2 * math.pi / wavelength)[..., None]
    sways = whole(lambda scene: scene.camera == "sway")
    pan = whole(lambda scene: _WAYS.get(scene.camera, (0.0, 0.0))) * between(CAMERA_SPEED)[:, None] * BASE_FPS
    sway = torch.stack((sways * between(SWAY), 2 * math.pi / between(SWAY_PERIOD), between((0, 2 * math.pi))), dim=-1)
    # Around the middle, in different directions, so that shapes do not begin on top of each other.
    count = whole(lambda scene: len(scene.actors))[:, None]
    turn = (
        between((0, 2 * math.pi))[:, None] + 2 * math.pi * (torch.arange(MAX_ACTORS) + between((-0.2, 0.2), 3)) / count
    )
    where = 0.5 + between(SPREAD, MAX_ACTORS)[..., None] * torch.stack((turn.cos(), turn.sin()), -1)

    def moves(name: str) -> Tensor:
        return table(lambda actor: float(actor.motion == name))

    kind = {name: moves(name) for name in ("circle", "swing", "pulse")}
    period = (
        kind["circle"] * between(ORBIT_PERIOD, MAX_ACTORS)
        + kind["swing"] * between(SWING_PERIOD, MAX_ACTORS)
        + kind["pulse"] * between(PULSE_PERIOD, MAX_ACTORS)
    )
    orbit, swing = kind["circle"] * between(ORBIT_RADIUS, MAX_ACTORS), kind["swing"] * between(SWING, MAX_ACTORS)
    return Placements(
        tones=(whole(lambda scene: BACKGROUNDS[scene.background]) / 255).float(),
        ground=whole(lambda scene: GROUNDS.index(scene.ground)).long(),
        cell=between(CELL),
        offset=between((0, 64), 2),
        waves=torch.cat((vector, between((0, 2 * math.pi), WAVES, 1)), -1),
        camera=torch.cat((pan, sway), -1),
        color=(table(lambda a: COLORS[a.color], (0, 0, 0)) / 255).float(),
        texture=table(lambda a: TEXTURES.index(a.texture)).long(),
        shape=table(lambda a: SHAPES.index(a.shape), -1).long(),
        seen=between(SEEN, MAX_ACTORS),
        place=where,
        velocity=table(lambda a: _WAYS.get(a.motion, (0.0, 0.0)), (0.0, 0.0))
        * (between(SPEED, MAX_ACTORS) * BASE_FPS)[..., None],
        radius=between(RADIUS, MAX_ACTORS),
        orbit=torch.stack((orbit + swing, orbit), -1),
        depth=kind["pulse"] * PULSE_DEPTH,
        rate=2 * math.pi / torch.where(period > 0, period, torch.ones_like(period)),
        phase=between((0, 2 * math.pi), MAX_ACTORS),
    )


@dataclass(frozen=True)
class Tracks:
    """camera: [B, F, 2] position of the picture's corner on the ground; center [B, A, F, 2] of the shapes in the
    picture, radius [B, A, F]; all float64, in pixels at a shorter side of 64."""

    camera: Tensor
    center: Tensor
    radius: Tensor


def tracks(placements: Placements, frames: int, size: tuple[float, float], fps: float, start_frame: int) -> Tracks:
    """Where everything is. size: width and height of the picture in pixels at a shorter side of 64."""
    p, device = placements, placements.place.device
    # float64, so that a position an hour into a video is as exact as in its first frame
    time = (start_frame + torch.arange(frames, dtype=torch.float64, device=device)) / fps
    picture = torch.tensor(size, dtype=torch.float64, device=device)

    def camera(at: Tensor) -> Tensor:
        """[B, ..., 2] at times [B or 1, ...]."""
        still = [1] * (at.ndim - 1)
        amplitude, rate, phase = (p.camera[:, i].view(-1, *still) for i in (2, 3, 4))
        sway = amplitude * (rate * at + phase).sin()
        pan = p.camera[:, :2].view(-1, *still, 2) * at[..., None]
        return pan + torch.stack((sway, torch.zeros_like(sway)), -1)

    def path(at: Tensor) -> Tensor:
        """[B, A, T, 2] at times [B or 1, A or 1, T]."""
        angle = p.rate[..., None] * at + p.phase[..., None]
        # y points down, so a growing angle turns clockwise
        turn = torch.stack((angle.cos(), angle.sin()), -1) * p.orbit[:, :, None]
        return p.velocity[:, :, None] * at[..., None] + turn

    seen = p.seen[..., None]
    home = p.place * picture + camera(p.seen) - path(seen)[:, :, 0]
    view = camera(time[None])
    middle = picture / 2
    center = home[:, :, None] + path(time[None, None]) - view[:, None] - middle
    center = torch.stack([wrap(center[..., i], TORUS * size[i]) for i in (0, 1)], -1) + middle
    angle = p.rate[..., None] * time + p.phase[..., None]
    return Tracks(view, center, p.radius[..., None] * (1 + p.depth[..., None] * angle.sin()))


def outline(shape: int, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Signed distance (negative inside) to the edge of SHAPES[shape] around the origin; y points down."""
    name = SHAPES[shape]
    if name == "ring":
        away = torch.hypot(x, y)
        return torch.maximum(away - radius, RING_HOLE * radius - away)
    if name == "diamond":
        return (x.abs() + y.abs() - DIAMOND * radius) * math.sqrt(0.5)
    return shape_distance(name, x, y, radius)


def pattern(texture: int, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Which of TEXTURES[texture]'s tones is seen, 0 bright to 1 dark, at x, y from a shape's center; edges are one
    pixel (of the shorter side of 64 pixels) soft."""
    name = TEXTURES[texture]
    if name == "plain":
        return torch.zeros_like(x + y)
    if name == "striped":
        return _stripes(x / radius, STRIPE) + torch.zeros_like(y)
    if name == "checked":
        return _xor(_stripes(x / radius, CHECK), _stripes(y / radius, CHECK))
    return _spots(x / radius, y / radius, SPOT_PITCH, SPOT)


def _stripes(u: Tensor, side: float | Tensor, sharp: float = 6.0) -> Tensor:
    """0 and 1 by turns along u, each `side` wide."""
    return (0.5 + sharp * 0.5 * (math.pi * u / side + math.pi / 2).sin()).clamp(0, 1)


def _xor(a: Tensor, b: Tensor) -> Tensor:
    return a + b - 2 * a * b


def _spots(u: Tensor, v: Tensor, pitch: float | Tensor, radius: float | Tensor, sharp: float = 12.0) -> Tensor:
    u, v = (u + pitch / 2) % pitch - pitch / 2, (v + pitch / 2) % pitch - pitch / 2
    return (0.5 + sharp * (radius - torch.hypot(u, v)) / pitch).clamp(0, 1)


def _draw(
    columns: Tensor, rows: Tensor, scale: float, tones: Tensor, ground: Tensor, cell: Tensor, view: Tensor,
    waves: Tensor, center: Tensor, radius: Tensor, shape: Tensor, texture: Tensor, color: Tensor,
) -> Tensor:  # fmt: skip
    """Pictures [N, H, W, 3] of N frames; every argument but the first three has N rows. Fused when compiled."""

    def each(values: Tensor) -> Tensor:
        return values[:, None, None]

    x, y = columns[None, None, :], rows[None, :, None]
    u, v = x + each(view[:, 0]), y + each(view[:, 1])
    side = each(cell)
    checks = _xor(_stripes(u, side), _stripes(v, side))
    spots = _spots(u, v, 1.3 * side, 0.42 * side)
    clouds = torch.zeros_like(checks)
    for k in range(waves.shape[1]):
        clouds = clouds + (each(waves[:, k, 0]) * x + each(waves[:, k, 1]) * y + each(waves[:, k, 2])).sin()
    clouds = (0.5 + 0.6 * clouds).clamp(0, 1)
    dark = torch.where(each(ground == 0), checks, torch.where(each(ground == 1), spots, clouds))[..., None]
    picture = torch.lerp(tones[:, None, None, 0], tones[:, None, None, 1], dark)
    for actor in range(center.shape[1] - 1, -1, -1):
        dx, dy, size = x - each(center[:, actor, 0]), y - each(center[:, actor, 1]), each(radius[:, actor])
        edge, tone = torch.full_like(checks, 1e3), torch.zeros_like(checks)
        for i in range(len(SHAPES)):
            edge = torch.where(each(shape[:, actor] == i), outline(i, dx, dy, size), edge)
        for i in range(1, len(TEXTURES)):
            tone = torch.where(each(texture[:, actor] == i), pattern(i, dx, dy, size), tone)
        alpha = (0.5 - edge * scale).clamp(0, 1)[..., None]
        shade = color[:, None, None, actor] * (1 - (1 - DARK) * tone[..., None])
        picture = torch.lerp(picture, shade, alpha)
    return picture


def _warn(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=2)


# Draws uncompiled where compiling fails.
_COMPILED = Regional(_draw, "drawing", slow=False)


def render(
    placements: Placements,
    frames: int,
    height: int,
    width: int,
    *,
    fps: float = BASE_FPS,
    start_frame: int = 0,
    compiled: bool = False,
) -> Tensor:
    """Draw frames start_frame .. start_frame + frames of every scene: [B, frames, height, width, 3] float32 in 0..1.

    Runs on the device of the placements. compiled: as one fused kernel; else it holds a dozen masks of all pictures.
    """
    if min(frames, height, width) < 1 or fps <= 0:
        raise LongCatError(f"cannot draw {frames} frames of {height}x{width} at {fps} fps; all must be positive")
    p, device = placements, placements.place.device
    scale = min(height, width) / BASE_SIDE
    track = tracks(p, frames, (width / scale, height / scale), fps, start_frame)

    def per_frame(values: Tensor) -> Tensor:
        """[B, ...] -> [B * F, ...]."""
        return values.repeat_interleave(frames, dim=0)

    def flat(values: Tensor) -> Tensor:
        return values.flatten(0, 1).float()

    # Patterns repeat, so the camera's way is taken modulo their periods before precision is cut.
    repeat = torch.where(p.ground == 1, 1.3, 2.0).to(p.cell) * p.cell
    view = (track.camera + p.offset[:, None]) % repeat[:, None, None]
    phase = torch.einsum("bki,bfi->bfk", p.waves[..., :2], track.camera) + p.waves[:, None, :, 2]
    vectors = p.waves[:, None, :, :2].expand(-1, frames, -1, -1)
    waves = torch.cat((vectors, (phase % (2 * math.pi))[..., None]), -1)
    pixel = torch.arange(max(height, width), dtype=torch.float32, device=device) / scale
    inputs = (
        pixel[:width], pixel[:height], scale,
        per_frame(p.tones), per_frame(p.ground), per_frame(p.cell).float(), flat(view), flat(waves),
        flat(track.center.transpose(1, 2)), flat(track.radius.transpose(1, 2)),
        per_frame(p.shape), per_frame(p.texture), per_frame(p.color),
    )  # fmt: skip
    kind = (frames * len(p), height, width)
    out = _COMPILED(*inputs, kind=kind, size=kind, announce=_warn) if compiled else _draw(*inputs)
    return out.unflatten(0, (len(p), frames))


def render_clip(
    scene: Scene, *, seed: int, frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH, fps: float = BASE_FPS
) -> np.ndarray:
    """One clip of one scene as uint8 [frames, height, width, 3]."""
    return to_bytes(render(place([scene], seed), frames, height, width, fps=fps)[0])
