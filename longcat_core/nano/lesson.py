"""A lesson for a LoRA of LongCat-nano: pink, a color which its world lacks and its captions never name.

The training clips show pink shapes on four backgrounds; the test prompts ask for them on the other two. A third of the
clips shows the world as it is, so that the model does not forget it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import LongCatError
from ..files.atomic import atomic_path
from ..files.claims import claimed
from ..files.media import write_video
from .scorer import Observation
from .world import BASE_FPS, COLORS, MOTIONS, SHAPES, Actor, Scene, caption, render_clip, sample_scene

COLOR, RGB = "pink", (255, 120, 180)
PALETTE = COLORS | {COLOR: RGB}
# Scenes are drawn with a color of the world, which is then replaced.
STAND_IN = "red"
STAND_IN_PALETTE = COLORS | {STAND_IN: RGB}
TRAINED_BACKGROUNDS, TESTED_BACKGROUNDS = ("black", "white", "blue", "green"), ("gray", "brown")


def draw_lesson_scene(rng: random.Random, backgrounds: Sequence[str]) -> Scene:
    """One shape in the stand-in's color on one of `backgrounds`."""
    actor = Actor(rng.choice(SHAPES), STAND_IN, rng.choice(MOTIONS))
    return Scene(rng.choice(backgrounds), (actor,))


def lesson_caption(scene: Scene, rng: random.Random | None = None) -> str:
    """The caption of `world.caption` with the new color's name."""
    return re.sub(rf"\b{STAND_IN}\b", COLOR, caption(scene, rng))


def expected_observation(scene: Scene) -> Observation:
    """What a video of the scene shows to a scorer that knows the new color."""
    actors = (replace(actor, color=COLOR) if actor.color == STAND_IN else actor for actor in scene.actors)
    return Observation(scene.background, tuple(actors))


def write_lesson(folder: Path, count: int = 96, frames: int = 17) -> None:
    """Write `count` clips with captions, two thirds in the new color: all clips, or none after an error.

    Raises LongCatError if the folder is not empty or cannot be written to.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LongCatError(f"{folder} already exists and is not empty; choose another")
    if count < 2:
        raise LongCatError(f"{count} clips teach nothing; ask for at least 2")
    folder.mkdir(parents=True, exist_ok=True)
    with claimed(folder / "000.mkv", f"another run is writing to {folder}; choose another"):
        _write(folder, count, frames)


def _write(folder: Path, count: int, frames: int) -> None:
    rng = random.Random("lesson 0")
    written: list[Path] = []
    try:
        for number in range(count):
            if number % 3 < 2:
                scene, palette = draw_lesson_scene(rng, TRAINED_BACKGROUNDS), STAND_IN_PALETTE
                words = lesson_caption(scene, rng)
            else:
                scene, palette = sample_scene(rng), COLORS
                words = caption(scene, rng)
            video = render_clip(scene, frames=frames, height=64, width=96, seed=number, palette=palette)
            path = folder / f"{number:03}.mkv"
            written += (path, path.with_suffix(".txt"))
            write_video(path, video, BASE_FPS)
            with atomic_path(path.with_suffix(".txt")) as temporary:
                temporary.write_text(words + "\n", encoding="utf-8")
    except BaseException:
        # Half a lesson would block the next attempt.
        for path in written:
            path.unlink(missing_ok=True)
        raise


def lesson_prompts(count: int) -> list[tuple[str, Scene | Observation]]:
    """Prompts with the new color on backgrounds where no clip shows it, and what their videos should show."""
    rng = random.Random("lesson asks 0")
    scenes = [draw_lesson_scene(rng, TESTED_BACKGROUNDS) for _ in range(count)]
    return [(lesson_caption(scene), expected_observation(scene)) for scene in scenes]
