"""Measure how well the bundled model follows prompts: fresh prompts, fixed seeds, plain image analysis."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..checkpoints.lora import Lora
from ..errors import LongCatError
from ..generate.options import MAX_GUIDANCE
from ..generate.pipeline import Pipeline
from ..generate.request import NANO, FilledRequest, GenerateRequest, check_number
from ..sampling.conditioning import latent_shape, seeded_noise
from ..sampling.guidance import DEFAULT_NEGATIVE_PROMPT
from ..sampling.sampler import Step, sample
from ..sampling.schedules import make_schedule
from .lesson import PALETTE, lesson_prompts
from .scorer import Observation, analyze, compare
from .world import COLORS, MAX_ACTORS, Scene, caption, sample_scene, to_bytes

BATCH = 16


@dataclass(frozen=True)
class Adherence:
    """right, total: number of correct and of all attributes by kind (background, color, shape, motion). control: share
    correct with captions shuffled among videos. seconds: time for sampling and decoding. work: computed steps of a
    video, a step without guidance or with skipped blocks by its share.
    """

    right: Counter[str]
    total: Counter[str]
    control: float
    seconds: float
    work: float

    @property
    def fraction(self) -> float:
        return self.right.total() / self.total.total()


def judge(
    observations: list[list[Observation]], scenes: Sequence[Scene | Observation], shift: int = 0
) -> tuple[Counter[str], Counter[str]]:
    """Correct and all attributes, comparing video i with scene i + shift; observations[i][n-1] looked for n actors."""
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for i, seen in enumerate(observations):
        scene = scenes[(i + shift) % len(scenes)]
        for name, correct in compare(seen[len(scene.actors) - 1], scene).items():
            kind = name.split(".")[-1]
            total[kind] += 1
            right[kind] += bool(correct)
    return right, total


@torch.no_grad()
def generate_batch(
    pipeline: Pipeline, prompts: list[str], seeds: list[int], request: FilledRequest, work: list[float] | None = None
) -> np.ndarray:
    """Videos uint8 [N, F, H, W, 3] of nano's default size, several prompts in one network call.

    request: for the steps, guidance and what is skipped. work: each step's computed share is appended.
    """

    def after(step: Step) -> None:
        if work is not None:
            work.append(step.computed)

    context, mask = pipeline.text_encoder.encode(prompts)
    negative = pipeline.text_encoder.encode([DEFAULT_NEGATIVE_PROMPT])
    shape = (1, *latent_shape(NANO.frames, NANO.height, NANO.width))
    latents = sample(
        pipeline.model,
        torch.cat([seeded_noise(shape, seed) for seed in seeds]),
        make_schedule("base", request.steps),
        context,
        mask,
        negative_context=negative[0],
        negative_mask=negative[1],
        guidance_scale=request.guidance_scale,
        guidance_until=request.guidance_until,
        step_cache=request.step_cache,
        step_cache_kind=request.step_cache_kind,
        callback=after,
    )
    videos = [pipeline.vae.decode(one[None])[0] for one in latents]
    return to_bytes(torch.stack(videos))


def measure(
    pipeline: Pipeline,
    count: int,
    steps: int = 50,
    guidance: float = 4.0,
    lesson: bool = False,
    skipped: dict[str, Any] | None = None,
) -> Adherence:
    """Generate `count` fresh prompts (seed i for prompt i) and score them; the control averages shuffles by 1 to 5.

    lesson: prompts of `nano.lesson` instead of the world's own. skipped: fields of `GenerateRequest` that leave work
    out: step_cache, step_cache_kind, guidance_until.
    """
    request = GenerateRequest("x", steps=steps, guidance_scale=guidance, **(skipped or {})).filled(NANO)
    # A cache decides for all videos of a batch together.
    batch = 1 if request.step_cache else BATCH
    if lesson:
        prompts, palette = lesson_prompts(count), PALETTE
    else:
        # A random stream that the training data does not use.
        rng = random.Random("fresh 0")
        prompts, palette = [(caption(scene), scene) for scene in (sample_scene(rng) for _ in range(count))], COLORS
    scenes = [scene for _, scene in prompts]
    observations = []
    work: list[float] = []
    started = time.monotonic()
    for start in range(0, count, batch):
        seeds = list(range(start, min(start + batch, count)))
        for video in generate_batch(pipeline, [prompts[i][0] for i in seeds], seeds, request, work):
            observations.append([analyze(video, n, palette=palette) for n in range(1, MAX_ACTORS + 1)])
    seconds = time.monotonic() - started
    right, total = judge(observations, scenes)
    shuffled = [judge(observations, scenes, shift) for shift in range(1, min(6, count))]
    control = sum(r.total() for r, _ in shuffled) / sum(t.total() for _, t in shuffled)
    return Adherence(right, total, control, seconds, sum(work) / len(work) * steps)


def run(
    count: int,
    steps: int,
    guidance: float,
    lora: Sequence[Lora] | None = None,
    lesson: bool = False,
    skipped: dict[str, Any] | None = None,
) -> int:
    """Print the table for the bundled model, with LoRAs if given; returns 0. The options are those of `measure`."""
    if count < 2:
        raise LongCatError(f"{count} prompts cannot be shuffled for the control; ask for at least 2")
    make_schedule("base", steps)
    check_number("guidance", guidance, 0.0, MAX_GUIDANCE)
    GenerateRequest("x", steps=steps, guidance_scale=guidance, **(skipped or {})).filled(NANO)
    pipeline = Pipeline.load(lora=lora)
    result = measure(pipeline, count, steps, guidance, lesson, skipped)
    print(
        f"{count} fresh prompts, {steps} steps of which {result.work:.1f} are computed, guidance {guidance:g}, "
        f"{result.seconds:.0f} s"
    )
    for kind in ("background", "color", "shape", "motion"):
        right, total = result.right[kind], result.total[kind]
        print(f"{kind:12} {right:4d} of {total:4d}  {right / total:6.1%}")
    print(f"{'all':12} {result.right.total():4d} of {result.total.total():4d}  {result.fraction:6.1%}")
    print(f"captions shuffled (control)  {result.control:6.1%}")
    return 0
