"""The audio encoder of the nano avatar: Whisper's form, made by rule.

Its first convolution averages bands of the spectrum, its second one smooths over time, and its layers, which are random
and small, change little. So every state tells how loud each band is.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from ...files.safetensors_io import write_safetensors
from ...generate.audio.whisper import WhisperConfig, WhisperEncoder

EAR = WhisperConfig(mels=40, width=16, layers=4, heads=2, hidden=32, positions=500)
SEED = 25
SMALL = 0.03
# The log-mel of speech lies around 0 to 1; GELU passes what is raised by this almost as it is.
GAIN, RAISE = 1.5, 1.5


@torch.no_grad()
def new_ear(config: WhisperConfig = EAR) -> WhisperEncoder:
    """The encoder, always the same, fp32 on the CPU."""
    generator = torch.Generator().manual_seed(SEED)
    ear = WhisperEncoder(config)
    for name, parameter in ear.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        elif parameter.ndim == 1:
            parameter.zero_()
        else:
            parameter.copy_(SMALL * torch.randn(parameter.shape, generator=generator))
    bands, mels = torch.arange(config.width)[:, None], torch.arange(config.mels)
    center = (bands + 0.5) * config.mels / config.width
    share = (1 - (mels + 0.5 - center).abs() * config.width / (2 * config.mels)).clamp(min=0)
    ear.conv1.weight += GAIN * (share / share.sum(1, keepdim=True))[..., None] * torch.tensor([0.25, 0.5, 0.25])
    cast(Tensor, ear.conv1.bias).fill_(RAISE)
    ear.conv2.weight += torch.eye(config.width)[..., None] * torch.tensor([0.25, 0.5, 0.25])
    place = torch.arange(config.positions)[:, None] * math.pi / config.positions
    ear.embed_positions.weight.copy_(SMALL * torch.sin(place * (1 + torch.arange(config.width))))
    return ear


def ear_tensors() -> dict[str, Tensor]:
    """Its weights in bf16, under Whisper's names."""
    return {name: parameter.detach().to(torch.bfloat16) for name, parameter in new_ear().named_parameters()}


def save_ear(path: Path) -> None:
    """Write the encoder as one file whose metadata says how many heads it has."""
    write_safetensors(path, ear_tensors(), {"format": "pt", "config": json.dumps({"heads": EAR.heads})})
