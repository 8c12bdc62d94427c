"""LongCat Benchmark: time two settings of the model on the user's own machine, in ComfyUI's own sampling."""

from __future__ import annotations

from datetime import date
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.utils
import numpy as np
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..longcat_core.errors import LongCatError
from ..longcat_core.measure import speed
from ..longcat_core.measure.clock import peak_gib
from ..longcat_core.measure.fidelity import relative_error, tensor_psnr
from ..longcat_core.measure.results import machine, shown
from ..longcat_core.measure.speed import SEED, TEXT_TOKENS, TimedSetting, kernel_name, plain
from ..longcat_core.optimize.switches import Optimizations
from ..longcat_core.sampling.conditioning import video_frames
from ..longcat_core.sampling.schedules import make_schedule
from .comfy_attention import chosen
from .comfy_model import OPTIMIZATIONS_KEY, execution_of
from .inputs import schema
from .sampling import Clock, make_guider, require_longcat, starting_latents, switches_of

NODE = "LongCat Benchmark"
# Length of the schedule, of which only the first steps run.
SCHEDULE_STEPS = 50


def without_optimizations(model: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
    """A clone of the MODEL with every switch off."""
    dtype = model.model.manual_cast_dtype or model.model.get_dtype()
    model = model.clone()
    options = model.model_options.setdefault("transformer_options", {})
    options[OPTIMIZATIONS_KEY] = Optimizations(**plain(model.load_device, dtype) | {"fp8": False})
    return model


def _random_text(model: comfy.model_patcher.ModelPatcher, tokens: int) -> list:
    """A random conditioning [1, tokens, caption]: the meaning of the text does not affect speed."""
    generator = torch.Generator().manual_seed(SEED + tokens)
    width = model.model.diffusion_model.config.caption_channels
    return [[torch.randn(1, tokens, width, generator=generator), {}]]


class Benchmark(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema("LongCatBenchmark")

    @classmethod
    def execute(cls, model, latent_image, steps, guidance, model_b=None, positive=None, negative=None) -> io.NodeOutput:
        named = {"A": model, "B": without_optimizations(model) if model_b is None else model_b}
        for patcher in named.values():
            require_longcat(patcher, NODE)
        if model_b is not None and model_b.model.diffusion_model.config != model.model.diffusion_model.config:
            raise LongCatError(f"{NODE} got two models of different sizes as A and B; connect one model twice")
        sides, estimates = [], []
        for name, patcher in named.items():
            side, x0 = _run(name, patcher, latent_image, steps, guidance, positive, negative)
            sides.append(side)
            estimates.append(x0)
        heading = _heading(model.load_device, latent_image["samples"].shape, guidance)
        closing = _closing(estimates, model_b is None)
        picture = speed.draw(sides, heading, closing)
        image = torch.from_numpy(np.asarray(picture).copy())[None].float() / 255
        return io.NodeOutput(image, speed.text(sides, heading, closing), ui=ui.PreviewImage(image, cls=cls))


def _run(
    name: str, model: Any, latent_image: dict, steps: int, guidance: float, positive: Any, negative: Any
) -> tuple[TimedSetting, Tensor]:
    """Time the first 1 + `steps` steps of a sampling; also returns the last estimate of the clean latents."""
    text = [_random_text(model, tokens) for tokens in reversed(TEXT_TOKENS)]
    guider = make_guider(model, positive or text[0], negative or text[1], guidance, "exact", NODE)
    samples = starting_latents(model, latent_image)
    noise = comfy.sample.prepare_noise(samples, SEED)
    device, clock = model.load_device, Clock(model.load_device)
    bar = comfy.utils.ProgressBar(1 + steps)
    guider.sample(
        noise,
        samples,
        comfy.samplers.KSAMPLER(clock.sampler),
        make_schedule("base", SCHEDULE_STEPS).sigmas[: 2 + steps],
        denoise_mask=latent_image.get("noise_mask"),
        callback=lambda step, x0, x, total: bar.update_absolute(step + 1, total),
        disable_pbar=True,
        seed=SEED,
    )
    peak = peak_gib(device)
    switches = switches_of(model)
    kernel = chosen(switches, model.model_options.get("transformer_options", {}))
    kernel = kernel or kernel_name(execution_of(model).choose_kernels(device).attend)
    first, *later = clock.seconds
    times = tuple(1000 * seconds for seconds in later)
    return TimedSetting(name, switches, kernel, first, times, peak), clock.x0


def _heading(device: torch.device, shape: Any, guidance: float) -> str:
    here = machine(device)
    size = f"{8 * shape[4]}x{8 * shape[3]}, {video_frames(shape[2])} frames"
    half = "without guidance" if guidance == 1 else "with guidance"
    return f"{here.get('gpu') or here['cpu']}, PyTorch {here['torch']}; {size}, {half}; {date.today()}"


def _closing(estimates: list[Tensor], plain_b: bool) -> str:
    one, other = (x0.float().cpu() for x0 in estimates)
    error = relative_error(one, other)
    said = "A and B give the same numbers."
    if error:
        said = f"After these steps A and B differ by {shown(100 * error)} % (PSNR {shown(tensor_psnr(one, other))} dB)."
    return f"{said} B is A with every optimization off." if plain_b else said


NODES = [Benchmark]
