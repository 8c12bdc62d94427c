"""The procedural world of LongCat-nano: flat shapes moving over a plain background, with captions.

The picture is a torus: a shape that leaves on one side enters on the other, so every motion can continue forever.
A `Scene` says what is seen, `Placements` say where and how fast, and `render` draws any range of frames of many scenes
at once. Lengths scale with min(height, width) / 64 and motion is fixed per second, so one placement gives the same
video at every size and frame rate.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ..errors import LongCatError

SHAPES = ("circle", "square", "triangle", "cross")
MOTIONS = ("left", "right", "up", "down", "still", "circle", "pulse")
Color = tuple[int, int, int]
COLORS: dict[str, Color] = {
    "red": (230, 30, 40),
    "green": (30, 160, 60),
    "blue": (30, 70, 220),
    "yellow": (245, 225, 45),
    "purple": (165, 50, 195),
    "cyan": (40, 215, 220),
    "orange": (250, 135, 20),
    "white": (245, 245, 245),
}
BACKGROUNDS = {
    "black": (12, 12, 12),
    "gray": (128, 128, 128),
    "white": COLORS["white"],
    "blue": COLORS["blue"],
    "green": COLORS["green"],
    "brown": (115, 65, 28),
}

BASE_FPS = 15
BASE_SIDE = 64  # the shorter side at which the lengths below are pixels
RADIUS = (9.0, 13.0)
SPEED = (1.2, 2.2)  # pixels per frame at BASE_FPS
ORBIT_RADIUS = (8.0, 12.0)
ORBIT_PERIOD = (1.4, 2.0)  # seconds
PULSE_DEPTH = 0.3
PULSE_PERIOD = (1.0, 1.6)  # seconds
MAX_ACTORS = 2
_DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}

# Proportions to the radius, chosen so that all four shapes look about equally large.
_SQUARE_HALF, _TRIANGLE_INRADIUS, _CROSS_ARM, _CROSS_HALF = 0.89, 0.70, 1.15, 0.42
SHAPE_AREA = {  # in units of radius squared
    "circle": math.pi,
    "square": 4 * _SQUARE_HALF**2,
    "triangle": 3 * math.sqrt(3) * _TRIANGLE_INRADIUS**2,
    "cross": 8 * _CROSS_ARM * _CROSS_HALF - 4 * _CROSS_HALF**2,
}


@dataclass(frozen=True)
class Actor:
    shape: str
    color: str
    motion: str


@dataclass(frozen=True)
class Scene:
    """One or two actors over a background; shapes and background all differ in color, else LongCatError is raised."""

    background: str
    actors: tuple[Actor, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.actors) <= MAX_ACTORS:
            raise LongCatError(f"a scene holds 1 or {MAX_ACTORS} shapes, not {len(self.actors)}")
        _check("background", self.background, BACKGROUNDS)
        for actor in self.actors:
            _check("shape", actor.shape, SHAPES)
            _check("color", actor.color, COLORS)
            _check("motion", actor.motion, MOTIONS)
        colors = [self.background, *(actor.color for actor in self.actors)]
        if len(set(colors)) < len(colors):
            raise LongCatError(f"shapes and background need different colors, got {', '.join(colors)}")


def _check(what: str, value: str, choices: Sequence[str] | dict) -> None:
    if value not in choices:
        raise LongCatError(f"unknown {what} {value!r}; choose one of: {', '.join(choices)}")


def sample_scene(rng: random.Random, two_shapes: float = 0.35) -> Scene:
    """A scene drawn uniformly; with probability `two_shapes` it holds two actors."""
    background = rng.choice(list(BACKGROUNDS))
    colors = rng.sample([name for name in COLORS if name != background], 2 if rng.random() < two_shapes else 1)
    return Scene(background, tuple(Actor(rng.choice(SHAPES), color, rng.choice(MOTIONS)) for color in colors))


# --- captions: the first entry of each row is the canonical one -----------------------------------------------------

Words = tuple[str, ...]
SHAPE_WORDS: dict[str, Words] = {
    "circle": ("circle", "ball", "disc", "disk"),
    "square": ("square", "box", "block"),
    "triangle": ("triangle",),
    "cross": ("cross", "plus sign", "plus"),
}
COLOR_WORDS: dict[str, Words] = {name: (name,) for name in (*COLORS, *BACKGROUNDS)} | {
    "purple": ("purple", "violet"),
    "cyan": ("cyan", "turquoise"),
    "gray": ("gray", "grey"),
}
_MOVES = ("moves {}", "is moving {}", "slides {}", "drifts {}", "travels {}", "glides {}")
_WAYS = {
    "left": ("left", "to the left"),
    "right": ("right", "to the right"),
    "up": ("up", "upward", "upwards"),
    "down": ("down", "downward", "downwards"),
}
MOTION_WORDS = {name: tuple(move.format(way) for way in ways for move in _MOVES) for name, ways in _WAYS.items()} | {
    "still": ("stays still", "is still", "stands still", "remains still", "does not move", "is not moving"),
    "circle": ("moves in a circle", "is moving in a circle", "moves in circles", "goes around in a circle"),
    "pulse": ("pulses", "is pulsing", "pulsates", "grows and shrinks", "is growing and shrinking"),
}
_ARTICLES = ("a", "the", "one", "")
_PLACES = (
    "on a {} background",
    "over a {} background",
    "against a {} background",
    "in front of a {} background",
    "on a plain {} background",
    "in front of a plain {} background",
    "on {}",
)
_JOINTS = ("and", "while", ",")


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """The canonical caption; with `rng` a paraphrase about every other time."""
    if rng is None or rng.random() < 0.5:
        actors = [_name(actor.color, actor.shape, actor.motion) for actor in scene.actors]
        return f"{' and '.join(_sentence('a', *names) for names in actors)} on a {scene.background} background"
    article = rng.choice(_ARTICLES)
    actors = [_name(actor.color, actor.shape, actor.motion, rng) for actor in scene.actors]
    joint = rng.choice(_JOINTS)
    joint = ", " if joint == "," else f" {joint} "
    text = joint.join(_sentence(article, *names) for names in actors)
    background = rng.choice(COLOR_WORDS[scene.background])
    if rng.random() < 0.2:
        text = f"{background} background, {text}"
    else:
        text = f"{text} {rng.choice(_PLACES).format(background)}"
    text = text[0].upper() + text[1:] if rng.random() < 0.5 else text
    return text + "." if rng.random() < 0.5 else text


def _name(color: str, shape: str, motion: str, rng: random.Random | None = None) -> tuple[str, str, str]:
    rows: tuple[Words, ...] = COLOR_WORDS[color], SHAPE_WORDS[shape], MOTION_WORDS[motion]
    color, shape, motion = (row[0] if rng is None or rng.random() < 0.4 else rng.choice(row) for row in rows)
    return color, shape, motion


def _sentence(article: str, color: str, shape: str, motion: str) -> str:
    if article == "a" and color[0] in "aeiou":
        article = "an"
    return f"{article} {color} {shape} {motion}".strip()


def corpus(n: int, seed: int = 0) -> list[str]:
    """`n` captions, canonical and paraphrased, for training a SentencePiece model."""
    rng = random.Random(seed)
    return [caption(sample_scene(rng, two_shapes=0.5), rng) for _ in range(n)]


def _any_word(table: dict[str, Words], names: Sequence[str]) -> str:
    words = (word for name in names for word in table[name])
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))


_BACKGROUND = _any_word(COLOR_WORDS, tuple(BACKGROUNDS))
_ACTOR = (
    rf"(?:(?:a|an|the|one) )?({_any_word(COLOR_WORDS, tuple(COLORS))}) ({_any_word(SHAPE_WORDS, SHAPES)}) "
    rf"({_any_word(MOTION_WORDS, MOTIONS)})"
)
_FRONT = rf"(?:(?:a |the )?(?:plain )?({_BACKGROUND}) background ?, ?)?"
_BACK = rf"(?:,? ?(?:on|over|against|in front of) (?:an? |the )?(?:plain )?({_BACKGROUND})(?: background)?)?"
# Compiled when it is first used: that takes as long as all else in this module, and ComfyUI starts with it.
_CAPTION = rf"{_FRONT}{_ACTOR}(?:(?: and | while | ?, ?(?:and )?){_ACTOR})?{_BACK}"


def match_caption(text: str) -> re.Match[str]:
    """A caption of this world: groups 2 to 4 and 5 to 7 are the actors' color, shape and motion, the first and the last
    group the background. For any other text raises LongCatError with the vocabulary.
    """
    match = re.fullmatch(_CAPTION, text.lower().rstrip(". "))
    if match is None or (match[1] is None) == (match[match.re.groups] is None):
        raise LongCatError(
            f'"{text}" is not a caption of the nano world; write "a red circle moves right on a blue background", with '
            f"shapes {', '.join(SHAPES)}; colors {', '.join(COLORS)}; backgrounds {', '.join(BACKGROUNDS)}; "
            f"motions {', '.join(MOTION_WORDS[name][0] for name in MOTIONS)}; two shapes are joined by 'and'"
        )
    return match


def actor_spans(text: str) -> list[tuple[int, int]]:
    """The span of each actor's words in a caption, from color to motion: (start, end) in characters."""
    match = match_caption(text)
    return [(match.start(i), match.end(i + 2)) for i in (2, 5) if match.group(i)]


