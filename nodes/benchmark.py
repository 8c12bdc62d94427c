"""LongCat Benchmark: times two settings of the model in turns, on the user's own machine, in ComfyUI's sampling."""

from __future__ import annotations

from datetime import date

import numpy as np
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui
from torch import Tensor

from ..longcat_core.generate.progress import Part
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
from .models import (
    compute_dtype,
    execution_of,
    options_of,
    preferences_of,
    require_comparable,
    switches_of,
    with_option,
)
from .progress import NodeProgress
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
        runs = [
            _Side(name, each, positive, negative) for name, each in
            (("A", model), ("B", model_b or without_optimizations(model)))
        ]  # fmt: skip
        order = speed.turns(steps, switch_cheaply(*(run.model for run in runs)))
        turns = [Part(1 + timed, runs[side].name) for side, timed in order]
        with NodeProgress(turns, what="turn", closing=False) as shown:
            for side, timed in order:
                runs[side].take_turn(latent_image, timed, guidance, shown)
                shown.task.finish()
        sides = [run.timed() for run in runs]
        heading = _heading(model.load_device, latent_image["samples"].shape, guidance)
        closing = _closing(*(run.estimates for run in runs), b_is_plain=model_b is None)
        image = to_image(np.array(speed.draw(sides, heading, closing))[None])
        return io.NodeOutput(image, speed.text(sides, heading, closing), ui=ui.PreviewImage(image, cls=cls))


def switch_cheaply(a: ModelPatcher, b: ModelPatcher) -> bool:
    """Whether ComfyUI moves and patches no weights when it goes from one MODEL to the other: they are one model with
    other options, or two models in the memory of a CPU."""
    if a.is_clone(b):
        return a.patches_uuid == b.patches_uuid
    return a.load_device.type == b.load_device.type == "cpu"


class _Side:
    """One MODEL, its prompts, and what its turns have shown so far.

    estimates: of the clean latents after each step, which are the same in every turn.
    """

    def __init__(self, name: str, model: ModelPatcher, positive: list | None, negative: list | None) -> None:
        negative_tokens, positive_tokens = TEXT_TOKENS
        self.name, self.model = name, model
        self.texts = positive or random_text(model, positive_tokens), negative or random_text(model, negative_tokens)
        self.first_s: float | None = None
        self.times_ms: list[float] = []
        self.peak: float | None = None
        self.estimates: dict[int, Tensor] = {}

    def take_turn(self, latent_image: dict, steps: int, guidance: float, shown: NodeProgress) -> None:
        """Time the first 1 + `steps` steps of a sampling run. The first one counts only in the first turn of all,
        as the time with compilation: it also embeds the text and brings weights back that another model displaced."""
        timer = StepTimer(self.model.load_device)

        def keep(step: int, x0: Tensor, x: Tensor, total: int) -> None:
            self.estimates.setdefault(step, x0.float().cpu())
            shown.step(step + 1, total)

        sample_latent(
            NODE, self.model, *self.texts, latent_image, SEED, SCHEDULE_STEPS, guidance, "base", timer=timer,
            callback=keep, first_steps=1 + steps,
        )  # fmt: skip
        first, *later = timer.seconds
        self.first_s = first if self.first_s is None else self.first_s
        self.times_ms += [1000 * seconds for seconds in later]
        peak = peak_gib(self.model.load_device)
        self.peak = peak if self.peak is None or peak is None else max(self.peak, peak)

    def timed(self) -> TimedSetting:
        switches = switches_of(self.model)
        kernel = attention_by_comfyui(switches, options_of(self.model), preferences_of(self.model))
        kernel = kernel or kernel_name(execution_of(self.model).choose_kernels(self.model.load_device).attend)
        if sparse := execution_of(self.model).sparse_in_words(self.model.load_device):
            kernel = f"{kernel}; sparse: {sparse}"
        return TimedSetting(self.name, switches, kernel, self.first_s or 0.0, self.times_ms, self.peak)


def _heading(device: torch.device, shape: torch.Size, guidance: float) -> str:
    here = machine(device)
    size = f"{8 * shape[4]}x{8 * shape[3]}, {video_frames(shape[2])} frames"
    guided = "without guidance" if guidance == 1 else "with guidance"
    return f"{here.get('gpu') or here['cpu']}, PyTorch {here['torch']}; {size}, {guided}; {date.today()}"


def _closing(a: dict[int, Tensor], b: dict[int, Tensor], b_is_plain: bool) -> str:
    last = max(a.keys() & b.keys())
    error = relative_error(a[last], b[last])
    sentence = "A and B give the same numbers."
    if error:
        psnr = shown(tensor_psnr(a[last], b[last]))
        sentence = f"After {last + 1} steps A and B differ by {shown(100 * error)} % (PSNR {psnr} dB)."
    return f"{sentence} B is A with every optimization off." if b_is_plain else sentence


NODES = [Benchmark]
