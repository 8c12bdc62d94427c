from __future__ import annotations

import random

import numpy as np
import pytest

from longcat_core.errors import LongCatError
from longcat_core.nano import scorer, world
from longcat_core.nano.world import Actor, Scene

CASES = [  # height, width, frames, fps
    (64, 96, 33, 15),
    (64, 64, 33, 15),
    (96, 64, 49, 15),
    (64, 96, 17, 15),
    (64, 96, 49, 30),
    (128, 192, 17, 15),
]


def ground_truth(count: int, seed: int, cases=CASES):
    rng = random.Random(seed)
    for index in range(count):
        height, width, frames, fps = cases[index % len(cases)]
        scene = world.sample_scene(rng)
        yield scene, world.render_clip(scene, frames=frames, height=height, width=width, seed=index, fps=fps), fps


def box_blur(video: np.ndarray) -> np.ndarray:
    return sum(np.roll(video, (row, column), (1, 2)) for row in (-1, 0, 1) for column in (-1, 0, 1)) / 9


def to_bytes(video: np.ndarray) -> np.ndarray:
    return video.clip(0, 255).round().astype(np.uint8)


def soft_and_noisy(video: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    noisy = box_blur(video.astype(np.float32)) + rng.normal(0, 12, video.shape)
    gray = noisy.mean(-1, keepdims=True)
    return to_bytes(gray + 1.15 * (noisy - gray))


def faded_and_jittery(video: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A color cast, ringing, frames in which the shapes nearly vanish, and a camera that shakes by a pixel."""
    blurred = box_blur(box_blur(video.astype(np.float32)))
    ringing = blurred + 1.2 * (blurred - box_blur(box_blur(blurred)))
    base = np.median(ringing, axis=(1, 2), keepdims=True)
    strength = np.where(rng.random(len(video)) < 0.15, 0.2, 0.9)[:, None, None, None]
    cast = base + strength * (ringing - base) + rng.uniform(-20, 20, 3)
    shaken = np.stack([np.roll(frame, tuple(rng.integers(-1, 2, 2)), (0, 1)) for frame in cast])
    return to_bytes(shaken + rng.normal(0, 8, video.shape))


def accuracy(scores: list[scorer.Score]) -> float:
    return sum(sum(score.values()) for score in scores) / sum(map(len, scores))


def test_ground_truth_is_read_back():
    scores = [scorer.score(video, scene, fps) for scene, video, fps in ground_truth(156, seed=0)]
    assert accuracy(scores) >= 0.99
    assert all({name.split(".")[-1] for name in score} >= {"background", "shape"} for score in scores)


@pytest.mark.parametrize("damage", [soft_and_noisy, faded_and_jittery])
def test_damaged_ground_truth_is_read_back(damage):
    rng = np.random.default_rng(0)
    clips = ground_truth(60, seed=1)
    assert accuracy([scorer.score(damage(video, rng), scene, fps) for scene, video, fps in clips]) >= 0.96


def test_shuffled_captions_score_at_chance():
    clips = list(ground_truth(60, seed=2, cases=CASES[:1]))
    shuffled = [
        scorer.score(video, clips[(index + shift) % len(clips)][0])
        for shift in (1, 2)
        for index, (_, video, _) in enumerate(clips)
    ]
    assert 0.1 < accuracy(shuffled) < 0.3


def test_every_attribute_can_be_wrong():
    shown = Scene("blue", (Actor("circle", "red", "right"),))
    video = world.render_clip(shown, frames=17, height=64, width=96, seed=0)
    asked = Scene("green", (Actor("square", "yellow", "left"),))
    assert not any(scorer.score(video, asked).values())
    assert scorer.score(video, shown) == {"background": True, "0.shape": True, "0.color": True, "0.motion": True}
    assert scorer.analyze(video, 1) == scorer.Observation("blue", shown.actors)


def test_a_missing_actor_is_wrong_in_everything():
    both = Scene("black", (Actor("circle", "red", "right"), Actor("square", "green", "left")))
    video = world.render_clip(Scene("black", both.actors[1:]), frames=17, height=64, width=96, seed=0)
    assert scorer.score(video, both) == {
        "background": True,
        **{f"0.{name}": False for name in ("shape", "color", "motion")},
        **{f"1.{name}": True for name in ("shape", "color", "motion")},
    }


def test_an_empty_video_shows_a_background_only():
    video = np.full((17, 64, 96, 3), world.BACKGROUNDS["brown"], np.uint8)
    assert scorer.analyze(video, 2) == scorer.Observation("brown", ())


def test_the_order_of_the_actors_does_not_matter():
    actors = Actor("triangle", "cyan", "up"), Actor("cross", "orange", "still")
    video = world.render_clip(Scene("gray", actors), frames=17, height=64, width=96, seed=4)
    assert all(scorer.score(video, Scene("gray", actors)).values())
    assert all(scorer.score(video, Scene("gray", actors[::-1])).values())


def test_slow_and_wandering_motion():
    """A drift far slower than the world's is still; a shape that teleports has no motion of the world."""
    scene = Scene("black", (Actor("circle", "red", "still"),))
    frame = world.render_clip(scene, frames=1, height=64, width=96, seed=0)[0]
    drift = np.stack([np.roll(frame, index // 8, axis=1) for index in range(33)])
    assert scorer.analyze(drift, 1).actors[0].motion == "still"
    rng = np.random.default_rng(0)
    jumps = np.stack([np.roll(frame, tuple(rng.integers(0, 64, 2)), axis=(0, 1)) for _ in range(33)])
    assert scorer.analyze(jumps, 1).actors[0].motion == scorer.IRREGULAR


@pytest.mark.parametrize("motion", ["left", "right", "up", "down"])
def test_uneven_speed_keeps_its_direction(motion):
    scene = Scene("white", (Actor("square", "blue", motion),))
    video = world.render_clip(scene, frames=66, height=64, width=96, seed=0)
    rng = np.random.default_rng(1)
    uneven = video[np.cumsum(rng.integers(0, 3, 33)).clip(0, 65)]
    assert scorer.score(uneven, scene)["0.motion"]


@pytest.mark.parametrize(
    ("video", "n_actors", "fps"),
    [
        (np.zeros((5, 64, 96, 3), np.float32), 1, 15),
        (np.zeros((64, 96, 3), np.uint8), 1, 15),
        (np.zeros((0, 64, 96, 3), np.uint8), 1, 15),
        (np.zeros((5, 64, 96, 3), np.uint8), 0, 15),
        (np.zeros((5, 64, 96, 3), np.uint8), 1, 0),
    ],
)
def test_unreadable_videos_are_refused(video, n_actors, fps):
    with pytest.raises(LongCatError, match="scorer"):
        scorer.analyze(video, n_actors, fps)
