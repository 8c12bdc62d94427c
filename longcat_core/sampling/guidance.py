"""Classifier-free guidance with an optimized scale for the unconditional half (CFG-Zero*, arXiv 2503.18886)."""

from __future__ import annotations

from torch import Tensor

DEFAULT_NEGATIVE_PROMPT = (
    "Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, images, static, "
    "overall gray, worst quality, low quality, JPEG compression residue, ugly, incomplete, extra fingers, "
    "poorly drawn hands, poorly drawn faces, deformed, disfigured, misshapen limbs, fused fingers, still picture, "
    "messy background, three legs, many people in the background, walking backwards"
)
# Of LongCat-Video-Avatar.
AVATAR_NEGATIVE_PROMPT = f"Close-up, {DEFAULT_NEGATIVE_PROMPT}"
NEGATIVE_PROMPTS = DEFAULT_NEGATIVE_PROMPT, AVATAR_NEGATIVE_PROMPT


def audio_guidance(out: Tensor, text_scale: Tensor, audio_scale: Tensor) -> Tensor:
    """Guidance of an avatar: u + text_scale * (c - n) + audio_scale * (n - u), without sums over frames.

    out: the network's outputs u, n and c, [3B, C, T, H, W] fp32: for the negative prompt and silence, for the negative
    prompt, and for the prompt.
    """
    silent, negative, cond = out.chunk(3)
    return silent + text_scale * (cond - negative) + audio_scale * (negative - silent)


def is_guided(text_scale: float, audio_scale: float | None = None) -> bool:
    """Whether a step evaluates more than the prompt. audio_scale: of an avatar, where both scales must be 1 or less."""
    return text_scale != 1 if audio_scale is None else max(text_scale, audio_scale) > 1


def audio_parts(text_scale: float, audio_scale: float) -> tuple[tuple[bool, bool], tuple[float, ...]]:
    """Whether `audio_guidance` needs u and n beside c, and the scales that `guided` takes then; see `is_guided`.

    The weights of u, n and c are 1 - audio_scale, audio_scale - text_scale and text_scale, so equal scales need no n.
    """
    needed = audio_scale != 1, audio_scale != text_scale
    # The weights add up to 1, so those of two outputs are one number.
    return needed, (text_scale, audio_scale) if all(needed) else (text_scale,)


def guided(out: Tensor, scale: Tensor) -> Tensor:
    """A step's outputs, the unconditional ones first, combined.

    scale: of `cfg_zero`, [], for outputs [2B, ..]; or of `audio_parts`: two, [2], for the outputs [3B, ..] of
    `audio_guidance`, or one, [1], for c and one of the others, [2B, ..].
    """
    if scale.ndim and len(scale) == 2:
        return audio_guidance(out, *scale.unbind())
    if scale.ndim:
        other, cond = out.chunk(2)
        return other + scale * (cond - other)
    uncond, cond = out.chunk(2)
    return cfg_zero(cond, uncond, scale)


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
