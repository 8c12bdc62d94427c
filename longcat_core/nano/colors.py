"""LongCat-nano's latents as colors, for previews: one linear map for all pixels, fitted to what its VAE decodes.

The first latent frame, which stands for one frame where the others stand for four, has colors of its own: one map for
both would be wrong by 59 levels of 255. It is left out here, and previews begin with the second.
`python -m longcat_core.nano.colors` fits it again and prints it with its error; do so after the VAE was trained.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..model.config import ModelConfig

if TYPE_CHECKING:
    from ..generate.vae import VideoVAE

# [latent channel][R, G, B] and [R, G, B], from normalized latents to colors in -1..1. On clips that the fit did not see
# the error of a color is ERROR of 255 levels (root of the mean square over all latents, R, G and B).
FACTORS = (
    (-0.2130, -0.2637, -0.1871),
    (-0.1475, -0.0137, -0.0328),
    (0.1581, -0.0415, 0.0315),
    (0.0091, -0.0782, -0.2455),
    (-0.1024, -0.1031, 0.0183),
    (0.1732, 0.0415, 0.1622),
    (0.2862, 0.1568, -0.0504),
    (-0.2005, -0.0849, -0.1317),
    (0.2519, 0.5657, 0.0690),
    (-0.2098, -0.3614, -0.1907),
    (-0.0638, 0.0493, -0.1844),
    (-0.1165, -0.0476, 0.0275),
    (0.1488, -0.0201, 0.0782),
    (0.0559, 0.1405, -0.0185),
    (0.0135, -0.2619, -0.4423),
    (0.0558, 0.1184, -0.1930),
)
BIAS = (-0.1666, -0.0223, -0.0465)
ERROR = 17.3


def is_nano(config: ModelConfig) -> bool:
    """Whether a network is LongCat-nano, by its sizes."""
    return (config.hidden_size, config.depth, config.caption_channels) == (192, 6, 128)


SIZE = 8
SEED, CLIPS, FRAMES, HEIGHT, WIDTH = 0, 24, 17, 64, 96


@torch.no_grad()
def samples(vae: VideoVAE, seed: int, clips: int) -> tuple[Tensor, Tensor]:
    """Latents [N, 16] of clips of the world and the mean colors [N, 3], in -1..1, of the pixels decoded from each.

    A latent stands for 8x8 pixels of four frames; those of the first latent frame are left out.
    """
    from .world import place, render, sample_scene

    latents, colors = [], []
    for number in range(clips):
        scene = sample_scene(random.Random(1000 * seed + number))
        clip = render(place([scene], 1000 * seed + number), FRAMES, HEIGHT, WIDTH).permute(0, 4, 1, 2, 3)
        encoded = vae.encode(2 * clip - 1)
        decoded = vae.decode(encoded)[0].permute(3, 0, 1, 2)
        later = decoded[:, 1:].unflatten(1, (-1, 4)).mean(2)
        blocks = later.unflatten(2, (-1, SIZE)).unflatten(4, (-1, SIZE)).mean((3, 5))
        latents.append(encoded[0, :, 1:].flatten(1).T)
        colors.append(2 * blocks.flatten(1).T - 1)
    return torch.cat(latents).double(), torch.cat(colors).double()


def fit(vae: VideoVAE) -> tuple[Tensor, Tensor, float]:
    """FACTORS [16, 3], BIAS [3] and ERROR, by least squares."""
    latents, colors = samples(vae, SEED, CLIPS)
    ones = torch.ones(len(latents), 1, dtype=latents.dtype)
    found = torch.linalg.lstsq(torch.cat((latents, ones), dim=1), colors).solution
    return found[:-1], found[-1], error(vae, found[:-1], found[-1])


def error(vae: VideoVAE, factors: Tensor, bias: Tensor, clips: int = 8) -> float:
    """The error of these colors on other clips than those of the fit, in levels of 0..255."""
    latents, colors = samples(vae, SEED + 1, clips)
    shown = (latents @ factors.double() + bias.double()).clamp(-1, 1)
    return 127.5 * float((shown - colors).square().mean().sqrt())


if __name__ == "__main__":
    from ..generate.paths import NANO_VAE
    from ..generate.vae import load_vae

    factors, bias, left = fit(load_vae(NANO_VAE))
    print("FACTORS = (")
    for row in factors.tolist():
        print("    ({:.4f}, {:.4f}, {:.4f}),".format(*row))
    print(")\nBIAS = ({:.4f}, {:.4f}, {:.4f})".format(*bias.tolist()))
    print(f"ERROR = {left:.1f}")
