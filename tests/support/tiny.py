"""The golden model, made to depend on what it is given: whole videos in a fraction of a second.

Its random VAE encodes every picture alike, and its text is always the same.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from longcat_core.checkpoints.load import load_transformer
from longcat_core.generate.pipeline import Pipeline
from longcat_core.generate.request import NANO
from longcat_core.generate.vae import load_vae
from longcat_core.model.config import ModelConfig

GOLDEN = Path(__file__).parent.parent / "data" / "golden"
# So large that the change of a few levels of 255 in a few given pixels shows in the frames that follow.
GAIN = 100
# Of the requests that tests make; the seed of a segment counts up from it.
SEED = 7


def tiny_config(**changes: Any) -> ModelConfig:
    """A network of a few thousand weights, with `changes` in its shape."""
    shape = {"hidden_size": 64, "depth": 2, "num_heads": 2, "caption_channels": 32, "ffn_hidden": 96, "adaln_dim": 32}
    return ModelConfig(**shape | changes)


def moving_clip(frames: int, height: int = 16, width: int = 32) -> np.ndarray:
    """Gray stripes that move, uint8 [F, H, W, 3]; no two frames are equal."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([np.stack([(rows * 9 + columns * 5 + 7 * i) % 256] * 3, -1) for i in range(frames)]).astype("uint8")


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


def golden_pipeline(text: Any, kind: type[Pipeline] = Pipeline) -> Pipeline:
    """The golden model with this text encoder."""
    # dit.safetensors has config.json beside it for the network's shape.
    return kind(load_transformer(GOLDEN / "dit.safetensors"), load_vae(GOLDEN / "vae.safetensors"), text, NANO)


def tiny_pipeline() -> Pipeline:
    return golden_pipeline(PromptText(), TinyPipeline)


def unwanted() -> Pipeline:
    raise AssertionError("a model was loaded")
