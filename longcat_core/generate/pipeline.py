"""The whole chain: prompt, image or clip in, frames out."""

from __future__ import annotations

import math
import traceback
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ..checkpoints.adapted import RuntimeLoras
from ..checkpoints.load import load_transformer
from ..checkpoints.lora import Lora
from ..checkpoints.merged import MergedLoras
from ..errors import CheckpointError, LongCatError
from ..files.media import resize_and_crop
from ..model.config import ModelConfig
from ..model.kv_cache import KVMode
from ..optimize.block_sparse import BlockSparse
from ..optimize.kernels import elementwise
from ..optimize.plan import GIB, Plan, Weights, Work, apply_plan, choose_plan, free_bytes, needed_bytes, smaller
from ..optimize.quantization import Policy
from ..optimize.streaming import spread
from ..optimize.switches import Optimizations
from ..sampling.conditioning import (
    SPATIAL_FACTOR,
    TEMPORAL_FACTOR,
    last_frames,
    latent_frames,
    latent_shape,
    seeded_noise,
    to_pixels,
)
from ..sampling.sampler import Callback, sample
from ..sampling.schedules import Schedule, make_schedule
from .inputs import check_callback, check_tensor, check_type, device_of, dtype_of, loras_of
from .opened import OpenedModel, open_model
from .paths import NANO_MODEL as NANO_MODEL
from .paths import NANO_TEXT_ENCODER as NANO_TEXT_ENCODER
from .paths import NANO_VAE as NANO_VAE
from .paths import NANO_WEIGHTS as NANO_WEIGHTS
from .paths import ModelPaths
from .request import RELEASED, Defaults, GenerateRequest
from .text import TextEncoder, load_text_encoder
from .turns import Turns
from .vae import VideoVAE, load_vae

if TYPE_CHECKING:
    from ..optimize.execution import OptimizedTransformer

# Summed into the weights, which then cost nothing; or beside them, where strengths change at once.
LoraMode = Literal["merged", "runtime"]


@dataclass(frozen=True)
class Generation:
    """frames: uint8 [F, H, W, 3]. latents: normalized, [1, 16, T, H/8, W/8] fp32 on the CPU. request: filled in."""

    frames: np.ndarray
    latents: Tensor
    request: GenerateRequest

    @property
    def seed(self) -> int:
        return self.request.seed

    @property
    def fps(self) -> float:
        return self.request.fps


