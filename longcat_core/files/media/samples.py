"""Sound as numbers, at any rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import LongCatError, check_type, is_number, is_whole
from .opening import package

RATES = 1000, 1_000_000
# FFmpeg's resampler with so long a filter that it equals that of SoX at high quality to 2e-5 below 7 kHz.
_RESAMPLER = "filter_size=128:cutoff=0.95:kaiser_beta=12:exact_rational=1"
_BLOCK = 1 << 16


@dataclass(frozen=True)
class Sound:
    """samples: [channels, N] fp32, usually in -1..1; rate: samples per second.

    Other dtypes and devices are converted. Raises LongCatError for sound without samples, and for samples that are not
    finite.
    """

    samples: Tensor
    rate: int

    def __post_init__(self) -> None:
        check_type("the samples of a sound", self.samples, Tensor, "a tensor [channels, N]")
        check_rate(self.rate)
        if self.samples.ndim != 2 or not self.samples.is_floating_point():
            form = f"{self.samples.dtype} {list(self.samples.shape)}".removeprefix("torch.")
            raise LongCatError(f"the samples of a sound are {form}; give floats [channels, N]")
        if not self.samples.numel():
            raise LongCatError("the sound has no samples; give one that is not empty")
        object.__setattr__(self, "samples", self.samples.detach().to("cpu", torch.float32))
        object.__setattr__(self, "rate", int(self.rate))
        if not self.samples.isfinite().all():
            raise LongCatError("the sound has samples that are not finite; write it again")

    @property
    def seconds(self) -> float:
        return self.samples.shape[1] / self.rate

    def resampled(self, rate: int) -> Sound:
        """The same sound with `rate` samples per second."""
        check_rate(rate)
        return self if rate == self.rate else Sound(resampled(self.samples, self.rate, rate).float(), rate)

    def cut(self, seconds: float) -> Sound:
        """The first `seconds` of it, with silence behind it where it is shorter."""
        if not is_number(seconds) or not 0 < seconds < math.inf:
            raise LongCatError(f"a sound cannot last {seconds!r} s; give a number above 0")
        count = max(1, round(seconds * self.rate))
        return Sound(F.pad(self.samples, (0, max(0, count - self.samples.shape[1])))[:, :count], self.rate)


def check_rate(rate: Any) -> None:
    """Raise LongCatError unless a sound can have `rate` samples per second."""
    if not is_whole(rate) or not RATES[0] <= rate <= RATES[1]:
        raise LongCatError(f"a sound cannot have {rate!r} samples per second; give its own rate, as 48000")


def resampled(samples: Tensor, rate: int, to: int) -> Tensor:
    """Samples [C, N] at `rate` per second -> [C, ceil(N * to / rate)] fp64 at `to` per second."""
    if rate == to:
        return samples.double()
    count = math.ceil(samples.shape[1] * to / rate)
    # A second of silence on both sides: FFmpeg mirrors what is beyond the ends.
    around = F.pad(samples.double(), (rate, rate))
    return torch.stack([_resampled(channel, rate, to)[to : to + count] for channel in around])


def _resampled(channel: Tensor, rate: int, to: int) -> Tensor:
    av = package("av")
    graph = package("av.filter").Graph()
    source = graph.add_abuffer(format="dblp", sample_rate=rate, layout="mono", time_base=Fraction(1, rate))
    chain = (
        source,
        graph.add("aresample", f"{to}:{_RESAMPLER}"),
        graph.add("aformat", "sample_fmts=dblp"),
        graph.add("abuffersink"),
    )
    for before, after in pairwise(chain):
        before.link_to(after)
    graph.configure()
    done: list[Tensor] = []
    for start in (*range(0, len(channel), _BLOCK), None):
        frame = None
        if start is not None:
            block = channel[None, start : start + _BLOCK].contiguous().numpy()
            frame = av.AudioFrame.from_ndarray(block, format="dblp", layout="mono")
            frame.sample_rate, frame.pts = rate, start
        graph.push(frame)
        while True:
            try:
                done.append(torch.from_numpy(graph.pull().to_ndarray()[0]))
            except (av.error.BlockingIOError, av.error.EOFError):
                break
    return torch.cat(done)
