"""Conditioning (clean) and generated (noisy) latent frames, as a mask over the latents marks them."""

from __future__ import annotations

from torch import Tensor


def noisy_frames(mask: Tensor) -> Tensor:
    """Which latent frames to generate, [B, T] bool; mask [B, C, T, H, W] is 0 where latents are clean.

    A frame that is clean only in part counts as generated: to the network a frame is either clean or noisy.
    """
    return (mask != 0).any(-1).any(-1).any(1)


def count_clean(noisy: Tensor) -> int:
    """Number of leading frames of `noisy` [B, T] bool that are clean in every sample; 0 if no frame is noisy."""
    frames = noisy.any(0).tolist()
    return frames.index(True) if True in frames else 0
