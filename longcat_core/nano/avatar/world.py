"""The world of the nano avatar: one or two faces over a plain background, whose mouths open with what they say."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import LongCatError
from ..world import BACKGROUNDS, COLORS, Rows, shape_distance

HEIGHT, WIDTH, FRAMES = 64, 96, 33
HEADS = ("circle", "square")
FACE_COLORS = {name: color for name, color in COLORS.items() if name != "purple"}
INK = (20, 15, 25)  # of eyes and mouths
# Proportions to the head's radius.
EYE_X, EYE_Y, EYE = 0.38, -0.32, 0.13
MOUTH_Y, MOUTH_HALF, CLOSED, OPENED = 0.38, 0.44, 0.05, 0.30
ALONE, PAIRED = (20.0, 24.0), (17.0, 19.5)  # radius in pixels


@dataclass(frozen=True)
class Face:
    head: str
    color: str
    talks: bool = True


@dataclass(frozen=True)
class Scene:
    """One or two faces, from left to right; at least one talks."""

    background: str
    faces: tuple[Face, ...]

    def __post_init__(self) -> None:
        colors = [self.background, *(face.color for face in self.faces)]
        if not 1 <= len(self.faces) <= 2 or not any(face.talks for face in self.faces):
            raise LongCatError("a scene has one or two faces, and at least one talks")
        if len({*colors}) < len(colors):
            raise LongCatError(f"faces and background need different colors, got {', '.join(colors)}")


def sample_scene(rng: random.Random, faces: int, talking: int = 1) -> Scene:
    """A scene drawn uniformly, with this number of faces, of which `talking` talk."""
    background = rng.choice(list(BACKGROUNDS))
    colors = rng.sample([name for name in FACE_COLORS if name != background], faces)
    talks = rng.sample(range(faces), talking)
    return Scene(background, tuple(Face(rng.choice(HEADS), color, i in talks) for i, color in enumerate(colors)))


def caption(scene: Scene) -> str:
    """ "a red circle face talks and a green square face listens on a blue background"."""
    parts = [
        f"{'an' if face.color[0] in 'aeiou' else 'a'} {face.color} {face.head} face "
        f"{'talks' if face.talks else 'listens'}"
        for face in scene.faces
    ]
    return f"{' and '.join(parts)} on a {scene.background} background"


def prompts(count: int, seed: int) -> list[str]:
    """Captions of scenes with one face."""
    rng = random.Random(seed)
    return [caption(sample_scene(rng, 1)) for _ in range(count)]


@dataclass(frozen=True)
class Placements(Rows):
    """B scenes, ready to draw; lengths in pixels, colors in 0..1."""

    background: Tensor  # [B, 3]
    color: Tensor  # [B, 2, 3]
    head: Tensor  # [B, 2] index into HEADS, -1 for no face
    center: Tensor  # [B, 2, 2] x, y
    radius: Tensor  # [B, 2]


def place(scenes: Sequence[Scene], seed: int) -> Placements:
    """Random places and sizes on the CPU. The same seed gives the same placements."""
    draw = torch.rand(len(scenes), 2, 3, generator=torch.Generator().manual_seed(seed))
    count = torch.tensor([len(scene.faces) for scene in scenes])[:, None]
    low, high = (torch.where(count > 1, pair, single) for single, pair in zip(ALONE, PAIRED, strict=True))
    middle = torch.where(count > 1, torch.tensor([WIDTH / 4, 3 * WIDTH / 4]), torch.tensor(WIDTH / 2))
    shift = 4 * draw[..., :2] - 2
    faces = [[*scene.faces, *[None] * (2 - len(scene.faces))] for scene in scenes]
    return Placements(
        background=torch.tensor([BACKGROUNDS[scene.background] for scene in scenes]) / 255,
        color=torch.tensor([[FACE_COLORS[f.color] if f else (0, 0, 0) for f in row] for row in faces]) / 255,
        head=torch.tensor([[HEADS.index(f.head) if f else -1 for f in row] for row in faces]),
        center=torch.stack((middle + shift[..., 0], HEIGHT / 2 + shift[..., 1]), dim=-1),
        radius=low + (high - low) * draw[..., 2],
    )


def mouth(placements: Placements) -> tuple[Tensor, Tensor]:
    """Center [B, 2, 2] and half width [B, 2] of each mouth."""
    down = torch.stack((torch.zeros_like(placements.radius), MOUTH_Y * placements.radius), dim=-1)
    return placements.center + down, MOUTH_HALF * placements.radius


def render(placements: Placements, opening: Tensor) -> Tensor:
    """Draw [B, F, HEIGHT, WIDTH, 3] fp32 in 0..1. opening: [B, 2, F] in 0..1, of each face's mouth."""
    batch, _, frames = opening.shape
    device = opening.device
    columns = torch.arange(WIDTH, device=device) + 0.5
    rows = torch.arange(HEIGHT, device=device)[:, None] + 0.5
    video = placements.background[:, None, None, None].repeat(1, frames, HEIGHT, WIDTH, 1)
    ink = torch.tensor(INK, device=device) / 255

    def blend(color: Tensor, distance: Tensor) -> None:
        video.lerp_(color, (0.5 - distance).clamp_(0, 1).expand(batch, frames, HEIGHT, WIDTH)[..., None])

    for face in range(2):
        radius = placements.radius[:, face, None, None, None]
        x = columns - placements.center[:, face, 0, None, None, None]
        y = rows - placements.center[:, face, 1, None, None, None]
        shapes = torch.stack([shape_distance(name, x, y, radius).expand(-1, 1, HEIGHT, WIDTH) for name in HEADS])
        index = placements.head[:, face]
        absent = torch.where(index < 0, 1e3, 0.0)[:, None, None, None]
        head = shapes[index.clamp(min=0), torch.arange(batch, device=device)]
        blend(placements.color[:, face, None, None, None], head + absent)
        for side in (-1, 1):
            blend(ink, torch.hypot(x - side * EYE_X * radius, y - EYE_Y * radius) - EYE * radius + absent)
        half = radius * (CLOSED + OPENED * opening[:, face, :, None, None])
        wide = MOUTH_HALF * radius
        across, down = x / wide, (y - MOUTH_Y * radius) / half
        # The distance to an ellipse, to first order.
        scaled = torch.hypot(across, down)
        slope = torch.hypot(across / wide, down / half).clamp(min=1e-6)
        blend(ink, scaled * (scaled - 1) / slope + absent)
    return video
