"""A wrong video is called wrong, and so is a refusal that nobody expects; only what is right is called right."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from longcat_core.nano.world import Actor, Scene, render_clip

from . import jobs, matrix, references
from .cells import CPU, DYNAMIC, LONGCAT, MODES, NONE, SPARSE, T2V, Cell
from .fleet import Seen
from .limits import PACKAGES
from .verdicts import REFUSED, RIGHT, SCORED, SHOWN, WRONG, clear, judge, psnr

JOB = jobs.of_cell(Cell("bf16", LONGCAT, DYNAMIC, NONE, T2V), 0)
SENTENCE = "nvfp4 needs a card of compute capability 10.0; use bf16"


def clip(scene: Scene) -> np.ndarray:
    return render_clip(scene, frames=17, height=64, width=96, seed=1)


@pytest.fixture(scope="module")
def video() -> np.ndarray:
    return clip(SHOWN)


def noisy(video: np.ndarray, sigma: float) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, sigma, video.shape)
    return np.clip(video + noise, 0, 255).round().astype(np.uint8)


def seen(frames: np.ndarray) -> Seen:
    return Seen("success", frames=frames)


def test_psnr_by_hand():
    assert psnr(np.full((2, 4, 4, 3), 10, np.uint8), np.full((2, 4, 4, 3), 20, np.uint8)) == 20 * math.log10(25.5)
    assert psnr(np.zeros((1, 4, 4, 3), np.uint8), np.zeros((1, 4, 4, 3), np.uint8)) == math.inf


def test_the_same_video_but_for_rounding_is_right(video):
    assert judge(JOB, seen(video), seen(video)).verdict == RIGHT
    found = judge(JOB, seen(noisy(video, 3)), seen(video))
    assert found.verdict == RIGHT and 35 < found.psnr < 45


def test_another_video_is_wrong(video):
    other = clip(replace(SHOWN, background="blue"))
    found = judge(JOB, seen(other), seen(video))
    assert found.verdict == WRONG and "dB from the CPU's video" in found.said


def test_a_video_that_lost_its_scene_is_wrong_even_if_it_is_near(video):
    other = clip(replace(SHOWN, actors=(Actor("circle", "red", "left"),)))
    lenient = replace(JOB, limit=1.0)
    found = judge(lenient, seen(other), seen(video))
    assert found.verdict == WRONG and "0.motion" in found.said
    assert judge(replace(lenient, scored=False), seen(other), seen(video)).verdict == RIGHT


@pytest.mark.parametrize("frames", [np.zeros((17, 64, 96, 3), np.uint8), np.full((17, 64, 96, 3), 128, np.uint8)])
def test_a_video_of_one_color_is_wrong(video, frames):
    assert judge(replace(JOB, limit=0.0), seen(frames), seen(video)).said == "a video of one color"


def test_another_length_is_wrong(video):
    assert "a video of [9, 64, 96, 3]" in judge(JOB, seen(video[:9]), seen(video)).said


@pytest.mark.parametrize("status", ["error", "refused", "crash"])
def test_a_refusal_that_nobody_expects_is_wrong(video, status):
    found = judge(JOB, Seen(status, SENTENCE, "model"), seen(video))
    assert found.verdict == WRONG and found.said == f"{status} at node model: {SENTENCE}"


def test_an_expected_refusal_is_one_with_its_sentence_only(video):
    job = replace(JOB, refusal="nvfp4 needs a card")
    assert judge(job, Seen("error", SENTENCE, "model"), seen(video)).verdict == REFUSED
    assert judge(job, Seen("error", "something else", "model"), seen(video)).verdict == WRONG
    assert judge(job, Seen("crash", SENTENCE), seen(video)).verdict == WRONG, "the server died"
    assert "ran, where a refusal" in judge(job, seen(video), seen(video)).said


def test_without_the_cpus_video_nothing_is_right(video):
    found = judge(JOB, seen(video), Seen("error", "out of memory"))
    assert found.verdict == WRONG and "the CPU's own run ended with error: out of memory" in found.said
    assert judge(JOB, Seen("success"), seen(video)).verdict == WRONG, "and without a video neither"


def test_a_server_on_the_cpu_has_no_other_mode():
    assert jobs.of_cell(Cell("bf16", LONGCAT, CPU, NONE, T2V), 0).mode == CPU


def test_only_the_motion_that_block_sparse_attention_leaves_is_unclear():
    """Every attribute of every scored video counts but this one, which rounding may tip."""
    kept, _ = references.read()
    scored = {references.name(job): job for job in matrix.plan(MODES, PACKAGES, first=False) if job.scored}
    unclear = {key: [name for name in SCORED if not clear(kept[key])[name]] for key in scored}
    sparse = f"{LONGCAT} / {SPARSE} / {T2V}"
    assert {key: names for key, names in unclear.items() if names} == {sparse: ["0.motion"]}
    pale = np.clip(kept[sparse].astype(int) * [0.2, 0.2, 1] + [0, 0, 60], 0, 255).astype(np.uint8)
    found = judge(replace(scored[sparse], limit=0.0), seen(pale), seen(kept[sparse]))
    assert found.verdict == WRONG and "the scorer does not find background" in found.said
