"""A LoRA teaches nano pink in seconds: judged on backgrounds that it never saw the color on."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from longcat_core.cli import main as cli
from longcat_core.errors import LongCatError
from longcat_core.files import media
from longcat_core.files.media import write_video
from longcat_core.generate.pipeline import Pipeline
from longcat_core.nano import lesson
from longcat_core.nano.lesson import (
    COLOR,
    PALETTE,
    RGB,
    STAND_IN,
    STAND_IN_PALETTE,
    TESTED_BACKGROUNDS,
    TRAINED_BACKGROUNDS,
    draw_lesson_scene,
    expected_observation,
    lesson_caption,
    lesson_prompts,
    write_lesson,
)
from longcat_core.nano.scorer import analyze, compare
from longcat_core.nano.world import BACKGROUNDS, COLORS, Actor, Scene, render_clip
from longcat_core.sampling.conditioning import latent_shape, seeded_noise
from longcat_core.sampling.sampler import sample
from longcat_core.sampling.schedules import make_schedule
from longcat_core.training.clips import find_clips


def near(video: np.ndarray, color: tuple[int, int, int]) -> float:
    """Share of a video's pixels within 50 of 255 levels of a color."""
    return float((np.linalg.norm(video.astype(np.float32) - color, axis=-1) < 50).mean())


def test_the_lesson_is_what_it_says(tmp_path):
    write_lesson(tmp_path / "a", 9, frames=5)
    clips = find_clips(tmp_path / "a", 5)
    assert len(clips) == 9
    for number, found in enumerate(clips):
        share = near(found.read(), RGB)
        words = found.caption.lower().replace("grey", "gray").split()
        if number % 3 < 2:
            assert COLOR in words and share > 0.02 and any(name in words for name in TRAINED_BACKGROUNDS)
            assert not any(name in words for name in TESTED_BACKGROUNDS)
        else:
            assert COLOR not in words and share < 0.002
    write_lesson(tmp_path / "b", 9, frames=5)
    assert all((tmp_path / "b" / c.path.name).read_bytes() == c.path.read_bytes() for c in clips)
    with pytest.raises(LongCatError, match="not empty"):
        write_lesson(tmp_path / "a", 9)
    assert {wanted.background for _, wanted in lesson_prompts(16)} == set(TESTED_BACKGROUNDS)
    assert set(TRAINED_BACKGROUNDS + TESTED_BACKGROUNDS) == set(BACKGROUNDS)


def test_a_lesson_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    write, written = media.write_video, []

    def third_fails(path, *rest):
        if len(written) == 2:
            raise LongCatError("the disk is full")
        written.append(path)
        write(path, *rest)

    monkeypatch.setattr(lesson, "write_video", third_fails)
    with pytest.raises(LongCatError, match="full"):
        write_lesson(tmp_path / "a", 3, frames=5)
    assert len(written) == 2 and not list((tmp_path / "a").iterdir())
    monkeypatch.undo()
    write_lesson(tmp_path / "a", 3, frames=5)
    assert len(list((tmp_path / "a").iterdir())) == 6


def test_the_scorer_knows_the_new_color():
    rng = random.Random(0)
    for seed in range(4):
        scene = draw_lesson_scene(rng, TESTED_BACKGROUNDS)
        video = render_clip(scene, frames=33, height=64, width=96, seed=seed, palette=STAND_IN_PALETTE)
        assert all(compare(analyze(video, 1, palette=PALETTE), expected_observation(scene)).values())
        assert analyze(video, 1).actors[0].color in COLORS, "the world has no such color"
        assert COLOR in lesson_caption(scene)


PROMPTED = [
    Scene("black", (Actor(*actor),))
    for actor in (
        ("circle", STAND_IN, "right"),
        ("square", STAND_IN, "still"),
        ("triangle", STAND_IN, "up"),
        ("cross", STAND_IN, "left"),
    )
]


@torch.no_grad()
def pink(pipeline: Pipeline) -> list[float]:
    """How much pink is in videos of four prompts: nine frames, few steps."""
    context, mask = pipeline.text_encoder.encode([lesson_caption(scene) for scene in PROMPTED])
    negative = pipeline.text_encoder.encode([""])
    noise = torch.cat([seeded_noise((1, *latent_shape(9, 64, 96)), seed) for seed in range(len(PROMPTED))])
    options = {"negative_context": negative[0], "negative_mask": negative[1]}
    latents = sample(pipeline.model, noise, make_schedule("base", 10), context, mask, **options)
    return [near(pipeline.decode(one[None]), RGB) for one in latents]


def test_a_short_training_teaches_the_color(tmp_path, capsys):
    """On one background, by the command: the figures of the whole lesson are in docs/lora-training.md."""
    rng, folder, lora = random.Random(1), tmp_path / "clips", tmp_path / "pink.safetensors"
    folder.mkdir()
    for number in range(12):
        scene = draw_lesson_scene(rng, ("black",))
        clip = render_clip(scene, frames=9, height=64, width=96, seed=number, palette=STAND_IN_PALETTE)
        write_video(folder / f"{number}.mkv", clip, 15)
        (folder / f"{number}.txt").write_text(lesson_caption(scene))
    how = ["--frames", "9", "--steps", "30", "--batch", "8", "--learning-rate", "5e-3", "--shift", "6"]
    how += ["--cond-share", "0", "--no-gradient-checkpointing", "--device", "cpu"]
    assert cli.main(["train-lora", str(folder), "-o", str(lora), *how]) == 0
    assert "rank 16, 30 steps on 12 clips" in capsys.readouterr().out
    pipeline = Pipeline.load(lora_mode="runtime")
    before = pink(pipeline)
    pipeline.set_loras([(lora, 1.0)])
    after = pink(pipeline)
    # A shape covers 4 to 8 % of the picture.
    assert max(before) < 0.01, before
    assert sum(share > 0.02 for share in after) >= 2, after
