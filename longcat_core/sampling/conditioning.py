"""Conditioning frames (an image, the end of a clip) and how many latent frames they make."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ..errors import LongCatError

Clip = TypeVar("Clip", Tensor, np.ndarray)

TEMPORAL_FACTOR = 4
SPATIAL_FACTOR = 8
# The first seed that needs more than 32 bits.
LARGE_SEED = 1 << 32


def latent_frames(frames: int, name: str = "", noun: str = "frames") -> int:
    """Latent frames of a clip of `frames` = 4k+1 frames: one for the first frame, then one for every four.

    Raises LongCatError for other counts. name: of the input; noun: of what is counted, for that error.
    """
    if frames < 1 or (frames - 1) % TEMPORAL_FACTOR:
        below, above = nearest_frame_counts(frames)
        prefix = f"{name}: " if name else ""
        raise LongCatError(f"{prefix}{frames} {noun} are not of the form 4k+1; the nearest are {below} and {above}")
    return 1 + (frames - 1) // TEMPORAL_FACTOR


def nearest_frame_counts(frames: int) -> tuple[int, int]:
    """The nearest counts of the form 4k+1 at or below and above `frames`, at least 1."""
    below = max(1, (frames - 1) // TEMPORAL_FACTOR * TEMPORAL_FACTOR + 1)
    return below, below + TEMPORAL_FACTOR


def video_frames(latents: int) -> int:
    """Number of frames that `latents` latent frames decode to."""
    return 1 + (latents - 1) * TEMPORAL_FACTOR


def latent_shape(frames: int, height: int, width: int, channels: int = 16) -> tuple[int, int, int, int]:
    """(channels, T, H/8, W/8) of a video of `frames` x `height` x `width` pixels."""
    return channels, latent_frames(frames), height // SPATIAL_FACTOR, width // SPATIAL_FACTOR


def last_frames(clip: Clip, count: int) -> Clip:
    """The last `count` frames of a clip [F, ...]. Raises LongCatError for a shorter clip."""
    if len(clip) < count:
        raise LongCatError(f"the clip has {len(clip)} frames but {count} conditioning frames are asked for; give more")
    return clip[-count:]


def to_pixels(frames: Tensor) -> Tensor:
    """uint8 frames [F, H, W, 3] -> [1, 3, F, H, W] fp32 in -1..1, the input of the VAE encoder."""
    return (frames.to(torch.float32) / 127.5 - 1).permute(3, 0, 1, 2)[None]


def seeded_noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Standard normal noise fp32, drawn on the CPU so that a seed gives the same noise on every device.

    PyTorch's generator reads 32 bits of a seed. Larger ones, up to 2^64, seed NumPy's with all of their bits; NumPy
    guarantees that the numbers of its `RandomState` never change. Raises LongCatError for other seeds.
    """
    if not 0 <= seed < 1 << 64:
        raise LongCatError(f"seed {seed} is out of range; give a whole number from 0 to 2^63 - 1")
    if seed < LARGE_SEED:
        return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32)
    words = np.array([seed % LARGE_SEED, seed // LARGE_SEED], np.uint32)
    return torch.from_numpy(np.random.RandomState(words).standard_normal(shape)).float()
