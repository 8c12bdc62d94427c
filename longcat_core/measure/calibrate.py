"""The search for a calibration: dense videos under a probe, the lowest densities that keep a budget, and a check.

The videos are sampled densely, in fewer steps than usual. In some steps of each range a `Probe` prices a ladder of
densities in every layer and head. A head gets the lowest density at which its output differed from the exact one by no
more than the budget in all of these passes: a mean would let one head be wrong at one noise level as long as it is
right at others, and errors of one step are handed on to all later ones. A layer whose heads need so much that a block
kernel would not be faster stays dense.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import LongCatError
from ..generate.calibration import FORMAT, VERSION, Calibration, Point, Settings, VideoCheck, calibrated
from ..generate.pipeline import Pipeline
from ..generate.progress import Part, Progress, sampled
from ..generate.request import FilledRequest
from ..nano.world import corpus
from ..optimize.attention import Inputs
from ..optimize.sparse.layout import sparse_order
from ..optimize.sparse.passes import MIN_BLOCKS, blocks_of
from ..optimize.sparse.settings import BLOCK, Sparse, kept
from ..sampling.conditioning import latent_frames, latent_shape
from ..sampling.sampler import Step
from ..sampling.schedules import make_schedule
from .clock import synchronize
from .fidelity import decibels, other_kernel, psnr
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
# The density at which `Calibration.mass` is given.
MASS_AT = 0.15
NO_FLOOR = "none: this machine has no second exact attention kernel"
MEASURING, CHECKING, FLOOR = "measuring", "checking, sparse", "noise floor"


@dataclass(frozen=True)
class Recipe:
    """How to calibrate.

    budget: largest error of a head, |sparse - exact| / |exact|. dense_steps: share of the steps that stays dense.
    ranges: of the other steps, each with densities of its own. probes: steps of a range that are measured, in each
    video. samples: query blocks of a pass, layer and video. video: whether a whole video is made with the result.
    """

    budget: float = 0.1
    dense_steps: float = 0.2
    ranges: int = 3
    probes: int = 2
    samples: int = 8
    video: bool = True
    tail: bool = True
    query_block: int = 64
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


def check_calibration(
    request: FilledRequest, recipe: Recipe, patch: Sequence[int] = (1, 2, 2)
) -> tuple[Measured, Recipe]:
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
    measured = Measured.of(len(make_schedule(request.schedule, request.steps)), recipe)
    _, frames, height, width = latent_shape(request.frames, request.height, request.width)
    each = height // patch[1] * (width // patch[2])
    given = latent_frames(request.cond_frames) if request.cond_frames else 0
    _, others = blocks_of(frames * each, given * each)
    if (tokens := (frames - given) * each) < MIN_BLOCKS * BLOCK:
        raise LongCatError(
            f"{request.frames} frames of {request.height}x{request.width} have {tokens:,} tokens to generate, too few "
            f"for sparse attention, which needs {MIN_BLOCKS * BLOCK:,}; ask for a larger size or more frames"
        )
    counts = dict(zip(kept(recipe.ladder, others), recipe.ladder, strict=True))
    return measured, replace(recipe, ladder=tuple(counts.values()))


def default_prompts(nano: bool, seed: int = 0) -> list[str]:
    """Two prompts that a model of this kind understands. nano: the bundled model, which knows its own world alone."""
    return corpus(len(PROMPTS), random.Random(seed).randrange(1 << 30)) if nano else list(PROMPTS)


# --- densities -------------------------------------------------------------------------------------------------------

Densities = tuple[tuple[tuple[float, ...], ...], ...]


def choose(worst: Tensor, ladder: Sequence[float], budget: float) -> Densities:
    """The lowest density of each range, layer and head from which on the error keeps the budget; 1 if none does.

    worst [ranges, depth, heads, L]: relative errors. Layers that need DENSE_FROM or more are dense: 1 for every head.
    """
    keeps = (worst <= budget).flip(-1).long().cumprod(-1).sum(-1)
    steps = torch.tensor([*ladder, 1.0], dtype=torch.float64)
    found = steps[len(ladder) - keeps.cpu()]
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


@dataclass
class _Clock:
    """Seconds of each step of a run, by its index."""

    device: torch.device
    seconds: dict[int, float] = field(default_factory=dict)

    def start(self) -> None:
        synchronize(self.device)
        self.last = time.perf_counter()

    def step(self, index: int) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        self.seconds[index], self.last = now - self.last, now


class Search:
    """One calibration. progress: shows the stages; call `plan` before models are loaded, then `run`."""

    def __init__(self, requests: Sequence[FilledRequest], recipe: Recipe, progress: Progress) -> None:
        """requests: one for each prompt, of one size; the first one's video is the one that is checked."""
        self.requests, self.progress = requests, progress
        self.measured, self.recipe = check_calibration(requests[0], recipe)
        self.dense: list[float] = []

    @staticmethod
    def parts(requests: Sequence[FilledRequest], recipe: Recipe) -> list[Part]:
        """What the bar shows: a video for each prompt, and two to check the result."""
        first = requests[0]
        kinds = [*(MEASURING for _ in requests), *((CHECKING, FLOOR) if recipe.video else ())]
        return [sampled(first.schedule, first.steps, kind) for kind in kinds]

    def run(self, pipeline: Pipeline, lora: Sequence[str] = ()) -> Calibration:
        """Calibrate a loaded model. lora: names of the LoRAs that it has, for the file."""
        network, recipe, first = pipeline.model, self.recipe, self.requests[0]
        network.sparse = None
        config = network.config
        self.probe = Probe(
            len(self.measured.ends),
            config.depth,
            config.num_heads,
            recipe.query_block,
            recipe.tail,
            recipe.ladder,
            recipe.samples,
            first.seed,
            token_order,
        )
        exact, *_ = [self._measure(pipeline, request, number) for number, request in enumerate(self.requests)]
        densities = choose(self.probe.worst, recipe.ladder, recipe.budget)
        found = Calibration(
            FORMAT,
            VERSION,
            calibrated(network),
            self._settings(lora),
            self.measured.ends,
            densities,
            tuple(self._curve()),
            self._mass(),
            round(expected_speed_up(densities, self.measured, self._attention_share()), 3),
            None,
            datetime.now(UTC).date().isoformat(),
            machine(network.device),
            tuple(request.prompt for request in self.requests),
        )
        return replace(found, video=self._check(pipeline, found, exact)) if recipe.video else found

    def _settings(self, lora: Sequence[str]) -> Settings:
        first, recipe = self.requests[0], self.recipe
        return Settings(
            recipe.budget,
            first.schedule,
            first.steps,
            float(first.guidance_scale),
            first.frames,
            first.height,
            first.width,
            first.cond_frames,
            recipe.dense_steps,
            recipe.query_block,
            recipe.tail,
            first.seed,
            tuple(lora),
        )

    # --- videos ------------------------------------------------------------------------------------------------------

    def _video(
        self, pipeline: Pipeline, request: FilledRequest, label: str, before: Callable[[int], None] = lambda step: None
    ) -> tuple[np.ndarray, dict[int, float]]:
        """Frames uint8 [F, H, W, 3], and seconds of each step. before: called before each step."""
        clock = _Clock(pipeline.model.device)
        self.progress.label = label

        def callback(step: Step) -> None:
            clock.step(step.index)
            self.progress.step(step.index + 1, step.total)
            before(step.index + 1)
            clock.start()

        before(0)
        clock.start()
        frames = pipeline.generate(request, callback).frames
        self.progress.finish()
        return frames, clock.seconds

    def _measure(self, pipeline: Pipeline, request: FilledRequest, number: int) -> np.ndarray:
        probe, several = self.probe, len(self.requests) > 1

        def before(step: int) -> None:
            probe.range = self.measured.at.get(step)

        label = f"{MEASURING} prompt {number + 1} of {len(self.requests)}" if several else MEASURING
        with probing(pipeline.model, probe):
            frames, seconds = self._video(pipeline, request, label, before)
        # A first step warms up, and measured ones take longer.
        self.dense += [s for step, s in seconds.items() if step and step not in self.measured.at]
        return frames

    def _check(self, pipeline: Pipeline, found: Calibration, exact: np.ndarray) -> VideoCheck:
        network, request = pipeline.model, self.requests[0]
        given = request.cond_frames
        with _sparse(network, found.sparse()):
            frames, seconds = self._video(pipeline, request, CHECKING)
        distance = video_psnr(frames, exact, given)
        rest = [s for step, s in sorted(seconds.items()) if step >= self.measured.dense]
        self.dense += [s for step, s in seconds.items() if 0 < step < self.measured.dense]
        # The first sparse step tries and compiles kernels.
        sparse_s = statistics.median(rest[1:] or rest)
        floor_psnr, floor = None, NO_FLOOR
        with self._other(pipeline) as changed:
            if changed:
                frames, seconds = self._video(pipeline, request, FLOOR)
                floor_psnr, floor = video_psnr(frames, exact, given), changed
            else:
                self.progress.drop(FLOOR)
        if not self.dense:
            self.dense = [s for step, s in seconds.items() if step] or list(seconds.values())
        dense_s, steps = statistics.median(self.dense), self.measured.steps
        faster = steps * dense_s / (self.measured.dense * dense_s + (steps - self.measured.dense) * sparse_s)
        return VideoCheck(
            _finite(distance), _finite(floor_psnr), floor, round(dense_s, 4), round(sparse_s, 4), round(faster, 3)
        )

    @contextmanager
    def _other(self, pipeline: Pipeline) -> Iterator[str]:
        """The network with another exact kernel, or with guidance in other batches, which round differently: yields
        what was changed, or "" if this machine has neither."""
        network = pipeline.model
        before = network.requested
        inputs = Inputs(network.device, network.compute_dtype, network.config.head_dim, False)
        try:
            changed = replace(before, attention=other_kernel(before.attention, inputs))
            said = f"attention {changed.attention}"
        except LongCatError:
            split = before.split_guidance or self.requests[0].guidance_scale == 1
            changed = before if split else replace(before, split_guidance=True)
            said = "" if split else "split guidance"
        network.set_optimizations(changed)
        try:
            yield said
        finally:
            network.set_optimizations(before)

    # --- figures -----------------------------------------------------------------------------------------------------

    def _attention_share(self) -> float:
        """Share of self-attention in a dense step, as far as steps were measured."""
        steps = len(self.measured.at) * len(self.requests)
        own = sum(self.probe.attention_s) / steps
        return min(1.0, own / statistics.median(self.dense)) if self.dense else 0.5

    def _curve(self) -> Iterator[Point]:
        flat = self.probe.worst.cpu().double().flatten(0, 2)
        mass = self._masses().mean(0)
        for i, density in enumerate(self.recipe.ladder):
            median, high = flat[:, i].median().item(), flat[:, i].quantile(0.9).item()
            yield Point(density, *(float(f"{x:.3g}") for x in (median, high, mass[i].item())))

    def _masses(self) -> Tensor:
        counts = torch.tensor(self.probe.count, dtype=torch.float64)
        return self.probe.mass.cpu().double() / counts[:, None].clamp(min=1)

    def _mass(self) -> tuple[float, ...]:
        nearest = min(range(len(self.recipe.ladder)), key=lambda i: abs(self.recipe.ladder[i] - MASS_AT))
        return tuple(round(mass, 4) for mass in self._masses()[:, nearest].tolist())


