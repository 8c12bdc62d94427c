"""How many GPUs pay off for a task: calculated from what one computes and what they exchange in a second."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from ..model.config import ModelConfig
from ..optimize.plan import Work
from .bandwidth import Bandwidth, synchronize
from .division import Division
from .group import Group
from .start import start

# A pass beside one large product, in FLOP per second: attention, norms and copies are slower. At 480p an H200 reaches
# 645 TFLOP/s (1.95 PFLOP in 3.03 s, bf16, 2026-11-29).
EFFICIENCY = 0.9
# Sides of the product that is timed.
GPU_SIDE, CPU_SIDE, RUNS = 8192, 512, 3
# Fewer GPUs are preferred if they take at most this much longer, which the calculation cannot tell from equal.
MARGIN = 1.03


def pass_seconds(
    count: int, samples: int, inside: float, exchange: Callable[[int], float], outside: float = 0.0
) -> float:
    """Of a pass on `count` GPUs, as `Division` divides it; the exchange is hidden behind nothing.

    samples: those that do not belong together, such as the halves of guidance. inside, outside: seconds that a sample
    takes on one GPU in blocks, which divide, and outside of blocks. exchange: seconds in which each of n GPUs could
    send all queries, keys, values and results of a sample. It sends (n - 1) / n^2 of that.
    """
    parts = math.gcd(count, samples)
    tokens = count // parts
    each = inside / tokens + outside
    if tokens > 1:
        each += exchange(tokens) * (tokens - 1) / tokens**2
    return samples // parts * each


def flops(config: ModelConfig, work: Work) -> float:
    """Of one sample of a work in all blocks, two for each product of numbers."""
    rows, keys = _tokens(config, work)
    dim = config.hidden_size
    # Queries, keys, values and results of self-attention, queries and results of attention to text, and the FFN.
    weights = dim * (6 * dim + 3 * config.ffn_hidden)
    return config.depth * (2.0 * rows * weights + 4.0 * rows * keys * dim * work.density)


def exchanged_bytes(config: ModelConfig, work: Work, itemsize: int) -> int:
    """Of the queries, keys, values and results of one sample in all blocks."""
    return 4 * config.depth * _tokens(config, work)[0] * config.hidden_size * itemsize


def _tokens(config: ModelConfig, work: Work) -> tuple[int, int]:
    """Tokens that a pass evaluates, and those that they attend to."""
    _, _, frames, height, width = work.latents
    frame = math.ceil(height / config.patch_size[1]) * math.ceil(width / config.patch_size[2])
    return (frames - work.cond_latents) * frame, frames * frame


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of one large product on a device, measured in milliseconds."""
    side = GPU_SIDE if device.type == "cuda" else CPU_SIDE
    x = torch.zeros(side, side, dtype=dtype, device=device)
    found = []
    for _ in range(1 + RUNS):
        synchronize(device)
        begin = time.perf_counter()
        torch.mm(x, x)
        synchronize(device)
        found.append(time.perf_counter() - begin)
    return 2 * side**3 / min(found[1:])


class Measure(NamedTuple):
    """Measure how fast the ranks exchange data."""


def measured_links(group: Group) -> Mapping[int, Bandwidth]:
    """`Division.links` of a group, which rank 0 alone calls here."""
    with group.working():
        group.send(Measure())
        return Division.of(group).links()


@dataclass(frozen=True)
class Layout:
    """How GPUs share a task.

    there: how many there are. count: how many share it. best: how many are the fastest by calculation. parts: into how
    many groups they divide, each of which takes other samples. halves: whether these are the halves of guidance.
    speed: bytes that a rank sends in a second to those that share its tokens, or would.
    """

    there: int
    count: int
    best: int
    parts: int
    halves: bool
    speed: float

    def describe(self, noun: str) -> str:
        """The layout as a sentence. noun: what ranks are, in the plural."""
        sample, tokens = "half of guidance" if self.halves else "sample", self.count // self.parts
        who = f"{self.count} {noun}" if self.count == self.there else f"{self.count} of {self.there} {noun}"
        speed = f"{self.speed / 1e9:.3g} GB/s"
        if self.count == 1:
            said = f"{who} does the work"
        elif self.parts == 1:
            said = f"{who} share the tokens of each video and exchange {speed}"
        elif tokens == 1:
            said = f"{who} share each step, one {sample} each"
        else:
            said = f"{who} share each step: {tokens} take the tokens of each {sample} and exchange {speed}"
        if self.count < self.there:
            return f"{said}; more would be slower, because they exchange {speed}"
        return f"{said}; {self.best} would be faster" if self.best < self.count else said


def choose_layout(
    config: ModelConfig,
    work: Work,
    itemsize: int,
    *,
    rate: float,
    speeds: Mapping[int, float],
    counts: Collection[int],
    split: bool = False,
) -> Layout:
    """The layout that takes the least time for a work, on as few GPUs as take hardly longer.

    itemsize: bytes of an activation. rate: FLOP per second of a large product on one GPU. speeds: bytes per second that
    a rank sends to those that share its tokens, by their number; the largest is how many GPUs there are. counts: how
    many GPUs may share the work. split: samples of guidance run one after the other.
    """
    there = max(speeds)
    inside = flops(config, work) / (rate * EFFICIENCY)
    sent = exchanged_bytes(config, work, itemsize)
    samples = work.samples(config.audio is not None, split)

    def speed(tokens: int) -> float:
        # Of a number that was not measured, that of more.
        return speeds[min(size for size in speeds if size >= tokens)]

    seconds = {n: pass_seconds(n, samples, inside, lambda tokens: sent / speed(tokens)) for n in range(1, there + 1)}

    def fastest(among: Collection[int]) -> int:
        least = min(seconds[n] for n in among)
        return min(n for n in among if seconds[n] <= MARGIN * least)

    count = fastest(counts)
    parts = math.gcd(count, samples)
    shared = count // parts
    halves = parts == 2 and work.guided and work.latents[0] == 1
    return Layout(there, count, fastest(seconds), parts, halves, speed(shared if shared > 1 else there))


def layout_of(
    group: Group, config: ModelConfig, work: Work, dtype: torch.dtype, split: bool, counts: Collection[int]
) -> Layout:
    """`choose_layout` for a group, with speeds that this measures; rank 0 calls it."""
    return layout_on(group.device, measured_links(group), config, work, dtype, split, counts)


def layout_on(
    device: torch.device,
    links: Mapping[int, Bandwidth],
    config: ModelConfig,
    work: Work,
    dtype: torch.dtype,
    split: bool,
    counts: Collection[int],
) -> Layout:
    """`choose_layout` for GPUs like `device` with these `measured_links`; measures a product."""
    rate, speeds = product_rate(device, dtype), {size: link.exchange for size, link in links.items()}
    layout = choose_layout(config, work, dtype.itemsize, rate=rate, speeds=speeds, counts=counts, split=split)
    # Processes that share a CPU are for trying things out.
    return replace(layout, best=layout.count) if device.type == "cpu" else layout


def shrunk(group: Group, count: int) -> Group | None:
    """A group of the first `count` devices in place of this one, if they are fewer; None for one."""
    if count == group.size:
        return group
    group.end()
    return None if count == 1 else start(group.devices[:count])
