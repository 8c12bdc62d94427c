"""Frame counts, given frames as pixels, and seeded noise."""

from __future__ import annotations

import pytest
import torch

from longcat_core.errors import LongCatError
from longcat_core.sampling.conditioning import (
    last_frames,
    latent_frames,
    latent_shape,
    seeded_noise,
    to_pixels,
    video_frames,
)


@pytest.mark.parametrize(("frames", "latents"), [(1, 1), (5, 2), (13, 4), (33, 9), (93, 24)])
def test_counts_there_and_back(frames, latents):
    assert latent_frames(frames) == latents
    assert video_frames(latents) == frames


@pytest.mark.parametrize(
    ("frames", "nearest"), [(2, "1 and 5"), (4, "1 and 5"), (32, "29 and 33"), (94, "93 and 97"), (0, "1 and 5")]
)
def test_other_counts_are_answered_with_the_nearest(frames, nearest):
    with pytest.raises(LongCatError, match=f"{frames} frames are not of the form 4k\\+1; the nearest are {nearest}"):
        latent_frames(frames)


def test_shape_of_the_released_size():
    assert latent_shape(93, 480, 832) == (16, 24, 60, 104)
    assert latent_shape(1, 64, 96, channels=4) == (4, 1, 8, 12)


def test_last_frames():
    clip = torch.arange(7)
    assert last_frames(clip, 5).tolist() == [2, 3, 4, 5, 6]
    assert torch.equal(last_frames(clip, 7), clip)
    with pytest.raises(LongCatError, match="the clip has 7 frames but 13 conditioning frames are asked for"):
        last_frames(clip, 13)


def test_pixels():
    frames = torch.zeros(2, 3, 4, 3, dtype=torch.uint8)
    frames[1, 2, 3] = torch.tensor([255, 51, 0], dtype=torch.uint8)
    pixels = to_pixels(frames)
    assert pixels.shape == (1, 3, 2, 3, 4) and pixels.dtype == torch.float32
    assert pixels[0, :, 1, 2, 3].tolist() == pytest.approx([1.0, -0.6, -1.0], abs=1e-6)
    assert (pixels[0, :, 0] == -1).all()


def test_noise_follows_its_seed_and_leaves_the_global_one_alone():
    state = torch.get_rng_state()
    noise = seeded_noise((2, 16, 3, 8, 12), 7)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(noise, seeded_noise((2, 16, 3, 8, 12), 7))
    assert not torch.equal(noise, seeded_noise((2, 16, 3, 8, 12), 8))
    assert noise.dtype == torch.float32 and noise.device.type == "cpu"
    assert abs(noise.mean().item()) < 0.03 and abs(noise.std().item() - 1) < 0.03


@pytest.mark.parametrize("seed", [2**32, 2**32 + 7, 7 * 2**32, 2**63 - 1, 2**64 - 1])
def test_all_bits_of_a_seed_count(seed: int):
    shape = (2, 16, 3, 8, 12)
    noise = seeded_noise(shape, seed)
    assert noise.shape == shape and noise.dtype == torch.float32
    assert torch.equal(noise, seeded_noise(shape, seed))
    others = {seed % 2**32, seed // 2**32, seed ^ 1, seed ^ 2**40, (seed % 2**32) * 2**32 + seed // 2**32} - {seed}
    assert not any(torch.equal(noise, seeded_noise(shape, other)) for other in others)
    assert abs(noise.mean().item()) < 0.03 and abs(noise.std().item() - 1) < 0.03


def test_seeds_keep_their_noise():
    """Below 2^32 that of PyTorch's generator, as ever."""
    assert seeded_noise((3,), 7).tolist() == pytest.approx([-0.1468, 0.78614, 0.94682], abs=1e-5)
    assert seeded_noise((3,), 2**32 - 1).tolist() == pytest.approx([1.21976, -0.39298, 1.02308], abs=1e-5)
    assert seeded_noise((3,), 2**32 + 7).tolist() == pytest.approx([-0.63587, -1.23439, 1.77952], abs=1e-5)


@pytest.mark.parametrize("seed", [-1, 2**64, -(2**70)])
def test_other_seeds_are_refused(seed: int):
    with pytest.raises(LongCatError, match=f"seed {seed} is out of range"):
        seeded_noise((1,), seed)
