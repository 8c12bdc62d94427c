"""A lesson for a LoRA of LongCat-nano: pink, a colour that its world does not have and its captions never name.

In the clips to learn from pink circles and squares stand on four backgrounds; the prompts that are judged have pink
triangles and crosses on the other two. Half of the clips show the world as it is, so that it is not forgotten.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ..errors import LongCatError
from ..generate.media import write_video
from .scorer import Observation
from .world import BACKGROUNDS, BASE_FPS, COLOURS, SHAPES, Scene, caption, place, render, sample_scene

COLOUR, RGB = "pink", (255, 120, 180)
PALETTE = COLOURS | {COLOUR: RGB}
# Scenes are drawn with a colour of the world, which is then exchanged.
STAND_IN = "red"
SHAPES_SHOWN, SHAPES_ASKED = SHAPES[:2], SHAPES[2:]
BACKGROUNDS_SHOWN, BACKGROUNDS_ASKED = tuple(BACKGROUNDS)[:4], tuple(BACKGROUNDS)[4:]


def draw(rng: random.Random, shapes: Sequence[str], backgrounds: Sequence[str]) -> Scene:
    """A scene of the world in which one of `shapes` has the stand-in's colour, before one of `backgrounds`."""
    while True:
        scene = sample_scene(rng)
        if scene.background in backgrounds and any(a.colour == STAND_IN and a.shape in shapes for a in scene.actors):
            return scene


def text(scene: Scene, rng: random.Random | None = None) -> str:
    """The scene's caption, as `world.caption`, with the new word."""
    return re.sub(rf"\b{STAND_IN}\b", COLOUR, caption(scene, rng))


def truth(scene: Scene) -> Observation:
    """What a video of the scene shows to a scorer that knows the new colour."""
    actors = (replace(actor, colour=COLOUR) if actor.colour == STAND_IN else actor for actor in scene.actors)
    return Observation(scene.background, tuple(actors))


def clip(scene: Scene, seed: int, *, frames: int, height: int, width: int) -> np.ndarray:
    """The scene with the new colour, uint8 [F, H, W, 3]."""
    placements = place([scene], seed)
    for i, actor in enumerate(scene.actors):
        if actor.colour == STAND_IN:
            placements.colour[0, i] = torch.tensor(RGB) / 255
    video = render(placements, frames, height, width)[0]
    return (video * 255).round().to(torch.uint8).numpy()


def write_lesson(
    folder: Path, count: int = 64, *, seed: int = 0, frames: int = 33, height: int = 64, width: int = 96
) -> None:
    """Write `count` clips with captions, every other one of the new colour. Raises LongCatError for a folder in use."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LongCatError(f"{folder} is there and not empty; name a new folder")
    if count < 2:
        raise LongCatError(f"{count} clips teach nothing; ask for at least 2")
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"lesson {seed}")
    size = {"frames": frames, "height": height, "width": width}
    for number in range(count):
        new = number % 2 == 0
        scene = draw(rng, SHAPES_SHOWN, BACKGROUNDS_SHOWN) if new else sample_scene(rng)
        if new:
            video, words = clip(scene, number, **size), text(scene, rng)
        else:
            video = (render(place([scene], number), **size)[0] * 255).round().to(torch.uint8).numpy()
            words = caption(scene, rng)
        path = folder / f"{number:03}.mkv"
        write_video(path, video, BASE_FPS)
        path.with_suffix(".txt").write_text(words + "\n", encoding="utf-8")


def questions(count: int, seed: int = 0) -> list[tuple[str, Observation]]:
    """Prompts with the new colour, and what their videos show: shapes and backgrounds that no clip had it with."""
    rng = random.Random(f"lesson asks {seed}")
    scenes = [draw(rng, SHAPES_ASKED, BACKGROUNDS_ASKED) for _ in range(count)]
    return [(text(scene), truth(scene)) for scene in scenes]
