"""The golden model, made to depend on what it is given: whole videos in a fraction of a second.

Its random VAE encodes every picture alike, and its text is always the same.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from longcat_core.checkpoints.load import load_transformer
from longcat_core.generate.pipeline import Pipeline
from longcat_core.generate.request import NANO
from longcat_core.generate.vae import load_vae

GOLDEN = Path(__file__).parent.parent / "data" / "golden"
# So large that the change of a few levels of 255 in a few given pixels shows in the frames that follow.
GAIN = 100
# Of the requests that tests make: segments are told by it.
SEED = 7


class PromptText:
    """The golden embedding and noise that the prompt seeds."""

    def __init__(self) -> None:
        golden = load_file(GOLDEN / "generate.safetensors")
        self.embeds, self.mask = golden["pos.embeds"], golden["pos.mask"]

    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(zlib.crc32(prompts[0].encode()))
        return self.embeds + 4 * torch.randn(self.embeds.shape, generator=generator), self.mask


class TinyPipeline(Pipeline):
    def encode(self, pixels: Tensor) -> Tensor:
        latents = super().encode(pixels)
        colors = F.adaptive_avg_pool3d(pixels, latents.shape[2:])
        return latents + GAIN * colors[:, torch.arange(latents.shape[1]) % 3]


def tiny_pipeline() -> TinyPipeline:
    return TinyPipeline(
        load_transformer(GOLDEN / "dit.safetensors"), load_vae(GOLDEN / "vae.safetensors"), PromptText(), NANO
    )


def unwanted() -> TinyPipeline:
    raise AssertionError("a model was loaded")
