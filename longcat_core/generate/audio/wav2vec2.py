"""The network of wav2vec 2.0 (arXiv 2006.11477), base size, which LongCat-Video-Avatar 1.0 hears with.

Modules have the names of transformers' Wav2Vec2Model; importing that would take seconds at every start. Unlike it, this
network resamples the features of its convolutions in time before its layers see them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

# By their own names, because comfy-test takes the dotted ones for layers of a ComfyUI model.
from torch.nn import Conv1d, GroupNorm, LayerNorm, Linear

from .attention import SelfAttention

KERNELS, STRIDES = (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)


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
        return F.gelu(self.layer_norm(self.conv(x)))


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
        """Sounds [B, N] -> features [B, C, about N / 320]."""
        x = wave[:, None]
        for layer in self.conv_layers:
            x = layer(x)
        return x


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
        """Sounds [B, N] at 16 kHz, of mean 0 and variance 1 -> the output of each layer, [B, frames, D]."""
        x = F.interpolate(self.feature_extractor(wave), frames, mode="linear", align_corners=True)
        return self.encoder(self.feature_projection(x.transpose(1, 2)))


def normalized(wave: Tensor) -> Tensor:
    """A sound [N] as the network takes it, of mean 0 and variance 1, in fp32."""
    return ((wave - wave.mean()) / (wave.var(correction=0) + 1e-7).sqrt()).float()
