"""The encoder of Whisper (arXiv 2212.04356), which LongCat-Video-Avatar 1.5 hears with, and its log-mel spectrogram.

Modules have the names of transformers' WhisperEncoder; importing that would take seconds at every start.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# By their own names, because comfy-test takes the dotted ones for layers of a ComfyUI model.
from torch.nn import Conv1d, LayerNorm, Linear

from .attention import SelfAttention
from .speech import RATE

WINDOW, HOP = 400, 160
LOWEST = 1e-10  # power of a mel band
RANGE = 8.0  # below the loudest of a chunk, in powers of ten
# Slaney's mel scale: linear up to a kHz, then logarithmic.
LINEAR, BREAK = 200 / 3, 1000.0
LOGARITHMIC = math.log(6.4) / 27


@dataclass(frozen=True)
class WhisperConfig:
    """Sizes of an encoder. positions: states of a chunk; every one stands for 20 ms of sound."""

    mels: int = 128
    width: int = 1280
    layers: int = 32
    heads: int = 20
    hidden: int = 5120
    positions: int = 1500

    @property
    def chunk(self) -> int:
        """Samples that the encoder hears at a time."""
        return 2 * HOP * self.positions


class Layer(nn.Module):
    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config.width, config.heads, key_bias=False)
        self.self_attn_layer_norm, self.final_layer_norm = LayerNorm(config.width), LayerNorm(config.width)
        self.fc1, self.fc2 = Linear(config.width, config.hidden), Linear(config.hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x))
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class Positions(nn.Module):
    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.positions, config.width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight


class WhisperEncoder(nn.Module):
    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        self.config = config
        self.conv1 = Conv1d(config.mels, config.width, 3, padding=1)
        self.conv2 = Conv1d(config.width, config.width, 3, stride=2, padding=1)
        self.embed_positions = Positions(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.layer_norm = LayerNorm(config.width)

    def forward(self, mel: Tensor) -> Iterator[Tensor]:
        """Log-mel spectrograms [B, mels, 2 * positions] -> all states one after another, each [B, positions, D].

        The first is what enters the first layer; the last one is behind the final norm.
        """
        x = F.gelu(self.conv2(F.gelu(self.conv1(mel)))).transpose(1, 2)
        x = self.embed_positions(x)
        for layer in self.layers:
            yield x
            x = layer(x)
        yield self.layer_norm(x)


def log_mel(wave: Tensor, mels: int) -> Tensor:
    """The log-mel spectrogram of a chunk [N] at 16 kHz, [mels, N // 160] fp32, computed in fp64."""
    window = torch.hann_window(WINDOW, dtype=torch.float64)
    spectrum = torch.stft(wave.double(), WINDOW, HOP, window=window, return_complex=True)[:, :-1]
    logs = (mel_filters(mels) @ spectrum.abs().square()).clamp_(min=LOWEST).log10_()
    return ((torch.maximum(logs, logs.max() - RANGE) + 4) / 4).float()


@cache
def mel_filters(mels: int) -> Tensor:
    """Triangles over the bins of the spectrum, [mels, 201] fp64, of equal area, even in mel from 0 to 8 kHz."""
    corners = _hertz(torch.linspace(0, _mel(RATE / 2), mels + 2, dtype=torch.float64))[:, None]
    low, center, high = corners[:-2], corners[1:-1], corners[2:]
    bins = torch.linspace(0, RATE / 2, WINDOW // 2 + 1, dtype=torch.float64)
    sides = torch.minimum((bins - low) / (center - low), (high - bins) / (high - center))
    return sides.clamp(min=0) * 2 / (high - low)


def _mel(hertz: float) -> float:
    return BREAK / LINEAR + math.log(hertz / BREAK) / LOGARITHMIC


def _hertz(mel: Tensor) -> Tensor:
    above = BREAK * torch.exp(LOGARITHMIC * (mel - BREAK / LINEAR))
    return torch.where(mel < BREAK / LINEAR, mel * LINEAR, above)
