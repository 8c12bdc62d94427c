"""The scorer of LongCat-mini's world reads back what was drawn, and nothing else."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from longcat_core.nano.mini import scorer
from longcat_core.nano.mini.drawing import render_clip
from longcat_core.nano.mini.scenes import CHOICES, Actor, Scene, sample_scene

RED = Actor("plain", "red", "circle", "still")
PLAIN = Scene("gray", "checked", "still", (RED,))
# A quarter of the trained pixels, and three seconds.
SIZE = {"frames": 45, "height": 96, "width": 160}


def scenes(count: int) -> list[Scene]:
    """Scenes in which every value of every attribute occurs."""
    rng = random.Random(2)
    found = [sample_scene(rng) for _ in range(count)]
    for name, values in CHOICES.items():
        shown = {getattr(scene, name) for scene in found if hasattr(scene, name)}
        shown |= {getattr(actor, name) for scene in found for actor in scene.actors if hasattr(actor, name)}
        assert shown == set(values), name
    return found


def draw(scene: Scene, seed: int = 0, **changes: float) -> np.ndarray:
    return render_clip(scene, seed=seed, **(SIZE | changes))


@pytest.fixture(scope="module")
def drawn() -> list[tuple[Scene, np.ndarray]]:
    return [(scene, draw(scene, seed)) for seed, scene in enumerate(scenes(12))]


def soften(video: np.ndarray) -> np.ndarray:
    """About what a small VAE leaves: 27 dB."""
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(video).float().movedim(-1, 1)
    line = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    kernel = (line[:, None] * line).expand(3, 1, 5, 5)
    soft = torch.nn.functional.conv2d(torch.nn.functional.pad(pixels, (2, 2, 2, 2), "replicate"), kernel, groups=3)
    noisy = soft.movedim(1, -1).numpy() + rng.normal(0, 6, video.shape)
    return noisy.clip(0, 255).round().astype(np.uint8)


def share(pairs: list[tuple[scorer.Observation, Scene]]) -> float:
    scores = [scorer.compare(seen, scene) for seen, scene in pairs]
    return sum(sum(score.values()) for score in scores) / sum(map(len, scores))


def test_what_was_drawn_is_read_back_and_shuffled_captions_are_not(drawn):
    seen = [scorer.analyze(video) for _, video in drawn]
    wanted = [scene for scene, _ in drawn]
    assert share(list(zip(seen, wanted, strict=True))) >= 0.97
    for shift in (1, 2, 3):
        assert share(list(zip(seen, wanted[shift:] + wanted[:shift], strict=True))) <= 0.35


def test_soft_and_noisy_videos_are_read_too(drawn):
    assert share([(scorer.analyze(soften(video)), scene) for scene, video in drawn]) >= 0.95