# --- placing and drawing ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Tensors with a row for each scene."""

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))

    def __getitem__(self, rows: slice | Tensor) -> Self:
        return type(self)(*(getattr(self, field.name)[rows] for field in fields(self)))

    def to(self, device: torch.device | str) -> Self:
        return type(self)(*(getattr(self, field.name).to(device) for field in fields(self)))


@dataclass(frozen=True)
class Placements(Rows):
    """B scenes of up to A = 2 actors, ready to draw. Lengths in pixels at a shorter side of 64, times in seconds."""

    background: Tensor  # [B, 3] in 0..1
    color: Tensor  # [B, A, 3] in 0..1
    shape: Tensor  # [B, A] index into SHAPES, -1 for no actor
    position: Tensor  # [B, A, 2] x, y at time 0 as a fraction of width, height (center of the orbit, if any)
    velocity: Tensor  # [B, A, 2] per second
    radius: Tensor  # [B, A]
    orbit: Tensor  # [B, A] radius of the orbit, 0 for none
    depth: Tensor  # [B, A] relative change of the radius, 0 for no pulse
    rate: Tensor  # [B, A] radians per second of orbit or pulse
    phase: Tensor  # [B, A] radians


def place(scenes: Sequence[Scene], seed: int | torch.Generator, palette: Mapping[str, Color] = COLORS) -> Placements:
    """Random positions, speeds, sizes and phases for `scenes`, on the CPU. The same seed gives the same placements.

    palette: names of the shapes' colors.
    """
    generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    batch = len(scenes)
    draw = torch.rand(batch, MAX_ACTORS, 6, generator=generator, dtype=torch.float64)

    def between(column: int, low: float | Tensor, high: float | Tensor) -> Tensor:
        return low + (high - low) * draw[..., column]

    actors = [[*scene.actors, *[None] * (MAX_ACTORS - len(scene.actors))] for scene in scenes]

    def table(value: Callable[[Actor | None], Any]) -> Tensor:
        return torch.tensor([[value(actor) for actor in row] for row in actors], dtype=torch.float64)

    def is_motion(name: str) -> Tensor:
        return table(lambda actor: float(actor is not None and actor.motion == name))

    position = draw[..., :2].clone()
    # The second actor starts about half a picture away on both axes, as far apart as a torus allows.
    position[:, 1] = (position[:, 0] + 0.5 + 0.24 * (draw[:, 1, :2] - 0.5)) % 1
    direction = table(lambda actor: _DIRECTIONS.get(actor.motion, (0.0, 0.0)) if actor else (0.0, 0.0))
    orbits, pulses = is_motion("circle"), is_motion("pulse")
    period = torch.where(orbits > 0, between(2, *ORBIT_PERIOD), between(2, *PULSE_PERIOD))
    return Placements(
        background=torch.tensor([BACKGROUNDS[scene.background] for scene in scenes], dtype=torch.float32) / 255,
        color=(table(lambda actor: palette[actor.color] if actor else (0, 0, 0)) / 255).float(),
        shape=table(lambda actor: SHAPES.index(actor.shape) if actor else -1).long(),
        position=position,
        velocity=direction * between(2, *SPEED).unsqueeze(-1) * BASE_FPS,
        radius=between(3, *RADIUS),
        orbit=orbits * between(4, *ORBIT_RADIUS),
        depth=pulses * PULSE_DEPTH,
        rate=2 * math.pi / period,
        phase=between(5, 0.0, 2 * math.pi),
    )


