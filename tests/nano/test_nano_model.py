"""The committed weights of LongCat-nano: size, form, and what they have learned."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from longcat_core.checkpoints.load import open_checkpoint
from longcat_core.files.safetensors_io import read_header
from longcat_core.generate.paths import NANO_MODEL, NANO_TEXT_ENCODER, NANO_VAE
from longcat_core.generate.pipeline import Pipeline
from longcat_core.generate.request import GenerateRequest
from longcat_core.measure.fidelity import psnr
from longcat_core.nano.adherence import measure
from longcat_core.nano.scorer import score
from longcat_core.nano.train import CONFIG
from longcat_core.nano.world import Actor, Scene, caption, render_clip


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.load()


def decibels(a: np.ndarray, b: np.ndarray) -> float:
    return psnr(np.square(a.astype(np.float64) - b).mean())


def test_assets_are_small_bf16_and_whole(pipeline):
    files = (NANO_MODEL, NANO_TEXT_ENCODER, NANO_VAE)
    assert sum(file.stat().st_size for file in files) <= 12_000_000
    for file in files:
        dtypes = {dtype for name, (dtype, _) in read_header(file).items() if name != "spiece_model"}
        assert dtypes == {torch.bfloat16}
    assert open_checkpoint(NANO_MODEL).config == CONFIG == pipeline.model.config


def test_follows_fresh_prompts_and_shuffled_ones_are_at_chance(pipeline):
    """The first half of the prompts that `longcat score-nano` asks; the other half would take CI minutes."""
    result = measure(pipeline, 32, GenerateRequest("x").filled(pipeline.defaults))
    assert result.total.total() == 161 and result.fraction >= 0.95
    for kind in ("background", "color", "shape", "motion"):
        assert result.right[kind] / result.total[kind] >= 0.9, kind
    # A caption of another video names the right color one time in eight, a motion one time in seven, a shape or a
    # background one time in four to eight.
    assert result.control <= 0.25


def test_image_to_video_keeps_the_first_frame(pipeline):
    scene = Scene("black", (Actor("circle", "green", "left"),))
    image = render_clip(scene, frames=1, height=64, width=96, seed=5)
    video = pipeline.generate(GenerateRequest(caption(scene), seed=5, given=image)).frames
    assert decibels(video[0], image[0]) >= 24
    result = score(video, scene)
    assert result["background"] and result["0.color"] and result["0.motion"]


def test_continuation_goes_on_as_the_clip_began(pipeline):
    right = total = 0
    for seed, motion in enumerate(("left", "right", "up", "down")):
        scene = Scene("gray", (Actor("circle", "red", motion),))
        clip = render_clip(scene, frames=33, height=64, width=96, seed=seed)
        request = GenerateRequest(caption(scene), seed=seed, given=clip[:13])
        video = pipeline.generate(request).frames
        assert decibels(video[:13], clip[:13]) >= 24
        # Where the clip would have gone by itself: one latent frame on, then the rest by eye.
        assert decibels(video[13:17], clip[13:17]) >= 20
        right += score(video[13:], scene)["0.motion"]
        total += 1
    assert right == total, f"{right} of {total} motions continued"


def test_same_seed_same_video_and_another_seed_another(pipeline):
    request = GenerateRequest("a red circle moves right on a blue background", frames=5, steps=4, seed=3)
    first, second = pipeline.generate(request), pipeline.generate(request)
    assert torch.equal(first.latents, second.latents)
    assert np.array_equal(first.frames, second.frames)
    other = pipeline.generate(GenerateRequest(request.prompt, frames=5, steps=4, seed=4))
    assert not torch.equal(first.latents, other.latents)


def test_prompt_matters(pipeline):
    rng = random.Random(0)
    videos = []
    for background in ("white", "black"):
        scene = Scene(background, (Actor("square", "red", "still"),))
        videos.append(
            pipeline.generate(GenerateRequest(caption(scene), frames=5, steps=10, seed=rng.randrange(9))).frames
        )
    assert videos[0].mean() > videos[1].mean() + 100