class Engine(ABC):
    """What every task is made of: a VAE both ways, and denoising. Here by own models (`Pipeline`), in ComfyUI by its.

    Latents are the engine's own: its VAE's, of whatever scale, and nobody else looks at their values.

    The noise is drawn on the CPU in fp32, so a seed means the same noise on every device; on one machine it gives the
    same video bit for bit.
    """

    defaults: Defaults
    channels = 16

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """Video [1, 3, F, H, W] in -1..1 -> latents [1, C, T, H/8, W/8]."""

    @abstractmethod
    def decode(self, latents: Tensor) -> np.ndarray:
        """Latents [1, C, T, h, w] -> uint8 frames [F, 8h, 8w, 3]."""

    @abstractmethod
    def denoise(
        self,
        noise: Tensor,
        schedule: Schedule,
        prompt: str,
        *,
        clean: Tensor | None = None,
        negative_prompt: str = "",
        guidance_scale: float = 1.0,
        cond_latents: Tensor | None = None,
        kv_cache: KVMode = "exact",
        step_cache: float = 0.0,
        block_sparse: BlockSparse | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Standard normal noise [1, C, T, h, w] -> clean latents of the same shape; see `sample`.

        clean: latents of the same shape that the noise is mixed with as the schedule's first timestep says; None: none.
        cond_latents: as `sample` takes them.
        """

    def generate(
        self, request: GenerateRequest, callback: Callback | None = None, handed: Tensor | None = None
    ) -> Generation:
        """Run one request; `callback` is called after each step and may raise to stop.

        handed: latents [1, C, n, H/8, W/8] for the given frames but the first, n more latent frames, used instead of
        encoding those. Warns (UserWarning) where the text is longer than the model reads. Raises LongCatError for bad
        requests.
        """
        check_type("the request", request, GenerateRequest, "a GenerateRequest")
        check_callback(callback)
        request = request.filled(self.defaults)
        if handed is not None:
            self._check_handed(request, handed)
        with self.turn():
            return self._generate(request, callback, handed)

    def turn(self) -> AbstractContextManager[None]:
        """What is held while a request runs, so that no other thread runs one."""
        return nullcontext()

    def _check_handed(self, request: GenerateRequest, handed: Tensor) -> None:
        """Raise LongCatError unless `handed` holds the latents of a filled request's given frames but the first."""
        if request.cond_frames < 2:
            raise LongCatError("latents are handed in without a clip that they belong to; give its frames too")
        _, _, height, width = latent_shape(request.frames, request.height, request.width, self.channels)
        count = latent_frames(request.cond_frames) - 1
        check_tensor("the handed latents", handed, (1, self.channels, count, height, width))

    def _generate(self, request: GenerateRequest, callback: Callback | None, handed: Tensor | None) -> Generation:
        shape = latent_shape(request.frames, request.height, request.width, self.channels)
        latents = self.denoise(
            seeded_noise((1, *shape), request.seed),
            make_schedule(request.schedule, request.steps),
            request.prompt,
            negative_prompt=request.negative_prompt,
            guidance_scale=request.guidance_scale,
            cond_latents=self._cond_latents(request, handed),
            kv_cache=request.kv_cache,
            step_cache=request.step_cache,
            callback=callback,
        )
        check_finite(latents)
        return Generation(self.decode(latents), latents.cpu(), request)

    def _cond_latents(self, request: GenerateRequest, handed: Tensor | None) -> Tensor | None:
        if request.given is None:
            return None
        frames = last_frames(request.given, request.cond_frames)
        if handed is not None:
            frames = frames[:1]
        frames = resize_and_crop(frames, request.height, request.width)
        latents = self.encode(to_pixels(torch.from_numpy(frames.copy())))
        return latents if handed is None else torch.cat((latents, handed.to(latents)), dim=2)


def _empty_cache() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _plan(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    fp8: Policy | None,
    optimizations: Optimizations,
    work: Work | None,
    least: Plan | None,
    text_encoder: int,
    others: int = 0,
    memory: int | None = None,
) -> tuple[Plan, str]:
    """The plan for `work`, and what to tell of it. The VAE must lie on the device already."""
    least = replace(
        least or Plan(), split_guidance=optimizations.split_guidance or bool(least and least.split_guidance)
    )
    if work is not None and device.type == "cpu":
        _check_host(config, dtype, fp8, replace(least, streamed=0), work, text_encoder + others)
    if work is None or device.type != "cuda":
        return least, least.describe(config.depth)
    own = optimizations.fused_kernels and optimizations.explicit_fp32 and elementwise.takes(dtype)
    weights, free = Weights.of(config, dtype, fp8), free_bytes(device, memory)
    plan, needed = choose_plan(
        config,
        weights,
        work,
        dtype.itemsize,
        free=free,
        own=own,
        others=others,
        text_encoder=text_encoder,
        least=least,
    )
    told = plan.describe(config.depth)
    if needed > free:
        warnings.warn(
            f"this needs about {needed / GIB:.1f} GiB of GPU memory and {free / GIB:.1f} are free; it may run out",
            stacklevel=3,
        )
    return plan, f"{free / GIB:.1f} GiB of GPU memory are free: {told}" if told else ""


def _check_host(
    config: ModelConfig, dtype: torch.dtype, fp8: Policy | None, plan: Plan, work: Work, others: int
) -> None:
    """Raise LongCatError where a sampling on the CPU takes more than all the machine's memory: it would be killed."""
    import psutil

    weights = Weights.of(config, dtype, fp8)
    sampling = needed_bytes(plan, config, weights, work, dtype.itemsize, own=False, others=others)
    batch, _, frames, height, width = work.latents
    shape = 1 + TEMPORAL_FACTOR * (frames - 1), SPATIAL_FACTOR * height, SPATIAL_FACTOR * width
    # Three colors of the decoded video in fp32, of which three copies live at once while it is brought to 0..1.
    decoding = weights.rest + weights.block * config.depth + others + batch * math.prod(shape) * 3 * 4 * 3
    needed, there = max(sampling, decoding), psutil.virtual_memory().total + psutil.swap_memory().total
    if needed > there:
        raise LongCatError(
            f"{shape[0]} frames of {shape[1]}x{shape[2]} (height x width) with this model take about "
            f"{needed / GIB:,.0f} GiB of memory and this machine has {there / GIB:,.0f} GiB; ask for a smaller or "
            "shorter video, or run it on a GPU"
        )


def check_finite(latents: Tensor) -> None:
    """Raise LongCatError for latents with NaN or infinity in them."""
    if not latents.isfinite().all():
        raise LongCatError(
            "the result is not finite: the checkpoint overflows in this precision; load it as bf16 or fp32 (--dtype)"
        )


@dataclass
class Pipeline(Engine):
    """A loaded model with its VAE and text encoder."""

    model: OptimizedTransformer
    vae: VideoVAE
    text_encoder: TextEncoder
    defaults: Defaults = RELEASED
    # Exchanges the transformer's LoRAs; None where it did not come from a checkpoint.
    loras: MergedLoras | RuntimeLoras | None = None
    # Where what lies, and that in words for a user, if it is not as usual.
    plan: Plan = field(default_factory=Plan)
    told: str = ""
    _turns: Turns = field(default_factory=Turns, init=False, repr=False, compare=False)

    @classmethod
    def load(
        cls,
        paths: ModelPaths | OpenedModel | None = None,
        *,
        dtype: str | torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        optimizations: Optimizations | None = None,
        fp8: bool = False,
        lora: str | Path | Sequence[Lora] | None = None,
        lora_mode: LoraMode = "merged",
        work: Work | None = None,
        least: Plan | None = None,
        memory: int | None = None,
    ) -> Pipeline:
        """Load all three parts. paths: of the model, or what `open_model` opened, LoRAs included; None: the nano model.
        fp8: quantize the transformer's large layers to 8 bits (lossy). lora: a LoRA file, or files with strengths,
        merged before that, or applied at run time, as lora_mode says.

        work: the largest sampling to come, for which the fastest plan that fits a GPU's free memory is made; None: all
        parts lie on the device. least: what is asked of the plan in any case; memory: bytes that it may need at most.

        A pipeline may be used from several threads: each call waits for those of other threads.

        Raises LongCatError for files that do not fit the network or each other, and for arguments of other types.
        """
        dtype, device = dtype_of(dtype), device_of(device)
        optimizations = Optimizations() if optimizations is None else optimizations
        check_type("optimizations", optimizations, Optimizations, "an Optimizations")
        if lora_mode not in get_args(LoraMode):
            raise LongCatError(f"unknown LoRA mode {lora_mode!r}; choose one of {', '.join(get_args(LoraMode))}")
        if isinstance(paths, OpenedModel):
            if lora is not None:
                raise LongCatError("an opened model has its LoRAs already; give them to open_model instead")
            opened = paths
        else:
            opened = open_model(paths, lora, optimizations.attention)
        paths, loras = opened.paths, opened.loras
        # Headers first, as they reveal another model's file at once; the transformer's weights, the largest, last.
        checkpoint = opened.checkpoint
        config = checkpoint.config
        if least is not None and least.streamed > config.depth:
            raise LongCatError(
                f"{least.streamed} blocks are to wait in CPU memory, the model has {config.depth}; give fewer"
            )
        vae = load_vae(paths.vae, dtype=dtype, device=device)
        text_encoder = load_text_encoder(paths.text_encoder, dtype=dtype)
        if text_encoder.channels != config.caption_channels:
            raise CheckpointError(
                f"text encoder {paths.text_encoder} gives {text_encoder.channels} channels but the model takes "
                f"{config.caption_channels}; give the text encoder that belongs to it"
            )
        policy = Policy() if fp8 else None
        runtime = lora_mode == "runtime"
        # Beside the weights LoRAs lie on the device, whatever waits.
        others = sum(lora.path.stat().st_size for lora in loras) if runtime else 0
        sizes = text_encoder.nbytes, others, memory
        plan, told = _plan(config, dtype, device, policy, optimizations, work, least, *sizes)
        model = load_transformer(
            checkpoint,
            dtype=dtype,
            device=device,
            optimizations=replace(optimizations, split_guidance=plan.split_guidance),
            fp8=policy,
            lora=() if runtime else loras,
            streamed=spread(config.depth, plan.streamed),
        )
        if plan.stream_text_encoder:
            text_encoder.stream(device)
        else:
            text_encoder.to(device)
        exchange = RuntimeLoras(model, loras) if runtime else MergedLoras(model, checkpoint, loras)
        return cls(model, vae, text_encoder, paths.defaults, exchange, plan, told)

    @property
    def channels(self) -> int:
        return self.model.config.in_channels

    def turn(self) -> AbstractContextManager[None]:
        return self._turns.take()

    def set_loras(self, lora: str | Path | Sequence[Lora] | None = None) -> None:
        """Exchange the LoRAs for these, as `load` takes them; None: take all out. Only where `load` made the pipeline.

        Raises LongCatError for files that are not LoRAs of this network; the network is then what it was.
        """
        loras = loras_of(lora)
        if self.loras is None:
            raise LongCatError("this pipeline was not made by Pipeline.load, so its LoRAs cannot be exchanged")
        with self.turn():
            self.loras.set(loras)

    def encode(self, pixels: Tensor) -> Tensor:
        check_tensor("the video", pixels, (None, 3, None, None, None))
        with self.turn():
            return self._tiled_if_need_be(self.vae.encode, pixels)

    def decode(self, latents: Tensor) -> np.ndarray:
        check_tensor("the latents", latents, (None, self.channels, None, None, None))
        with self.turn():
            frames = self._tiled_if_need_be(self.vae.decode, latents)
        return frames[0].mul(255).round().to("cpu", torch.uint8).numpy()

    def _tiled_if_need_be(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        try:
            return run(x)
        except torch.OutOfMemoryError as error:
            if self.vae.tiling:
                raise
            # Its frames hold the tensors that are in the way.
            traceback.clear_frames(error.__traceback__)
        _empty_cache()
        warnings.warn("the whole video does not fit the VAE's memory; it works on tiles from here on", stacklevel=3)
        self.vae.tiling = True
        return run(x)

    def _make_room(self, guided: bool) -> bool:
        """The next smaller plan, where a forward ran out of memory; False: there is none."""
        before = replace(self.plan, split_guidance=self.model.optimizations.split_guidance)
        plan = smaller(before, self.model.config.depth, guided)
        if plan is None:
            return False
        apply_plan(self.model, plan)
        self.plan = plan
        _empty_cache()
        warnings.warn(f"out of memory; going on with less: {plan.describe(self.model.config.depth)}", stacklevel=3)
        return True

    def denoise(
        self,
        noise: Tensor,
        schedule: Schedule,
        prompt: str,
        *,
        clean: Tensor | None = None,
        negative_prompt: str = "",
        guidance_scale: float = 1.0,
        cond_latents: Tensor | None = None,
        kv_cache: KVMode = "exact",
        step_cache: float = 0.0,
        block_sparse: BlockSparse | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        check_callback(callback)
        check_tensor("the noise", noise, (None, self.channels, None, None, None))
        if clean is not None:
            check_tensor("the clean latents", clean, tuple(noise.shape))
        if cond_latents is not None:
            check_tensor("the conditioning latents", cond_latents, (None, self.channels, None, None, None))
        with self.turn():
            start = noise
            if clean is not None:
                share = schedule.timesteps[0] / 1000
                start = (1 - share) * clean + share * noise.to(clean)
            context, mask = self._text("prompt", prompt)
            negative = (None, None)
            if guidance_scale != 1:
                negative = self._text("negative prompt", negative_prompt)
            before, self.model.block_sparse = self.model.block_sparse, block_sparse
            try:
                return sample(
                    self.model,
                    start,
                    schedule,
                    context,
                    mask,
                    negative_context=negative[0],
                    negative_mask=negative[1],
                    guidance_scale=guidance_scale,
                    cond_latents=cond_latents,
                    kv_cache=kv_cache,
                    step_cache=step_cache,
                    offload_kv_cache=self.plan.offload_kv_cache,
                    make_room=lambda: self._make_room(guidance_scale != 1),
                    callback=self._turns.guard(callback),
                )
            finally:
                self.model.block_sparse = before
                if self.model.stream is not None:
                    # The VAE is next.
                    self.model.stream.rest()

    def _text(self, name: str, prompt: str) -> tuple[Tensor, Tensor]:
        context, mask = self.text_encoder.encode([prompt])
        if bool(mask.all()):
            warnings.warn(f"the {name} fills all {mask.shape[1]} tokens; what is beyond is not read", stacklevel=4)
        return context, mask
