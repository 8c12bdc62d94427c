"""Measure how well a small model follows prompts: fresh prompts, fixed seeds, plain image analysis."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import LongCatError
from ..generate.engine import Denoising
from ..generate.pipeline import Pipeline
from ..generate.request import FilledRequest
from ..sampling.conditioning import latent_shape, seeded_noise
from ..sampling.sampler import Step
from ..sampling.schedules import make_schedule
from . import scorer, world
from .lesson import PALETTE, lesson_prompts
from .mini import scenes as mini
from .mini import scorer as mini_scorer
from .scorer import Score
from .world import to_bytes

BATCH = 16
# Each shuffle of the control displaces the captions by one more.
SHUFFLES = 5


@dataclass(frozen=True)
class Judge:
    """One procedural world. prompts: n captions, each with the scene that its video should show; analyze: a video
    uint8 [F, H, W, 3] to an observation; compare: an observation with a scene; attributes: their kinds, in order."""

    prompts: Callable[[int], list[tuple[str, Any]]]
    analyze: Callable[[np.ndarray], Any]
    compare: Callable[[Any, Any], Score]
    attributes: tuple[str, ...]


def _fresh(sample: Callable[[random.Random], Any], caption: Callable[[Any], str], count: int) -> list[tuple[str, Any]]:
    # A random stream that the training data does not use.
    rng = random.Random("fresh 0")
    return [(caption(scene), scene) for scene in (sample(rng) for _ in range(count))]


def _nano_judge(prompts: Callable[[int], list[tuple[str, Any]]], palette: Any) -> Judge:
    def analyze(video: np.ndarray) -> list[scorer.Observation]:
        """What is seen by looking for each number of shapes."""
        return [scorer.analyze(video, n, palette=palette) for n in range(1, world.MAX_ACTORS + 1)]

    def compare(seen: list[scorer.Observation], scene: Any) -> Score:
        return scorer.compare(seen[len(scene.actors) - 1], scene)

    return Judge(prompts, analyze, compare, ("background", "color", "shape", "motion"))


NANO_JUDGE = _nano_judge(lambda count: _fresh(world.sample_scene, world.caption, count), world.COLORS)
LESSON_JUDGE = _nano_judge(lesson_prompts, PALETTE)
MINI_JUDGE = Judge(
    lambda count: _fresh(mini.sample_scene, mini.caption, count),
    mini_scorer.analyze,
    mini_scorer.compare,
    (*mini.SCENE_ATTRIBUTES, *mini.ACTOR_ATTRIBUTES),
)
_JUDGES = {"nano": NANO_JUDGE, "mini": MINI_JUDGE}
_CORPORA = {"nano": world.corpus, "mini": mini.corpus}


def judge_of(name: str) -> Judge:
    """The judge of a world, by the name in a model's world.json. Raises LongCatError for one that is not known."""
    if name not in _JUDGES:
        raise LongCatError(f"the model knows the world {name!r}, which has no scorer; known are {', '.join(_JUDGES)}")
    return _JUDGES[name]


def prompts_of_world(name: str, count: int, seed: int) -> list[str] | None:
    """Captions of a world; None for one that is not known."""
    return _CORPORA[name](count, seed) if name in _CORPORA else None


@dataclass(frozen=True)
class Adherence:
    """right, total: number of correct and of all attributes by kind (background, color, ...). control: share correct
    with captions shuffled among videos. seconds: time for sampling and decoding. computed: steps of a video that were
    computed, a step without guidance by its share.
    """

    right: Counter[str]
    total: Counter[str]
    control: float
    seconds: float
    computed: float

    @property
    def fraction(self) -> float:
        return self.right.total() / self.total.total()


def tally(
    judge: Judge, observations: Sequence[Any], scenes: Sequence[Any], shift: int = 0
) -> tuple[Counter[str], Counter[str]]:
    """Correct and all attributes by kind, comparing video i with scene i + shift."""
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for i, seen in enumerate(observations):
        for name, correct in judge.compare(seen, scenes[(i + shift) % len(scenes)]).items():
            kind = name.split(".")[-1]
            total[kind] += 1
            right[kind] += bool(correct)
    return right, total


@torch.no_grad()
def generate_batch(
    pipeline: Pipeline,
    prompts: list[str],
    seeds: list[int],
    request: FilledRequest,
    stepped: Callable[[Step], None] | None = None,
) -> np.ndarray:
    """Videos uint8 [N, F, H, W, 3] of a request's size, several prompts in one network call.

    request: for all but prompts and seeds. stepped: called after every step.
    """
    shape = (1, *latent_shape(request.frames, request.height, request.width))
    options = Denoising(
        guidance_scale=request.guidance_scale,
        step_cache=request.step_cache,
        callback=stepped,
        guidance_until=request.guidance_until,
        sparse=request.sparse_settings,
    )
    with pipeline.turn():
        latents = pipeline.sampled(
            torch.cat([seeded_noise(shape, seed) for seed in seeds]),
            make_schedule(request.schedule, request.steps),
            pipeline.text_encoder.encode(prompts),
            pipeline.text_encoder.encode([request.negative_prompt]),
            options,
        )
    return np.stack([to_bytes(pipeline.vae.decode(one[None])[0]) for one in latents])


def batch_of(requests: Sequence[FilledRequest]) -> int:
    """Videos at a time: one where a cache would decide for all videos of a batch together. The same for all requests
    that are compared, since another batch rounds differently and takes another time."""
    return 1 if any(request.step_cache for request in requests) else BATCH


@contextmanager
def _looking(device: torch.device) -> Iterator[ThreadPoolExecutor]:
    """Threads beside the sampling: most of the cores where a GPU samples, and one where that needs the cores itself."""
    if device.type == "cpu":
        with ThreadPoolExecutor(1) as pool:
            yield pool
        return
    # PyTorch has one number of threads for the process; here every video has its own.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 2)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def measure(
    pipeline: Pipeline,
    count: int,
    request: FilledRequest,
    judge: Judge = NANO_JUDGE,
    batch: int = BATCH,
    each: Callable[[int, np.ndarray], None] = lambda number, video: None,
    stepped: Callable[[Step], None] = lambda step: None,
) -> Adherence:
    """Generate `count` fresh prompts (seed i for prompt i) and score them; the control averages shuffles by 1 to 5.

    request: for all but prompts and seeds. each: called with every video and its number, by several threads.
    stepped: called after every step of every batch.
    """
    prompts = judge.prompts(count)
    scenes = [scene for _, scene in prompts]
    work: list[float] = []

    def after(step: Step) -> None:
        work.append(step.computed)
        stepped(step)

    def look(number: int, video: np.ndarray) -> Any:
        each(number, video)
        return judge.analyze(video)

    # Videos are looked at while the next ones are sampled.
    with _looking(pipeline.model.device) as pool:
        started, waiting = time.monotonic(), []
        for start in range(0, count, batch):
            seeds = list(range(start, min(start + batch, count)))
            videos = generate_batch(pipeline, [prompts[i][0] for i in seeds], seeds, request, after)
            waiting += [pool.submit(look, i, video) for i, video in zip(seeds, videos, strict=True)]
        seconds = time.monotonic() - started
        observations = [one.result() for one in waiting]
    right, total = tally(judge, observations, scenes)
    shuffled = [tally(judge, observations, scenes, shift) for shift in range(1, min(SHUFFLES + 1, count))]
    control = sum(r.total() for r, _ in shuffled) / sum(t.total() for _, t in shuffled)
    return Adherence(right, total, control, seconds, sum(work) / len(work) * request.steps)
