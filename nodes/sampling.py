"""LongCat Sampler and its parts, LongCat Scheduler and LongCat Guider, on top of ComfyUI's own sampling."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import comfy.k_diffusion.sampling
import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ..longcat_core.errors import LongCatError
from ..longcat_core.generate.progress import LOADING, sampled
from ..longcat_core.generate.request import MAX_GUIDANCE, check_number
from ..longcat_core.generate.speeds import EXACT
from ..longcat_core.generate.warming import decoder_ahead
from ..longcat_core.measure.clock import reset_peak, synchronize
from ..longcat_core.model.kv_cache import KVMode, check_mode
from ..longcat_core.optimize.switches import Optimizations
from ..longcat_core.sampling.guidance import audio_guidance, audio_parts, guided_steps, is_guided
from ..longcat_core.sampling.sampler import check_finite
from ..longcat_core.sampling.schedules import schedule_of
from ..longcat_core.sampling.step import guide
from .checks import check_ranges, check_steps
from .comfy_avatar import AUDIO, audio_of, silent, strongest_guidance, with_values
from .comfy_caches import CONDITIONING_CACHE_KEY, TEXT_CACHE_KEY, ConditioningCache, TextCache
from .comfy_network import OPTIMIZATIONS_KEY, step_at
from .inputs import LongCatNode
from .models import distilled_notes, require_longcat, until_notes
from .previews import clean_frames, preview_callback
from .progress import NodeProgress, begins
from .speed import with_speed

PRECISION = "load it with weight_dtype bf16 or fp32"
# In which ComfyUI runs this model's VAE, the first one that the GPU takes.
VAE_DTYPES = [torch.bfloat16, torch.float16, torch.float32]


class Guider(comfy.samplers.CFGGuider):
    """CFG-zero guidance (arXiv 2503.18886), with caches of texts and conditioning frames that last for one run."""

    def __init__(self, model: ModelPatcher, kv_cache: KVMode = "exact", guidance_until: float = 1.0) -> None:
        super().__init__(model)
        self.kv_cache, self.guidance_until, self.began = kv_cache, guidance_until, False

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        out = super().__call__(*args, **kwargs)
        if not self.began:
            # All other steps are still to be waited for.
            check_finite(out, remedy=PRECISION)
            self.began = True
        return out

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: dict | None = None, seed: Any = None) -> Tensor:
        # ComfyUI passes x - x0, which is sigma * velocity, and expects the same; guidance commutes with the factor.
        options = dict(model_options or {})
        switches = options.get("transformer_options", {}).get(OPTIMIZATIONS_KEY, Optimizations())
        scale = self.cfg
        if self._past_guidance(timestep, options):
            self.cfg = 1.0
        if self.cfg != 1:
            options["sampler_cfg_function"] = lambda a: guide(switches, a["cond"], a["uncond"], a["cond_scale"])
        try:
            return super().predict_noise(x, timestep, options, seed)
        finally:
            self.cfg = scale

    def _past_guidance(self, timestep: Tensor, options: dict[str, Any]) -> bool:
        """Whether this step runs without guidance, by the share of the steps that have it."""
        sigmas = options.get("transformer_options", {}).get("sample_sigmas")
        if self.guidance_until >= 1 or sigmas is None:
            return False
        return step_at(sigmas, timestep) >= guided_steps(self.guidance_until, len(sigmas) - 1)

    def inner_sample(self, *args: Any, **kwargs: Any) -> Tensor:
        # ComfyUI has put the weights where they belong.
        begins("")
        self.began = False
        device = self.model_patcher.load_device
        with decoder_ahead(comfy.model_management.vae_dtype(device, VAE_DTYPES), device):
            return super().inner_sample(*args, **kwargs)

    def sample(self, noise: Tensor, latent_image: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        begins(LOADING)
        shared = self.model_options
        self.model_options = comfy.model_patcher.create_model_options_clone(shared)
        options = self.model_options.setdefault("transformer_options", {})
        # With hooks, each prompt may have other weights, hence other keys and values.
        if all(cond.get("hooks") is None for group in self.original_conds.values() for cond in group):
            options[TEXT_CACHE_KEY] = TextCache()
            if self.kv_cache != "off":
                options[CONDITIONING_CACHE_KEY] = ConditioningCache(self.kv_cache == "exact")
        try:
            return super().sample(noise, latent_image, *args, **kwargs)
        finally:
            self.model_options = shared


class AvatarGuider(Guider):
    """Guidance of an avatar: of text between the two prompts with audio, of audio between it and silence."""

    guides = False

    def set_conds(self, positive: Any, negative: Any) -> None:
        audio = audio_of(positive, "positive")
        audio_of(negative, "negative")
        self.audio_guidance = audio.guidance_scale
        heard, silence = (with_values(negative, **{AUDIO: sound}) for sound in (audio, silent(audio)))
        self.inner_set_conds({"positive": positive, "negative": heard, "silent": silence})

    def set_cfg(self, cfg: float) -> None:
        super().set_cfg(cfg)
        self.guides = is_guided(cfg, self.audio_guidance)

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: dict | None = None, seed: Any = None) -> Tensor:
        options = dict(model_options or {})
        guides = self.guides and not self._past_guidance(timestep, options)
        text, sound = (self.cfg, self.audio_guidance) if guides else (1.0, 1.0)
        # What is multiplied by 0 is not computed.
        (silence_used, negative_used), _ = audio_parts(text, sound)
        used = {"positive": True, "negative": negative_used, "silent": silence_used}
        conds = [self.conds[name] if run else None for name, run in used.items()]
        batch = options.get("sampler_calc_cond_batch_function")
        if batch is None:
            outs = comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, options)
        else:
            given = {"conds": conds, "input": x, "sigma": timestep, "model": self.inner_model, "model_options": options}
            outs = batch(given)
        cond, negative, silence = outs
        found = cond
        if guides:
            scales = (torch.tensor(scale, device=x.device) for scale in (text, sound))
            found = audio_guidance(torch.cat((silence, negative, cond)), *scales)
        options["sampler_cfg_function"] = lambda args: x - found
        other = "silent" if used["silent"] else "negative"
        return comfy.samplers.cfg_function(
            self.inner_model, cond, silence if used["silent"] else negative, text, x, timestep, options,
            cond=conds[0], uncond=self.conds[other] if guides else None,
        )  # fmt: skip


def make_guider(
    model: Any, positive: Any, negative: Any, guidance: float, kv_cache: KVMode, node: str, guidance_until: float = 1.0
) -> Guider:
    """A Guider with these prompts. Raises LongCatError for another model or values out of range."""
    require_longcat(model, node)
    check_mode(kv_cache)
    check_number("guidance", guidance, 0.0, MAX_GUIDANCE)
    check_number("guidance until", guidance_until, 0.0, 1.0)
    hears = model.model.network.config.audio is not None
    guider = (AvatarGuider if hears else Guider)(model, kv_cache, guidance_until)
    guider.set_conds(positive, negative)
    guider.set_cfg(guidance)
    return guider


def starting_latents(model: ModelPatcher, latent_image: dict[str, Any]) -> Tensor:
    """The latents that sampling `model` starts from; an empty latent of other channels or scale is made to fit."""
    ratios = (latent_image.get("downscale_ratio_spacial"), latent_image.get("downscale_ratio_temporal"))
    # Since ComfyUI 0.33 a latent carries its ratios, and the function takes them.
    known = ratios if any(ratio is not None for ratio in ratios) else ()
    return comfy.sample.fix_empty_latent_channels(model, latent_image["samples"], *known)


def latent_tokens(shape: Sequence[int], given: int) -> int:
    """Tokens to generate in latents [B, C, T, h, w] of which the first `given` frames are conditioning frames; 0 for
    other shapes, which sampling refuses."""
    # A token is 2x2 latents.
    return (shape[2] - given) * shape[3] * shape[4] // 4 if len(shape) == 5 else 0


class StepTimer:
    """Euler's method that records the seconds of every step, and the last estimate of the clean latents as `x0`."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.x0 = device, [], None

    def euler(self, model: Any, x: Tensor, sigmas: Tensor, extra_args=None, callback=None, disable=None) -> Tensor:
        synchronize(self.device)
        started = time.perf_counter()

        def stepped(state: dict[str, Any]) -> None:
            nonlocal started
            synchronize(self.device)
            self.seconds.append(time.perf_counter() - started)
            self.x0 = state["denoised"]
            if len(self.seconds) == 1:
                reset_peak(self.device)
            if callback is not None:
                callback(state)
            started = time.perf_counter()

        return comfy.k_diffusion.sampling.sample_euler(model, x, sigmas, extra_args, stepped, disable)


