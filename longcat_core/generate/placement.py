"""Where a model's parts go: the plan for a GPU's free memory, and the refusal of what a CPU cannot hold."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace

import torch

from ..errors import LongCatError
from ..model.config import ModelConfig
from ..optimize.kernels import elementwise
from ..optimize.plan import GIB, WASTE, WORKSPACE, Plan, Weights, Work, choose_plan, free_bytes, needed_bytes
from ..optimize.quantization import Policy
from ..optimize.switches import Optimizations
from ..sampling.conditioning import SPATIAL_FACTOR, video_frames
from ..vae import parts


@dataclass(frozen=True)
class Placement:
    """What is to be placed, and what it must leave room for.

    text_encoder, others: bytes of the text encoder, and of everything else beside the network's weights. work: the
    largest sampling to come; None: unknown. memory: bytes that may be used at most; None: all that are free. ranks: how
    many GPUs like `device` share the work. sharding: whether they get weights from each other at least as fast as from
    CPU memory.
    """

    config: ModelConfig
    dtype: torch.dtype
    device: torch.device
    fp8: Policy | None
    optimizations: Optimizations
    work: Work | None
    text_encoder: int
    others: int = 0
    memory: int | None = None
    ranks: int = 1
    sharding: bool = False

    def plan(self, least: Plan | None, text_goes: bool = False) -> tuple[Plan, str]:
        """The fastest plan that fits and has everything that `least` asks for, and a sentence about it, or "".

        text_goes: the text encoder will have gone when sampling begins, so the sentence leaves it out.
        The VAE must be on the device already. Raises LongCatError if the work needs more than a CPU's memory.
        """
        depth, least = self.config.depth, least or Plan()
        least = replace(least, split_guidance=self.optimizations.split_guidance or least.split_guidance)
        if self.work is not None and self.device.type == "cpu":
            self._check_host(replace(least, streamed=0), self.work)
        if self.work is None or self.device.type != "cuda":
            return least, least.describe(depth)
        free = free_bytes(self.device, self.memory)
        *_, height, width = self.work.latents
        sides = SPATIAL_FACTOR * height, SPATIAL_FACTOR * width
        # Where no plan leaves room for whole pictures, the VAE works on tiles, which take less than sampling.
        for decoding in (parts.needed_bytes(*sides, self.dtype, self.device), 0):
            plan, needed = choose_plan(
                self.config,
                Weights.of(self.config, self.dtype, self.fp8),
                self.work,
                self.dtype.itemsize,
                free=free,
                own=self._own,
                others=self.others,
                text_encoder=self.text_encoder,
                least=least,
                ranks=self.ranks,
                sharding=self.sharding,
                decoding=decoding,
            )
            if needed <= free:
                break
        if needed > free:
            warnings.warn(
                f"this needs about {needed / GIB:.1f} GiB of GPU memory and {free / GIB:.1f} are free; it may run out",
                stacklevel=3,
            )
        words = (replace(plan, stream_text_encoder=False) if text_goes else plan).describe(depth)
        return plan, f"{free / GIB:.1f} GiB of GPU memory are free: {words}" if words else ""

    def spare(self, plan: Plan) -> int:
        """Bytes of a GPU that the work leaves free under a plan, the text encoder beside it; 0 without a work."""
        if self.work is None or self.device.type != "cuda":
            return 0
        weights = Weights.of(self.config, self.dtype, self.fp8)
        own, others = self._own, self.others + (0 if plan.stream_text_encoder else self.text_encoder)
        needed = needed_bytes(plan, self.config, weights, self.work, self.dtype.itemsize, own, others, self.ranks)
        return free_bytes(self.device, self.memory) - needed

    def counts(self, plan: Plan) -> list[int]:
        """How many of the GPUs may share the work: all, or fewer that each have room for it under a plan."""
        fewer = () if plan.sharded else range(1, self.ranks)
        return [*(n for n in fewer if replace(self, ranks=n).spare(plan) >= 0), self.ranks]

    def has_room_before(self, size: int) -> bool:
        """Whether a GPU has room for `size` bytes of weights that go before the network is loaded."""
        # Beside libraries, as much again for pieces on their way and for the work: running out would end the load.
        return size + 2 * WORKSPACE <= (1 - WASTE) * free_bytes(self.device, self.memory)

    @property
    def _own(self) -> bool:
        """Whether our kernels do the element-wise work."""
        switches = self.optimizations
        return switches.fused_kernels and switches.explicit_fp32 and elementwise.takes(self.dtype)

    def _check_host(self, plan: Plan, work: Work) -> None:
        """Raise LongCatError if sampling or decoding takes more than the machine's memory: it would be killed."""
        import psutil

        config, others = self.config, self.text_encoder + self.others
        weights = Weights.of(config, self.dtype, self.fp8)
        sampling = needed_bytes(plan, config, weights, work, self.dtype.itemsize, own=False, others=others)
        batch, _, frames, height, width = work.latents
        shape = video_frames(frames), SPATIAL_FACTOR * height, SPATIAL_FACTOR * width
        # The decoded video has three fp32 channels; three copies of it exist at once while it is scaled to 0..1.
        decoding = weights.rest + weights.block * config.depth + others + batch * math.prod(shape) * 3 * 4 * 3
        needed, total = max(sampling, decoding), psutil.virtual_memory().total + psutil.swap_memory().total
        if needed > total:
            raise LongCatError(
                f"{shape[0]} frames of {shape[1]}x{shape[2]} (height x width) with this model take about "
                f"{needed / GIB:,.0f} GiB of memory and this machine has {total / GIB:,.0f} GiB; ask for a smaller or "
                "shorter video, or run it on a GPU"
            )
