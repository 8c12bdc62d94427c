"""Guidance and the Euler step as one function over the network's output, compiled where the blocks are."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ..optimize.compilation import Regional
from ..optimize.switches import Optimizations
from .guidance import cfg_zero, guided


def euler_step(
    latents: Tensor, out: Tensor, sigma: Tensor, sigma_change: Tensor, scale: Tensor | None, num_cond: int
) -> tuple[Tensor, Tensor]:
    """One step of latents [B, C, T, H, W] fp32 along the network's output: (latents after it, estimate of the clean).

    out: x0 - noise, [B, C, T, H, W] fp32, or with guidance several outputs, the unconditional ones first. sigma,
    sigma_change (next sigma - sigma) and scale (of guidance, see `guided`; None: no guidance) are tensors, since plain
    numbers would be compiled in. The first num_cond frames are conditioning frames and do not change.
    """
    if scale is not None:
        out = guided(out, scale)
    clean, noisy, out = latents[:, :, :num_cond], latents[:, :, num_cond:], out[:, :, num_cond:]
    # The network returns x0 - noise; the flow velocity is its negative.
    after, denoised = noisy - sigma_change * out, noisy + sigma * out
    if not num_cond:
        return after, denoised
    return torch.cat((clean, after), dim=2), torch.cat((clean, denoised), dim=2)


STEP, GUIDANCE = Regional(euler_step, "the sampler step", slow=False), Regional(cfg_zero, "guidance", slow=False)


def _run(function: Regional, optimizations: Optimizations, kind: tuple, *args: Tensor | int | None) -> Any:
    if not (optimizations.fused_step and optimizations.compile != "off"):
        return function.function(*args)
    tensors = [arg for arg in args if isinstance(arg, Tensor) and arg.ndim == 5]
    return function(
        *args,
        kind=(*kind, *(tensor.shape[:2] for tensor in tensors), tensors[0].device),
        size=tensors[0].shape[2:],
        sized=[(tensor, (2, 3, 4)) for tensor in tensors],
        announce=_warn_of_failure,
    )


def _warn_of_failure(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=2)


def take_step(
    optimizations: Optimizations,
    latents: Tensor,
    out: Tensor,
    sigma: Tensor,
    sigma_change: Tensor,
    scale: Tensor | None,
    num_cond: int,
) -> tuple[Tensor, Tensor]:
    """`euler_step`, compiled under `fused_step` where blocks are compiled."""
    kind = None if scale is None else tuple(scale.shape), num_cond
    return _run(STEP, optimizations, kind, latents, out, sigma, sigma_change, scale, num_cond)


def guide(optimizations: Optimizations, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """`cfg_zero`, compiled under `fused_step` where blocks are compiled."""
    return _run(GUIDANCE, optimizations, (), cond, uncond, torch.tensor(scale, dtype=torch.float32, device=cond.device))