def shape_distance(shape: str, x: Tensor, y: Tensor, radius: Tensor | float) -> Tensor:
    """Signed distance in pixels (negative inside) to the edge of a shape around the origin; y points down.

    x and y broadcast against each other; outside a corner the value is the distance to the nearer edge line.
    """
    if shape == "circle":
        return torch.hypot(x, y) - radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - _SQUARE_HALF * radius
    if shape == "triangle":
        return torch.maximum(y, math.sqrt(0.75) * x.abs() - 0.5 * y) - _TRIANGLE_INRADIUS * radius
    if shape == "cross":
        x, y, arm, half = x.abs(), y.abs(), _CROSS_ARM * radius, _CROSS_HALF * radius
        return torch.minimum(torch.maximum(x - arm, y - half), torch.maximum(x - half, y - arm))
    raise LongCatError(f"unknown shape {shape!r}; choose one of: {', '.join(SHAPES)}")


def wrap(offset: Tensor, period: float) -> Tensor:
    """The shortest offset on a circle of the given length, in -period/2 .. period/2."""
    return (offset + period / 2) % period - period / 2


def trajectories(
    placements: Placements, frames: int, height: int, width: int, fps: float = BASE_FPS, start_frame: int = 0
) -> tuple[Tensor, Tensor]:
    """Centers [B, A, frames, 2] as x, y in pixels (not wrapped) and radii [B, A, frames] in pixels, float64."""
    scale = min(height, width) / BASE_SIDE
    size = torch.tensor([width, height], dtype=torch.float64, device=placements.position.device)
    # float64, so that a position an hour into a video is as exact as in its first frame
    time = (start_frame + torch.arange(frames, dtype=torch.float64, device=size.device)) / fps
    angle = placements.rate[..., None] * time + placements.phase[..., None]
    # y points down, so a growing angle turns clockwise
    turn = torch.stack([angle.cos(), angle.sin()], dim=-1) * placements.orbit[..., None, None]
    path = placements.velocity[..., None, :] * time[:, None] + turn
    center = placements.position[..., None, :] * size + path * scale
    radius = placements.radius[..., None] * scale * (1 + placements.depth[..., None] * angle.sin())
    return center, radius


