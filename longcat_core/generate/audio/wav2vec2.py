"""The network of wav2vec 2.0 (arXiv 2006.11477), base size, which LongCat-Video-Avatar 1.0 hears with.

Modules have the names of transformers' Wav2Vec2Model; importing that would take seconds at every start. Unlike it, this
network resamples the features of its convolutions in time before its layers see them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# By their own names, because comfy-test takes the dotted ones for layers of a ComfyUI model.
from torch.nn import Conv1d, GroupNorm, LayerNorm, Linear

from .attention import SelfAttention

KERNELS, STRIDES = (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)
# Samples from one feature to the next, and those that one feature hears.
HOP = math.prod(STRIDES)
FIELD = 1 + sum((kernel - 1) * math.prod(STRIDES[:i]) for i, kernel in enumerate(KERNELS))
# Features that are computed at a time: those of 10 s.
PIECE = 500


@dataclass(frozen=True)
class Wav2Vec2Config:
    """Sizes of a network. conv_widths: channels behind each convolution; position_kernel, position_groups: of the one
    that tells positions apart."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072
    conv_widths: tuple[int, ...] = (512,) * len(KERNELS)
    position_kernel: int = 128
    position_groups: int = 16


class Convolution(nn.Module):
    def __init__(self, channels: int, width: int, kernel: int, stride: int, normed: bool) -> None:
        super().__init__()
        self.conv = Conv1d(channels, width, kernel, stride, bias=False)
        # Every channel by itself, over the whole time.
        self.layer_norm = GroupNorm(width, width) if normed else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.conv(x))


class FeedForward(nn.Module):
    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__()
        self.intermediate_dense = Linear(config.width, config.hidden)
        self.output_dense = Linear(config.hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.output_dense(F.gelu(self.intermediate_dense(x)))


class Layer(nn.Module):
    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__()
        self.attention = SelfAttention(config.width, config.heads, key_bias=True)
        self.layer_norm, self.final_layer_norm = LayerNorm(config.width), LayerNorm(config.width)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer_norm(x + self.attention(x))
        return self.final_layer_norm(x + self.feed_forward(x))


class Convolutions(nn.Module):
    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        parts = zip((1, *widths), widths, KERNELS, STRIDES, strict=False)
        self.conv_layers = nn.ModuleList(Convolution(*part, normed=not i) for i, part in enumerate(parts))

    def forward(self, wave: Tensor) -> Tensor:
        """A sound [1, N] -> features [1, C, about N / 320]. PIECE at a time, as the first outputs fill GiB a minute."""
        layers: list[Any] = list(self.conv_layers)
        weight, bias = _normed(layers[0].conv, layers[0].layer_norm, wave)
        features = []
        for piece in _pieces(wave, FIELD, HOP):
            x = F.gelu(F.conv1d(piece, weight, bias, STRIDES[0]))
            for layer in layers[1:]:
                x = layer(x)
            features.append(x)
        return torch.cat(features, dim=2)


def _normed(conv: Conv1d, norm: GroupNorm, wave: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution whose output is normed too, each channel by mean and variance over all time."""
    count = (wave.shape[1] - KERNELS[0]) // STRIDES[0] + 1
    # Means of the outputs and of their squares.
    mean, square = torch.zeros(2, norm.num_channels, dtype=torch.float64, device=wave.device)
    for piece in _pieces(wave, KERNELS[0], STRIDES[0]):
        x = conv(piece)[0]
        mean += x.sum(1, dtype=torch.float64) / count
        square += x.square().sum(1, dtype=torch.float64) / count
    scale = norm.weight / (square - mean.square() + norm.eps).sqrt()
    return (conv.weight * scale[:, None, None]).float(), (norm.bias - mean * scale).float()


def _pieces(wave: Tensor, field: int, hop: int) -> Iterator[Tensor]:
    """Parts [1, 1, n] of a sound [1, N] that make about PIECE outputs of a convolution which sees `field` samples for
    each output and moves by `hop`."""
    outputs, size = (wave.shape[1] - field) // hop + 1, max(1, PIECE * HOP // hop)
    for start in range(0, outputs, size):
        stop = min(start + size, outputs)
        yield wave[:, None, start * hop : (stop - 1) * hop + field]


class Projection(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.layer_norm, self.projection = LayerNorm(channels), Linear(channels, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(self.layer_norm(x))


class Positions(nn.Module):
    """What tells positions apart: a convolution of what is around each."""

    def __init__(self, width: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.conv = Conv1d(width, width, kernel, padding=kernel // 2, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        # An even kernel makes one position more.
        return F.gelu(self.conv(x.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)


class Layers(nn.Module):
    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__()
        self.pos_conv_embed = Positions(config.width, config.position_kernel, config.position_groups)
        self.layer_norm = LayerNorm(config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))

    def forward(self, x: Tensor) -> Iterator[Tensor]:
        x = self.layer_norm(x + self.pos_conv_embed(x))
        for layer in self.layers:
            x = layer(x)
            yield x


class Wav2Vec2(nn.Module):
    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__()
        self.config = config
        self.feature_extractor = Convolutions(config.conv_widths)
        self.feature_projection = Projection(config.conv_widths[-1], config.width)
        self.encoder = Layers(config)

    def forward(self, wave: Tensor, frames: int) -> Iterator[Tensor]:
        """A sound [1, N] at 16 kHz, of mean 0 and variance 1 -> the output of each layer, [1, frames, D]."""
        x = F.interpolate(self.feature_extractor(wave), frames, mode="linear", align_corners=True)
        return self.encoder(self.feature_projection(x.transpose(1, 2)))


def normalized(wave: Tensor) -> Tensor:
    """A sound [N] as the network takes it, of mean 0 and variance 1, in fp32."""
    return ((wave - wave.mean()) / (wave.var(correction=0) + 1e-7).sqrt()).float()
