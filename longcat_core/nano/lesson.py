"""A lesson for a LoRA of LongCat-nano: pink, a colour that its world does not have and its captions never name.

In the clips to learn from, pink shapes stand on four backgrounds; in the prompts that are judged, on the other two.
A third of the clips shows the world as it is, so that it is not forgotten.
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
from ..files.media import atomic_path, write_video
from .scorer import Observation
from .world import BASE_FPS, COLOURS, MOTIONS, SHAPES, Actor, Scene, caption, place, render, sample_scene

COLOUR, RGB = "pink", (255, 120, 180)
PALETTE = COLOURS | {COLOUR: RGB}
# Scenes are drawn with a colour of the world, which is then exchanged.
STAND_IN = "red"
SHOWN, ASKED = ("black", "white", "blue", "green"), ("gray", "brown")


def draw(rng: random.Random, backgrounds: Sequence[str]) -> Scene:
    """One shape in the stand-in's colour before one of `backgrounds`."""
    actor = Actor(rng.choice(SHAPES), STAND_IN, rng.choice(MOTIONS))
    return Scene(rng.choice(backgrounds), (actor,))


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
    folder: Path, count: int = 96, *, seed: int = 0, frames: int = 17, height: int = 64, width: int = 96
) -> None:
    """Write `count` clips with captions, two of three of the new colour: all, or none.

    Raises LongCatError for a folder in use, or one that cannot be written to.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LongCatError(f"{folder} is there and not empty; name a new folder")
    if count < 2:
        raise LongCatError(f"{count} clips teach nothing; ask for at least 2")
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"lesson {seed}")
    size = {"frames": frames, "height": height, "width": width}
    written: list[Path] = []
    try:
        for number in range(count):
            new = number % 3 < 2
            scene = draw(rng, SHOWN) if new else sample_scene(rng)
            if new:
                video, words = clip(scene, number, **size), text(scene, rng)
            else:
                video = (render(place([scene], number), **size)[0] * 255).round().to(torch.uint8).numpy()
                words = caption(scene, rng)
            path = folder / f"{number:03}.mkv"
            written += (path, path.with_suffix(".txt"))
            write_video(path, video, BASE_FPS)
            with atomic_path(path.with_suffix(".txt")) as temporary:
                temporary.write_text(words + "\n", encoding="utf-8")
    except BaseException:
        # Half a lesson would stand in the way of the next.
        for path in written:
            path.unlink(missing_ok=True)
        raise


def questions(count: int, seed: int = 0) -> list[tuple[str, Observation]]:
    """Prompts with the new colour, and what their videos show: on backgrounds that no clip had it on."""
    rng = random.Random(f"lesson asks {seed}")
    scenes = [draw(rng, ASKED) for _ in range(count)]
    return [(text(scene), truth(scene)) for scene in scenes]
