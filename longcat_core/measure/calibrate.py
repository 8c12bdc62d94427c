"""The search for a calibration: dense videos under a probe, the lowest densities that keep a budget, and a check.

The videos are sampled densely, in fewer steps than usual. In some steps of each range a `Probe` prices a ladder of
densities in every layer and head, by what the error of the head adds to the output of the layer's attention. All heads
of a range share one budget so that their mean density is the lowest: a head whose output counts little, or whose error
falls slowly, leaves more to others. A layer whose heads need so much that a block kernel would not be faster stays
dense.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import LongCatError
from ..generate.calibration import FORMAT, VERSION, Calibration, Point, Settings, VideoCheck, calibrated
from ..generate.paths import World
from ..generate.pipeline import Pipeline
from ..generate.progress import Part, Progress, sampled
from ..generate.request import FilledRequest
from ..model.transformer import LongCatTransformer
from ..nano.adherence import prompts_of_world
from ..optimize.attention import Inputs
from ..optimize.sparse.layout import sparse_order
from ..optimize.sparse.passes import MIN_BLOCKS, blocks_of
from ..optimize.sparse.settings import BLOCK, Sparse, kept
from ..sampling.conditioning import latent_frames, latent_shape
from ..sampling.schedules import make_schedule
from .calibration_report import MASS_AT, NO_FLOOR
from .clock import synchronize
from .fidelity import other_kernel, psnr
from .probe import LADDER, Probe, probing
from .results import machine

# Sampled where no prompt is given.
PROMPTS = (
    "A woman in a red coat walks through a crowded market street at dusk, lanterns swaying above the stalls, the "
    "camera follows her from behind",
    "Waves break over dark rocks below a lighthouse, spray rises in slow motion, gulls circle, the camera pans to the "
    "right",
)
# What a block kernel takes in the time of the dense one: each block takes longer, and pooling comes on top. Measured at
# 37,440 tokens (docs/performance.md).
BLOCK_COST, TAIL_COST = 1.4, 0.05
# From this density on, the mean over a layer's heads, dense attention is as fast.
DENSE_FROM = (1 - TAIL_COST) / BLOCK_COST
# Powers of ten between which the rate is searched at which error is paid for density, and how often they are halved.
RATES, ROUNDS = (-14.0, 4.0), 40
MEASURING, CHECKING, FLOOR = "measuring", "checking, sparse", "noise floor"


@dataclass(frozen=True)
class Recipe:
    """How to calibrate.

    budget: error of the layers' attention, |sparse - exact| / |exact| behind its output projection, the root mean
    square of a range. dense_steps: share of the steps that stays dense. ranges: of the other steps, each with densities
    of its own. probes: steps of a range that are measured, in each video. samples: queries of a pass, layer and video
    that are looked at. video: whether a whole video is made with the result.
    """

    budget: float = 0.1
    dense_steps: float = 0.2
    ranges: int = 3
    probes: int = 2
    samples: int = 512
    video: bool = True
    tail: bool = True
    query_block: int = BLOCK
    ladder: tuple[float, ...] = LADDER


@dataclass(frozen=True)
class Measured:
    """Which steps are measured. ends: of the ranges, see `Calibration`; at: step -> its range; dense: steps before the
    first range; steps: all of them."""

    ends: tuple[float, ...]
    at: dict[int, int]
    dense: int
    steps: int

    @classmethod
    def of(cls, steps: int, recipe: Recipe) -> Measured:
        """For a schedule with this many evaluations. Raises LongCatError if all of them stay dense."""
        sparse = [i for i in range(steps) if i / steps >= recipe.dense_steps]
        if not sparse:
            raise LongCatError(
                f"a share of {recipe.dense_steps:g} dense steps leaves none of {steps} to calibrate; give a smaller "
                "share or more steps"
            )
        count = min(recipe.ranges, len(sparse))
        parts = [sparse[len(sparse) * i // count : len(sparse) * (i + 1) // count] for i in range(count)]
        ends = (*(part[0] / steps for part in parts[1:]), 1.0)
        # The first and the last of a range differ most.
        picked = [[part[round(i)] for i in np.linspace(0, len(part) - 1, recipe.probes)] for part in parts]
        at = {step: number for number, part in enumerate(picked) for step in part}
        return cls(ends, at, sparse[0], steps)


def default_prompts(world: World | None, seed: int = 0) -> list[str]:
    """Two prompts that a model understands. world: the only one that it knows, if it is a small model."""
    count = len(PROMPTS)
    own = None if world is None else prompts_of_world(world.world, count, random.Random(seed).randrange(1 << 30))
    return list(PROMPTS) if own is None else own


# --- densities -------------------------------------------------------------------------------------------------------

Densities = tuple[tuple[tuple[float, ...], ...], ...]


def choose(squares: Tensor, ladder: Sequence[float], budget: float) -> Densities:
    """The densities of each range, layer and head: in every range the lowest mean whose error keeps the budget.

    squares [ranges, depth, heads, L]: what comes of each head, see `Probe`. The square of a layer's error is the sum of
    these, and that of a range's the mean over its layers. Layers that need DENSE_FROM or more are dense: 1 for every
    head.
    """
    steps = torch.tensor([*ladder, 1.0], dtype=torch.float64)
    # An error that comes back at a higher density counts at the lower ones too.
    squares = squares.cpu().double().flip(-1).cummax(-1).values.flip(-1)
    squares = torch.nn.functional.pad(squares, (0, 1))
    # All heads pay the same for what a density saves; the highest rate that keeps the budget is searched.
    low, high = (torch.full((len(squares), 1, 1, 1), power, dtype=torch.float64) for power in RATES)
    for _ in range(ROUNDS):
        rate = (low + high) / 2
        best = (squares + 10**rate * steps).argmin(-1, keepdim=True)
        keeps = squares.gather(-1, best).sum(2, keepdim=True).mean(1, keepdim=True) <= budget**2
        low, high = torch.where(keeps, rate, low), torch.where(keeps, high, rate)
    found = steps[(squares + 10**low * steps).argmin(-1)]
    found[found.mean(-1) >= DENSE_FROM] = 1.0
    rows: list[list[list[float]]] = found.tolist()
    return tuple(tuple(tuple(row) for row in layers) for layers in rows)


def attention_cost(densities: Sequence[Sequence[float]]) -> float:
    """Time of the attention of all layers [layers][heads], in that of dense attention."""
    means = [statistics.fmean(row) for row in densities]
    return statistics.fmean(min(1.0, BLOCK_COST * mean + TAIL_COST) for mean in means)


def expected_speed_up(densities: Densities, measured: Measured, attention: float) -> float:
    """Of all steps. attention: share of self-attention in a dense step, 0..1."""
    seconds = float(measured.dense)
    for step in range(measured.dense, measured.steps):
        at = next(i for i, end in enumerate(measured.ends) if step / measured.steps < end)
        seconds += 1 - attention + attention * attention_cost(densities[at])
    return measured.steps / seconds


# --- running ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Videos:
    """What is sampled: `count` videos of one size. prompts: for the file, as far as they are known; given: conditioning
    frames."""

    schedule: str
    steps: int
    guidance: float
    frames: int
    height: int
    width: int
    given: int
    seed: int
    count: int
    prompts: tuple[str, ...] = ()

    @classmethod
    def of(cls, requests: Sequence[FilledRequest]) -> Videos:
        first, prompts = requests[0], tuple(request.prompt for request in requests)
        size = first.frames, first.height, first.width, first.cond_frames
        return cls(first.schedule, first.steps, first.guidance_scale, *size, first.seed, len(prompts), prompts)

    def settings(self, recipe: Recipe, lora: Sequence[str] = ()) -> Settings:
        how = recipe.dense_steps, recipe.query_block, recipe.tail
        what = self.schedule, self.steps, float(self.guidance), self.frames, self.height, self.width, self.given
        return Settings(recipe.budget, *what, *how, self.seed, tuple(lora))


def check_calibration(videos: Videos, recipe: Recipe, patch: Sequence[int] = (1, 2, 2)) -> tuple[Measured, Recipe]:
    """The steps to measure, and the recipe with a ladder that such videos can tell apart.

    patch: of the network, in frames, rows and columns of latents. Raises LongCatError for values out of range and for
    videos that are too short or small.
    """
    for name, value, least, most in (
        ("budget", recipe.budget, 0.001, 1.0),
        ("share of dense steps", recipe.dense_steps, 0.0, 1.0),
    ):
        if not least <= value <= most:
            raise LongCatError(f"a {name} of {value:g} is out of range; give {least:g} to {most:g}")
    measured = Measured.of(len(make_schedule(videos.schedule, videos.steps)), recipe)
    _, frames, height, width = latent_shape(videos.frames, videos.height, videos.width)
    each = height // patch[1] * (width // patch[2])
    given = latent_frames(videos.given) if videos.given else 0
    _, others = blocks_of(frames * each, given * each)
    if (tokens := (frames - given) * each) < MIN_BLOCKS * BLOCK:
        raise LongCatError(
            f"{videos.frames} frames of {videos.height}x{videos.width} have {tokens:,} tokens to generate, too few "
            f"for sparse attention, which needs {MIN_BLOCKS * BLOCK:,}; ask for a larger size or more frames"
        )
    counts = dict(zip(kept(recipe.ladder, others), recipe.ladder, strict=True))
    return measured, replace(recipe, ladder=tuple(counts.values()))


# Called after each step: (its index, how many there are).
Stepped = Callable[[int, int], None]


class Subject(Protocol):
    """A model that is calibrated, in `longcat` or in ComfyUI."""

    @property
    def network(self) -> LongCatTransformer: ...

    @property
    def device(self) -> torch.device: ...

    def probed(self, probe: Probe) -> AbstractContextManager[None]:
        """Passes go through a probe inside the `with` block, and are not sparse."""

    def video(self, number: int, stepped: Stepped) -> np.ndarray:
        """Sample a video; its frames uint8 [F, H, W, 3], or none where no video is checked."""

    def sparse(self, settings: Sparse) -> AbstractContextManager[None]:
        """Attention is sparse inside the `with` block."""

    def rounded_otherwise(self) -> AbstractContextManager[str]:
        """Inside the `with` block the network is exact and rounds differently; gives what was changed, or "" if nothing
        could be."""


class PipelineSubject:
    """A loaded pipeline, which samples a request for each video."""

    def __init__(self, pipeline: Pipeline, requests: Sequence[FilledRequest]) -> None:
        self.pipeline, self.requests, self.network = pipeline, requests, pipeline.model
        self.device = self.network.device

    @contextmanager
    def probed(self, probe: Probe) -> Iterator[None]:
        with self._set(None), probing(self.network, probe):
            yield

    def video(self, number: int, stepped: Stepped) -> np.ndarray:
        # A request decides for itself, in place of the network.
        request = replace(self.requests[number], sparse=self.network.sparse)
        return self.pipeline.generate(request, lambda step: stepped(step.index, step.total)).frames

    def sparse(self, settings: Sparse) -> AbstractContextManager[None]:
        return self._set(settings)

    @contextmanager
    def _set(self, settings: Sparse | None) -> Iterator[None]:
        before, self.network.sparse = self.network.sparse, settings
        try:
            yield
        finally:
            self.network.sparse = before

    @contextmanager
    def rounded_otherwise(self) -> Iterator[str]:
        network = self.network
        before = network.requested
        inputs = Inputs(self.device, network.compute_dtype, network.config.head_dim, False)
        try:
            changed = replace(before, attention=other_kernel(before.attention, inputs))
            said = f"attention {changed.attention}"
        except LongCatError:
            # The two halves of guidance by themselves are smaller products.
            split = before.split_guidance or self.requests[0].guidance_scale == 1
            changed, said = (before, "") if split else (replace(before, split_guidance=True), "split guidance")
        network.set_optimizations(changed)
        try:
            with self._set(None):
                yield said
        finally:
            network.set_optimizations(before)


class Search:
    """One calibration. progress: shows the stages, and has the parts of `parts`."""

    def __init__(self, videos: Videos, recipe: Recipe, progress: Progress) -> None:
        self.videos, self.progress = videos, progress
        self.measured, self.recipe = check_calibration(videos, recipe)
        # Seconds of dense steps.
        self.dense: list[float] = []

    @staticmethod
    def parts(videos: Videos, recipe: Recipe) -> list[Part]:
        """What the bar shows: the videos that are measured, and two to check the result."""
        kinds = [MEASURING] * videos.count + [CHECKING, FLOOR] * recipe.video
        return [sampled(videos.schedule, videos.steps, kind) for kind in kinds]

    def run(self, subject: Subject, lora: Sequence[str] = ()) -> Calibration:
        """Calibrate. lora: names of the LoRAs on the model, for the file."""
        network, recipe = subject.network, self.recipe
        config, blocks = network.config, max(1, recipe.samples // recipe.query_block)
        how = recipe.query_block, recipe.tail, recipe.ladder, blocks, self.videos.seed
        self.probe = Probe(len(self.measured.ends), config.depth, config.num_heads, *how, token_order)
        exact, *_ = [self._measure(subject, number) for number in range(self.videos.count)]
        densities = choose(self.probe.mean_squares(), recipe.ladder, recipe.budget)
        head_mass = self._mass(self.probe.mass)
        found = Calibration(
            FORMAT,
            VERSION,
            calibrated(network),
            self.videos.settings(recipe, lora),
            self.measured.ends,
            densities,
            tuple(self._curve()),
            tuple(round(statistics.fmean(row), 4) for row in head_mass),
            round(expected_speed_up(densities, self.measured, self._attention_share()), 3),
            None,
            datetime.now(UTC).date().isoformat(),
            machine(subject.device),
            self.videos.prompts,
            head_mass,
            self._mass(self.probe.best),
        )
        return replace(found, video=self._check(subject, found, exact)) if recipe.video else found

    # --- videos ------------------------------------------------------------------------------------------------------

    def _video(
        self, subject: Subject, number: int, label: str, before: Callable[[int], None] = lambda step: None
    ) -> tuple[np.ndarray, dict[int, float]]:
        """Frames uint8 [F, H, W, 3], and seconds of each step by its index. before: called before each step."""
        device, seconds, started = subject.device, dict[int, float](), 0.0
        self.progress.label = label

        def stepped(index: int, total: int) -> None:
            nonlocal started
            synchronize(device)
            seconds[index] = time.perf_counter() - started
            self.progress.step(index + 1, total)
            before(index + 1)
            started = time.perf_counter()

        before(0)
        started = time.perf_counter()
        frames = subject.video(number, stepped)
        self.progress.finish()
        return frames, seconds

    def _measure(self, subject: Subject, number: int) -> np.ndarray:
        count, probe = self.videos.count, self.probe

        def before(step: int) -> None:
            probe.range = self.measured.at.get(step)

        # An avatar has two segments of a prompt.
        several = count == len(self.videos.prompts) > 1
        label = f"{MEASURING} prompt {number + 1} of {count}" if several else MEASURING
        with subject.probed(probe):
            frames, seconds = self._video(subject, number, label, before)
        # A first step warms up, and measured ones take longer.
        self.dense += [s for step, s in seconds.items() if step and step not in self.measured.at]
        return frames

    def _check(self, subject: Subject, found: Calibration, exact: np.ndarray) -> VideoCheck:
        given, measured = self.videos.given, self.measured
        with subject.sparse(found.sparse()):
            frames, seconds = self._video(subject, 0, CHECKING)
        distance = video_psnr(frames, exact, given)
        rest = [s for step, s in sorted(seconds.items()) if step >= measured.dense]
        self.dense += [s for step, s in seconds.items() if 0 < step < measured.dense]
        # The first sparse step tries and compiles kernels.
        sparse_s = statistics.median(rest[1:] or rest)
        floor_psnr, floor = None, NO_FLOOR
        with subject.rounded_otherwise() as changed:
            if changed:
                frames, seconds = self._video(subject, 0, FLOOR)
                floor_psnr, floor = video_psnr(frames, exact, given), changed
            else:
                self.progress.drop(FLOOR)
        dense_s = statistics.median(self.dense or seconds.values())
        faster = measured.steps * dense_s / (measured.dense * dense_s + (measured.steps - measured.dense) * sparse_s)
        psnrs = _finite(distance), _finite(floor_psnr)
        return VideoCheck(*psnrs, floor, round(dense_s, 4), round(sparse_s, 4), round(faster, 3))

    # --- figures -----------------------------------------------------------------------------------------------------

    def _attention_share(self) -> float:
        """Share of self-attention in a dense step, as far as dense steps were timed; else a half."""
        own = sum(self.probe.attention_s) / (len(self.measured.at) * self.videos.count)
        return min(1.0, own / statistics.median(self.dense)) if self.dense else 0.5

    def _curve(self) -> Iterator[Point]:
        # Of layers whose heads all have one density.
        flat = self.probe.mean_squares().sum(2).sqrt().flatten(0, 1)
        mass = self._masses(self.probe.mass).mean((0, 1))
        for i, density in enumerate(self.recipe.ladder):
            median, high = flat[:, i].median().item(), flat[:, i].quantile(0.9).item()
            yield Point(density, *(float(f"{x:.3g}") for x in (median, high, mass[i].item())))

    def _masses(self, sums: Tensor) -> Tensor:
        """Means over the prices, [depth, heads, L]. sums: `mass` or `best` of the probe."""
        return sums.cpu().double() / self.probe.count.sum(0)[:, None, None].clamp(min=1)

    def _mass(self, sums: Tensor) -> tuple[tuple[float, ...], ...]:
        """[layers][heads], at the density nearest to MASS_AT."""
        nearest = min(range(len(self.recipe.ladder)), key=lambda i: abs(self.recipe.ladder[i] - MASS_AT))
        rows: list[list[float]] = self._masses(sums)[..., nearest].tolist()
        return tuple(tuple(round(share, 4) for share in row) for row in rows)


def token_order(grid: tuple[int, int, int], device: torch.device, apart: tuple[int, int] = (0, 0)) -> Tensor:
    """The order of the tokens of noise frames (frames, rows, columns) in sparse attention, [N] int64. apart: frames
    (first, past the last) that are ordered by themselves."""
    order, _ = sparse_order(grid, 0, device, apart)
    return order


def video_psnr(video: np.ndarray, reference: np.ndarray, given: int = 0) -> float:
    """PSNR in dB of uint8 frames [F, H, W, 3] without the first `given` ones; infinite for identical ones."""
    errors = [
        np.square(one.astype(np.float32) - other.astype(np.float32)).mean(dtype=np.float64)
        for one, other in zip(video[given:], reference[given:], strict=True)
    ]
    return psnr(float(np.mean(errors)))


def _finite(value: float | None) -> float | None:
    return None if value is None or math.isinf(value) else round(value, 2)
