"""The one sampler loop: Euler steps of flow matching for every task, with conditioning frames and guidance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..errors import LongCatError
from ..model.attention import TextTokens
from ..model.kv_cache import KVMode, check_mode
from ..model.transformer import LongCatTransformer
from .schedules import Schedule
from .step import take_step
from .step_cache import StepCache


class Interrupted(Exception):
    """Raise this from a callback to stop sampling between two steps."""


@dataclass(frozen=True)
class Step:
    """What a callback sees after a step. Tensors are live: clone what is kept.

    index counts from 0; timestep in 0..1000; latents [B, C, T, H, W] fp32 after the step, conditioning frames
    included; denoised: the estimate of the clean latents, the same shape. reused: not computed, see `StepCache`.
    """

    index: int
    total: int
    timestep: float
    sigma: float
    latents: Tensor
    denoised: Tensor
    reused: bool = False


Callback = Callable[[Step], None]


@torch.no_grad()
def sample(
    model: LongCatTransformer,
    noise: Tensor,
    schedule: Schedule,
    context: Tensor,
    mask: Tensor | None,
    *,
    negative_context: Tensor | None = None,
    negative_mask: Tensor | None = None,
    guidance_scale: float = 4.0,
    cond_latents: Tensor | None = None,
    kv_cache: KVMode = "exact",
    offload_kv_cache: bool = False,
    step_cache: float = 0.0,
    callback: Callback | None = None,
) -> Tensor:
    """Denoise `noise` [B, C, T, H, W] to latents of the same shape, fp32.

    context [B or 1, L, caption] with its mask; the negative ones are used when guidance_scale is not 1.
    cond_latents [B or 1, C, n, H, W]: clean latents that replace the first n frames (image: 1, continuation: more).
    kv_cache: `exact` computes their keys and values once instead of at every step; `official` as well, but leaves them
    out of the guidance sums, as the public cached path does, which changes the result; `off` computes them at every
    step. Without guidance all are the same. offload_kv_cache keeps the cache in CPU memory.
    step_cache: threshold of `StepCache`; 0 computes every step. Faster, and another result.
    Errors: LongCatError where shapes do not fit; whatever `callback` raises.
    """
    check_mode(kv_cache)
    guided = guidance_scale != 1.0
    if guided and negative_context is None:
        raise LongCatError(f"guidance scale {guidance_scale} needs a negative prompt; give one or set guidance to 1")
    num_cond = 0 if cond_latents is None else cond_latents.shape[2]
    if num_cond >= noise.shape[2]:
        raise LongCatError(
            f"{num_cond} conditioning latent frames leave nothing to generate of {noise.shape[2]}; ask for more frames"
        )
    device = model.patch_embed.weight.device
    latents = noise.to(device=device, dtype=torch.float32, copy=True)
    if cond_latents is not None:
        shape = cond_latents.shape
        if shape[0] not in (1, len(noise)) or shape[1] != noise.shape[1] or shape[3:] != noise.shape[3:]:
            raise LongCatError(
                f"conditioning latents {tuple(shape)} do not fit latents {tuple(noise.shape)}; "
                "encode them at the size of the video"
            )
        latents[:, :, :num_cond] = cond_latents.to(latents)

    text = _text(model, noise.shape[0], context, mask, negative_context if guided else None, negative_mask)
    cache = known = None
    head, count = latents[:, :, :0], num_cond
    if num_cond and kv_cache != "off":
        cache = model.fill_kv_cache(cond_latents.to(latents), "cpu" if offload_kv_cache else None)
        if kv_cache == "exact" and guided:
            # What the network would return for the given frames, at every step and for both halves.
            known = cache.out.repeat(2 * len(latents) // len(cache.out), 1, 1, 1, 1)
        else:
            head, latents = latents[:, :, :num_cond], latents[:, :, num_cond:].contiguous()
            count = 0
        num_cond = 0

    frames, optimizations = latents.shape[2], model.optimizations
    sigmas = schedule.sigmas.tolist()
    # Differences in double precision, then as tensors: see `euler_step`.
    levels = [(sigma, after - sigma) for sigma, after in pairwise(sigmas)]
    levels = torch.tensor(levels, dtype=torch.float32, device=device)
    scale = torch.tensor(guidance_scale, dtype=torch.float32, device=device) if guided else None
    steps = StepCache(step_cache, len(schedule), count)
    for i, timestep in enumerate(schedule.timesteps.tolist()):
        # Once for all videos and both halves of guidance, and for all frames unless some are given.
        t = torch.full((1, frames if num_cond else 1), timestep, device=device)
        t[:, :num_cond] = 0
        out = steps.find(i, latents, sigmas[i])
        reused = out is not None
        if not reused:
            given = latents if known is None else latents[:, :, count:]
            given = torch.cat((given, given)) if guided else given
            out = model(given, t, text, num_cond_latents=num_cond, kv_cache=cache)
            out = out if known is None else torch.cat((known, out), dim=2)
            steps.keep(latents, out, sigmas[i])
        latents, denoised = take_step(optimizations, latents, out, *levels[i], scale, count)
        if callback is not None:
            whole = torch.cat((head, latents), dim=2), torch.cat((head, denoised), dim=2)
            callback(Step(i, len(schedule), timestep, sigmas[i], *whole, reused))
    return torch.cat((head, latents), dim=2)


def _text(
    model: LongCatTransformer,
    batch: int,
    context: Tensor,
    mask: Tensor | None,
    negative_context: Tensor | None,
    negative_mask: Tensor | None,
) -> TextTokens:
    """Text of one forward, unconditional half first, embedded once for all steps."""
    device = model.patch_embed.weight.device
    context = context.to(device)
    if context.shape[0] == 1:
        # One prompt for several videos: each half of a guided batch needs it once per video.
        context = context.expand(batch, -1, -1)
        mask = None if mask is None else mask.expand(batch, -1)
    if negative_context is None:
        return model.embed_text(context, mask)
    if (mask is None) != (negative_mask is None):
        raise LongCatError("one of prompt and negative prompt has a mask and the other has none; give both or neither")
    both = torch.cat((negative_context.to(device).expand_as(context), context))
    if mask is None:
        return model.embed_text(both)
    return model.embed_text(both, torch.cat((negative_mask.expand_as(mask), mask)))