def sample_latent(
    node: str,
    model: ModelPatcher,
    positive: Any,
    negative: Any,
    latent_image: dict[str, Any],
    seed: int,
    steps: int,
    guidance: float,
    mode: str,
    kv_cache: KVMode = "exact",
    guidance_until: float = 1.0,
    *,
    timer: StepTimer | None = None,
    callback: Callable | None = None,
    first_steps: int | None = None,
) -> Tensor:
    """LongCat Sampler's clean latents [B, 16, T, H/8, W/8]. Raises LongCatError for input that cannot be sampled.

    timer: records the times of the steps. callback: replaces progress and previews. first_steps: how many steps of the
    schedule to run; None: all.
    """
    guider = make_guider(model, positive, negative, guidance, kv_cache, node, guidance_until)
    sigmas = schedule_of(model.model.network.config.audio, mode, steps).sigmas
    if first_steps is not None:
        sigmas = sigmas[: first_steps + 1]
    samples = starting_latents(model, latent_image)
    mask = latent_image.get("noise_mask")
    if mode == "refine" and not samples[:, :, clean_frames(mask) :].any():
        raise LongCatError(
            "mode refine got an empty latent; connect the latent of a video (LongCat Refine, VAE Encode) or choose base"
        )
    noise = comfy.sample.prepare_noise(samples, seed, latent_image.get("batch_index"))
    samples = guider.sample(
        noise,
        samples,
        comfy.samplers.ksampler("euler") if timer is None else comfy.samplers.KSAMPLER(timer.euler),
        sigmas,
        denoise_mask=mask,
        callback=callback or preview_callback(model, len(sigmas) - 1, mask),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    check_finite(samples, remedy=PRECISION)
    return samples.to(comfy.model_management.intermediate_device())


class Sampler(LongCatNode):
    ID = "LongCatSampler"

    @classmethod
    def validate_inputs(cls, steps=None, mode=None) -> bool:
        check_ranges(cls.ID, {"steps": steps, "mode": mode})
        check_steps(steps, mode)
        return True

    @classmethod
    def execute(
        cls, model, positive, negative, latent_image, seed, steps, guidance, mode, kv_cache="exact",
        guidance_until=1.0, speed=EXACT,
    ) -> io.NodeOutput:  # fmt: skip
        require_longcat(model, "LongCat Sampler")
        strongest = strongest_guidance(positive, guidance)
        notes = [*distilled_notes(model, mode, strongest), *until_notes(strongest, guidance_until)]
        given = clean_frames(latent_image.get("noise_mask"))
        model, guidance_until, found = with_speed(
            model, speed, mode=mode, guidance=strongest, guidance_until=guidance_until,
            tokens=latent_tokens(starting_latents(model, latent_image).shape, given),
        )  # fmt: skip
        for note in (*notes, *found):
            logging.warning("LongCat: %s", note)
        with NodeProgress([sampled(mode, steps)], closing=False):
            samples = sample_latent(
                "LongCat Sampler", model, positive, negative, latent_image, seed, steps, guidance, mode, kv_cache,
                guidance_until,
            )  # fmt: skip
        out = {key: value for key, value in latent_image.items() if not key.startswith("downscale_ratio")}
        out["samples"] = samples
        return io.NodeOutput(out)


class Scheduler(LongCatNode):
    ID = "LongCatScheduler"

    @classmethod
    def validate_inputs(cls, steps=None, mode=None) -> bool:
        check_ranges(cls.ID, {"steps": steps, "mode": mode})
        check_steps(steps, mode)
        return True

    @classmethod
    def execute(cls, model, mode: str, steps: int) -> io.NodeOutput:
        require_longcat(model, "LongCat Scheduler")
        return io.NodeOutput(schedule_of(model.model.network.config.audio, mode, steps).sigmas)


class GuiderNode(LongCatNode):
    ID = "LongCatGuider"

    @classmethod
    def execute(cls, model, positive, negative, guidance, kv_cache="exact", guidance_until=1.0) -> io.NodeOutput:
        for note in until_notes(strongest_guidance(positive, guidance), guidance_until):
            logging.warning("LongCat: %s", note)
        return io.NodeOutput(
            make_guider(model, positive, negative, guidance, kv_cache, "LongCat Guider", guidance_until)
        )


NODES = [Sampler, Scheduler, GuiderNode]
