"""Classifier-free guidance with an optimized scale for the unconditional half (CFG-Zero*, arXiv 2503.18886)."""

from __future__ import annotations

from torch import Tensor

DEFAULT_NEGATIVE_PROMPT = (
    "Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, images, static, "
    "overall gray, worst quality, low quality, JPEG compression residue, ugly, incomplete, extra fingers, "
    "poorly drawn hands, poorly drawn faces, deformed, disfigured, misshapen limbs, fused fingers, still picture, "
    "messy background, three legs, many people in the background, walking backwards"
)


def guided_steps(until: float, steps: int) -> int:
    """How many of `steps` steps, at the front, run with guidance if it ends after the share `until`."""
    return round(until * steps)


def cfg_zero_scale(cond: Tensor, uncond: Tensor) -> Tensor:
    """<cond, uncond> / (|uncond|^2 + 1e-8) per sample, [B, 1, 1, 1, 1]; inputs [B, C, T, H, W] fp32.

    The sums run over all frames of the inputs, so including conditioning frames changes the result.
    """
    dims = tuple(range(1, cond.ndim))
    dot = (cond * uncond).sum(dims, keepdim=True)
    return dot / (uncond.square().sum(dims, keepdim=True) + 1e-8)


def cfg_zero(cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor:
    """a*uncond + scale*(cond - a*uncond) with a = cfg_zero_scale; the network's outputs [B, C, T, H, W] fp32.

    Velocities and their negatives give the same result.
    """
    scaled = uncond * cfg_zero_scale(cond, uncond)
    return scaled + scale * (cond - scaled)
