"""LongCat Benchmark: times two settings of the model on the user's own machine, in ComfyUI's own sampling."""

from __future__ import annotations

from datetime import date

import comfy.utils
import numpy as np
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui
from torch import Tensor

from ..longcat_core.measure import speed
from ..longcat_core.measure.clock import peak_gib
from ..longcat_core.measure.fidelity import relative_error, tensor_psnr
from ..longcat_core.measure.results import machine, shown
from ..longcat_core.measure.speed import SEED, TEXT_TOKENS, TimedSetting, kernel_name, plain
from ..longcat_core.optimize.switches import Optimizations
from ..longcat_core.sampling.conditioning import video_frames
from .comfy_attention import attention_by_comfyui
from .comfy_network import OPTIMIZATIONS_KEY
from .conditioning import to_image
from .inputs import LongCatNode
from .models import compute_dtype, execution_of, options_of, require_comparable, switches_of, with_option
from .sampling import StepTimer, sample_latent

NODE = "LongCat Benchmark"
# Length of the schedule, of which only the first steps run.
SCHEDULE_STEPS = 50


def without_optimizations(model: ModelPatcher) -> ModelPatcher:
    """A clone of the MODEL with every switch off."""
    switches = plain(model.load_device, compute_dtype(model)) | {"fp8": False}
    return with_option(model, OPTIMIZATIONS_KEY, Optimizations(**switches))


def random_text(model: ModelPatcher, tokens: int) -> list:
    """A random conditioning [1, tokens, caption]: the meaning of the text does not affect speed."""
    generator = torch.Generator().manual_seed(SEED + tokens)
    width = model.model.diffusion_model.config.caption_channels
    return [[torch.randn(1, tokens, width, generator=generator), {}]]


class Benchmark(LongCatNode):
    ID = "LongCatBenchmark"

    @classmethod
    def execute(cls, model, latent_image, steps, guidance, model_b=None, positive=None, negative=None) -> io.NodeOutput:
        require_comparable(model, model_b or model, NODE)
        sides, estimates = [], []
        for name, each in (("A", model), ("B", model_b or without_optimizations(model))):
            negative_tokens, positive_tokens = TEXT_TOKENS
            texts = positive or random_text(each, positive_tokens), negative or random_text(each, negative_tokens)
            side, estimate = time_steps(name, each, *texts, latent_image, steps, guidance)
            sides.append(side)
            estimates.append(estimate.float().cpu())
        heading = _heading(model.load_device, latent_image["samples"].shape, guidance)
        closing = _closing(*estimates, b_is_plain=model_b is None)
        image = to_image(np.array(speed.draw(sides, heading, closing))[None])
        return io.NodeOutput(image, speed.text(sides, heading, closing), ui=ui.PreviewImage(image, cls=cls))


def time_steps(
    name: str, model: ModelPatcher, positive: list, negative: list, latent_image: dict, steps: int, guidance: float
) -> tuple[TimedSetting, Tensor]:
    """Times the first 1 + `steps` steps of a sampling run; also returns the last estimate of the clean latents."""
    device, timer, bar = model.load_device, StepTimer(model.load_device), comfy.utils.ProgressBar(1 + steps)
    sample_latent(
        NODE, model, positive, negative, latent_image, SEED, SCHEDULE_STEPS, guidance, "base", timer=timer,
        callback=lambda step, x0, x, total: bar.update_absolute(step + 1, total), first_steps=1 + steps,
    )  # fmt: skip
    peak, switches = peak_gib(device), switches_of(model)
    kernel = attention_by_comfyui(switches, options_of(model))
    kernel = kernel or kernel_name(execution_of(model).choose_kernels(device).attend)
    first, *later = timer.seconds
    return TimedSetting(name, switches, kernel, first, [1000 * seconds for seconds in later], peak), timer.x0


def _heading(device: torch.device, shape: torch.Size, guidance: float) -> str:
    here = machine(device)
    size = f"{8 * shape[4]}x{8 * shape[3]}, {video_frames(shape[2])} frames"
    guided = "without guidance" if guidance == 1 else "with guidance"
    return f"{here.get('gpu') or here['cpu']}, PyTorch {here['torch']}; {size}, {guided}; {date.today()}"


def _closing(a: Tensor, b: Tensor, b_is_plain: bool) -> str:
    error = relative_error(a, b)
    sentence = "A and B give the same numbers."
    if error:
        sentence = f"After these steps A and B differ by {shown(100 * error)} % (PSNR {shown(tensor_psnr(a, b))} dB)."
    return f"{sentence} B is A with every optimization off." if b_is_plain else sentence


NODES = [Benchmark]