@contextmanager
def _sparse(network: Any, settings: Sparse) -> Iterator[None]:
    network.sparse = settings
    try:
        yield
    finally:
        network.sparse = None


def token_order(grid: tuple[int, int, int], device: torch.device) -> Tensor:
    """The order of the tokens of noise frames (frames, rows, columns) in sparse attention, [N] int64."""
    order, _ = sparse_order(grid, 0, device)
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


def text(found: Calibration) -> str:
    """What was found, in a few lines."""
    dense = sum(all(density == 1 for density in row) for layers in found.densities for row in layers)
    means = [statistics.fmean(itertools.chain(*layers)) for layers in found.densities]
    ranges = zip(means, itertools.pairwise((found.settings.dense_steps, *found.ends)), strict=True)
    steps = ", ".join(f"{mean:.3f} from {start:.0%} to {end:.0%} of the steps" for mean, (start, end) in ranges)
    lines = [
        f"mean density {found.density:.3f}: {steps}; {dense} of {len(means) * found.model.depth} layers stay dense",
        f"expected: all steps {found.expected_speed_up:.2f} times as fast",
    ]
    if (video := found.video) is not None:
        floor = f"noise floor: {video.floor}"
        if video.floor != NO_FLOOR:
            floor = f"noise floor: {_decibels(video.floor_psnr)} ({video.floor})"
        lines.append(
            f"a whole video against the exact one: {_decibels(video.psnr)}, {floor}; {video.speed_up:.2f} times as "
            f"fast, steps of {video.sparse_s:.3g} s instead of {video.dense_s:.3g} s"
        )
    return "\n".join(lines)


def _decibels(value: float | None) -> str:
    return decibels(math.inf if value is None else value)
