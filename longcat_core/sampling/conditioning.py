"""Conditioning frames (an image, the end of a clip) and how many latent frames they make."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import LongCatError

TEMPORAL_FACTOR = 4
SPATIAL_FACTOR = 8


def latent_frames(frames: int, name: str = "") -> int:
    """Latent frames of a clip of `frames` = 4k+1 frames: one for the first frame, then one for every four.

    Raises LongCatError for other counts, naming the input if `name` is given.
    """
    if frames < 1 or (frames - 1) % TEMPORAL_FACTOR:
        below = max(1, (frames - 1) // TEMPORAL_FACTOR * TEMPORAL_FACTOR + 1)
        above = below + TEMPORAL_FACTOR if frames >= 1 else 5
        prefix = f"{name}: " if name else ""
        raise LongCatError(f"{prefix}{frames} frames are not 4k+1; the nearest counts are {below} and {above}")
    return 1 + (frames - 1) // TEMPORAL_FACTOR


def video_frames(latents: int) -> int:
    """Number of frames that `latents` latent frames decode to."""
    return 1 + (latents - 1) * TEMPORAL_FACTOR


def latent_shape(frames: int, height: int, width: int, channels: int = 16) -> tuple[int, int, int, int]:
    """(channels, T, H/8, W/8) of a video of `frames` x `height` x `width` pixels."""
    return channels, latent_frames(frames), height // SPATIAL_FACTOR, width // SPATIAL_FACTOR


def last_frames(clip: Tensor, count: int) -> Tensor:
    """The last `count` frames of a clip [F, ...]. Raises LongCatError for a shorter clip."""
    if len(clip) < count:
        raise LongCatError(f"the clip has {len(clip)} frames but {count} conditioning frames are asked for; give more")
    return clip[-count:]


def to_pixels(frames: Tensor) -> Tensor:
    """uint8 frames [F, H, W, 3] -> [1, 3, F, H, W] fp32 in -1..1, the input of the VAE encoder."""
    return (frames.to(torch.float32) / 127.5 - 1).permute(3, 0, 1, 2)[None]


def seeded_noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Standard normal noise fp32, drawn on the CPU so that a seed gives the same noise on every device."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32)
