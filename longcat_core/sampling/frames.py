"""Given (clean) and generated (noisy) latent frames, told by a mask over the latents."""

from __future__ import annotations

from torch import Tensor


def noisy_frames(mask: Tensor) -> Tensor:
    """Which latent frames are to be generated, [B, T] bool; mask [B, C, T, H, W], 0 where latents are given.

    A frame that is given only in part is generated: the network knows clean frames and noisy ones, nothing between.
    """
    return (mask != 0).any(-1).any(-1).any(1)


def count_clean(noisy: Tensor) -> int:
    """How many frames at the front of `noisy` [B, T] bool are given in every sample; 0 where nothing is generated."""
    frames = noisy.any(0).tolist()
    return frames.index(True) if True in frames else 0