def render(
    placements: Placements, frames: int, height: int, width: int, *, fps: float = BASE_FPS, start_frame: int = 0
) -> Tensor:
    """Draw frames start_frame .. start_frame + frames of every scene: [B, frames, height, width, 3] float32 in 0..1.

    Runs on the device of the placements. Besides the result it holds about three float32 masks of B * frames pictures.
    """
    if min(frames, height, width) < 1 or fps <= 0:
        raise LongCatError(f"cannot draw {frames} frames of {height}x{width} at {fps} fps; all must be positive")
    center, radius = trajectories(placements, frames, height, width, fps, start_frame)
    device, batch = center.device, len(placements)
    columns = torch.arange(width, dtype=torch.float64, device=device)
    rows = torch.arange(height, dtype=torch.float64, device=device)
    video = placements.background[:, None, None, None].repeat(1, frames, height, width, 1)
    for actor in range(placements.shape.shape[1]):
        x = wrap(columns - center[:, actor, :, :1], width).float()[:, :, None, :]
        y = wrap(rows - center[:, actor, :, 1:], height).float()[:, :, :, None]
        size = radius[:, actor, :, None, None].float()
        alpha = torch.zeros(batch, frames, height, width, device=device)
        for index, name in enumerate(SHAPES):
            clips = (placements.shape[:, actor] == index).nonzero().squeeze(1)
            alpha[clips] = shape_distance(name, x[clips], y[clips], size[clips]).neg_().add_(0.5).clamp_(0, 1)
        video.lerp_(placements.color[:, actor, None, None, None], alpha.unsqueeze(-1))
    return video


def render_clip(
    scene: Scene,
    *,
    frames: int,
    height: int,
    width: int,
    seed: int,
    fps: float = BASE_FPS,
    palette: Mapping[str, Color] = COLORS,
) -> np.ndarray:
    """One clip of one scene as uint8 [frames, height, width, 3]. palette: names of the shapes' colors."""
    return to_bytes(render(place([scene], seed, palette), frames, height, width, fps=fps)[0])


def to_bytes(video: Tensor) -> np.ndarray:
    """Numbers in 0..1 as uint8, on the CPU."""
    return video.mul(255).round().to(torch.uint8).cpu().numpy()
