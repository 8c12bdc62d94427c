"""What LongCat-mini's world shows, in words: scenes, captions, and what each word of a caption names.

One to three textured shapes move over a textured ground that a moving camera looks at. Shapes are named from front to
back. Motions are relative to the ground, so "still" moves with it when the camera pans.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from ...errors import LongCatError, check_choice
from ..reading import Labeled
from ..world import Color, Words

SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
TEXTURES = ("plain", "striped", "checked", "spotted")
MOTIONS = ("left", "right", "up", "down", "still", "circle", "swing", "pulse")
CAMERAS = ("still", "left", "right", "up", "down", "sway")
GROUNDS = ("checked", "spotted", "cloudy")
# Strong colors, at least 24 degrees of hue apart; a texture's second tone is half as bright and has the same hue.
COLORS: dict[str, Color] = {
    "red": (230, 30, 40),
    "orange": (250, 135, 20),
    "yellow": (245, 225, 45),
    "green": (30, 170, 60),
    "cyan": (40, 215, 220),
    "blue": (30, 70, 230),
    "purple": (155, 50, 205),
    "pink": (250, 60, 160),
}
DARK = 0.5
# Two tones each, all of weak color, so that hue tells shapes from ground.
BACKGROUNDS: dict[str, tuple[Color, Color]] = {
    "black": ((14, 14, 16), (52, 52, 56)),
    "gray": ((105, 105, 105), (150, 150, 150)),
    "white": ((250, 250, 250), (205, 205, 205)),
    "brown": ((95, 72, 55), (135, 108, 86)),
    "slate": ((62, 74, 98), (92, 106, 134)),
}
MAX_ACTORS = 3
ACTOR_COUNTS = (0.3, 0.4, 0.3)
SCENE_ATTRIBUTES = ("background", "ground", "camera")
ACTOR_ATTRIBUTES = ("texture", "color", "shape", "motion")
CHOICES: dict[str, tuple[str, ...]] = {
    "background": tuple(BACKGROUNDS),
    "ground": GROUNDS,
    "camera": CAMERAS,
    "texture": TEXTURES,
    "color": tuple(COLORS),
    "shape": SHAPES,
    "motion": MOTIONS,
}


@dataclass(frozen=True)
class Actor:
    texture: str
    color: str
    shape: str
    motion: str

    def __post_init__(self) -> None:
        for name in ACTOR_ATTRIBUTES:
            check_choice(f"the {name} of a shape", getattr(self, name), CHOICES[name])


@dataclass(frozen=True)
class Scene:
    """One to three actors of different colors, the front one first. Raises LongCatError for others."""

    background: str
    ground: str
    camera: str
    actors: tuple[Actor, ...]

    def __post_init__(self) -> None:
        for name in SCENE_ATTRIBUTES:
            check_choice(f"the {name} of a scene", getattr(self, name), CHOICES[name])
        colors = [actor.color for actor in self.actors]
        if not 1 <= len(colors) <= MAX_ACTORS:
            raise LongCatError(f"a scene holds 1 to {MAX_ACTORS} shapes, not {len(colors)}; leave some out")
        if len(set(colors)) < len(colors):
            raise LongCatError(f"shapes need different colors, got {', '.join(colors)}; change one")


def sample_scene(rng: random.Random) -> Scene:
    """A scene whose attributes are drawn uniformly, and its number of shapes by ACTOR_COUNTS."""
    (count,) = rng.choices(range(1, MAX_ACTORS + 1), ACTOR_COUNTS)
    colors = rng.sample(list(COLORS), count)
    actors = tuple(Actor(rng.choice(TEXTURES), color, rng.choice(SHAPES), rng.choice(MOTIONS)) for color in colors)
    return Scene(rng.choice(list(BACKGROUNDS)), rng.choice(GROUNDS), rng.choice(CAMERAS), actors)


# --- captions: the first entry of each row is the canonical one -----------------------------------------------------

SHAPE_WORDS: dict[str, Words] = {
    "circle": ("circle", "disc", "ball"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "cross": ("cross", "plus sign"),
    "ring": ("ring", "hoop"),
    "diamond": ("diamond", "rhombus"),
}
TEXTURE_WORDS: dict[str, Words] = {
    "plain": ("plain", "solid"),
    "striped": ("striped",),
    "checked": ("checked", "checkered"),
    "spotted": ("spotted", "dotted"),
    "cloudy": ("cloudy", "mottled"),
}
_WAYS = dict.fromkeys(MOTIONS[:4], ("moves {}", "is moving {}", "drifts {}", "glides {}", "travels {}"))
MOTION_WORDS: dict[str, Words] = {
    **{name: tuple(way.format(name) for way in ways) for name, ways in _WAYS.items()},
    "still": ("stays still", "stands still", "does not move"),
    "circle": ("moves in a circle", "goes around in a circle"),
    "swing": ("swings back and forth", "moves back and forth"),
    "pulse": ("pulses", "grows and shrinks"),
}
CAMERA_WORDS: dict[str, Words] = {
    "still": ("the camera stays still", "static camera", "the camera does not move"),
    "left": ("the camera pans left", "camera panning left", "the view moves left"),
    "right": ("the camera pans right", "camera panning right", "the view moves right"),
    "up": ("the camera tilts up", "camera moving up", "the view moves up"),
    "down": ("the camera tilts down", "camera moving down", "the view moves down"),
    "sway": ("the camera sways", "swaying camera", "the view sways"),
}
BACKGROUND_WORDS: dict[str, Words] = {name: (name,) for name in BACKGROUNDS}
_PLACES = ("on a {} background", "over a {} ground", "in front of a {} background")
_JOINTS = (" and ", ", ")
CANONICAL, ORDERED = 0.5, 0.8  # shares of captions


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """The canonical caption; with `rng` a paraphrase about every other time."""
    return labeled(scene, rng).text


def labeled(scene: Scene, rng: random.Random | None = None) -> Labeled:
    """The caption with what it says: of the whole scene, and of the span of each shape's words."""
    plain = rng is None or rng.random() < CANONICAL

    def say(table: dict[str, Words] | Words, name: str = "") -> str:
        words = table[name] if isinstance(table, dict) else table
        return words[0] if plain or rng is None or rng.random() < 0.4 else rng.choice(words)

    view = say(CAMERA_WORDS, scene.camera)
    ahead = not plain and rng is not None and rng.random() > ORDERED
    text, spans = f"{view}, " if ahead else "", []
    for number, actor in enumerate(scene.actors):
        if number:
            last = number == len(scene.actors) - 1
            text += (" and " if last else ", ") if plain else say(_JOINTS)
        begin = len(text)
        text += "a " + " ".join(
            (
                say(TEXTURE_WORDS, actor.texture),
                actor.color,
                say(SHAPE_WORDS, actor.shape),
                say(MOTION_WORDS, actor.motion),
            )
        )
        spans.append((begin, len(text)))
    where = f"{say(TEXTURE_WORDS, scene.ground)} {say(BACKGROUND_WORDS, scene.background)}"
    text += " " + say(_PLACES).format(where)
    if not ahead:
        text += f", {view}"
    whole = {name: getattr(scene, name) for name in SCENE_ATTRIBUTES} | {"actors": str(len(scene.actors))}
    parts = [
        (span, {name: getattr(actor, name) for name in ACTOR_ATTRIBUTES})
        for span, actor in zip(spans, scene.actors, strict=True)
    ]
    return Labeled(text, whole, parts)


# What the text encoder learns to answer: of the scene, then of a shape.
QUESTIONS: dict[str, tuple[str, ...]] = {
    **{name: CHOICES[name] for name in SCENE_ATTRIBUTES},
    "actors": tuple(str(n) for n in range(1, MAX_ACTORS + 1)),
    **{name: CHOICES[name] for name in ACTOR_ATTRIBUTES},
}


def corpus(n: int, seed: int = 0) -> list[str]:
    """`n` captions, canonical and paraphrased, for training a SentencePiece model."""
    rng = random.Random(seed)
    return [caption(sample_scene(rng), rng) for _ in range(n)]
