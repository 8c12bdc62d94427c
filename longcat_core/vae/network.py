"""The Wan 2.1 VAE's encoder and decoder, each a row of stages that take a clip in parts of any length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .layers import WHOLE, CausalConv3d, Downsample, Middle, Past, Residual, RMSNorm, Rows, Upsample, convolved

# Of a residual block: its input, what the convolution sees, and what it gives.
LIVE = 3
# Where diffusers spells a field in another way.
SPELLED = {"temporal_downsample": "temperal_downsample"}


@dataclass(frozen=True)
class VAEConfig:
    """The shape of a VAE, in the words of diffusers' AutoencoderKLWan; decoder_base_dim None: the encoder's.

    dim_mult: channels of each level over base_dim. temporal_downsample: between which levels the encoder halves the
    frames too. latents_mean, latents_std: of each latent channel.
    """

    base_dim: int
    z_dim: int
    latents_mean: Sequence[float]
    latents_std: Sequence[float]
    decoder_base_dim: int | None = None
    in_channels: int = 3
    out_channels: int = 3
    dim_mult: Sequence[int] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: Sequence[bool] = (False, True, True)

    def keys(self) -> list[str]:
        """The names in a config.json of diffusers, which `dict` of this gives."""
        return [SPELLED.get(field.name, field.name) for field in fields(self)]

    def __getitem__(self, key: str) -> Any:
        return getattr(self, {spelled: name for name, spelled in SPELLED.items()}.get(key, key))


class Encoder(nn.Module):
    """Pictures [B, F, H, W, 3] to twice z_dim channels [B, T, H/8, W/8, 2 z_dim]."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.base_dim * factor for factor in (1, *config.dim_mult)]
        self.conv_in = CausalConv3d(config.in_channels, widths[0])
        self.down_blocks = nn.ModuleList()
        # Where the stages end in down_blocks.
        self._ends = []
        for level, (width, out) in enumerate(pairwise(widths)):
            self.down_blocks.extend(Residual(out if i else width, out) for i in range(config.num_res_blocks))
            if level < len(config.temporal_downsample):
                self.down_blocks.append(Downsample(out, config.temporal_downsample[level]))
            self._ends.append(len(self.down_blocks))
        self.mid_block = Middle(widths[-1])
        self.norm_out = RMSNorm(widths[-1], 3)
        self.conv_out = CausalConv3d(widths[-1], 2 * config.z_dim)

    @property
    def stages(self) -> int:
        return len(self._ends)

    def live(self, number: int, height: int, width: int) -> int:
        """About how many numbers are live at once for one frame [height, width] at the input of a stage."""
        widths = [layer.norm2.gamma.numel() for layer in self.down_blocks if isinstance(layer, Residual)]
        return LIVE * height * width * widths[number * len(widths) // self.stages]

    def stage(self, number: int, x: Tensor, past: Past, first: bool) -> Tensor:
        """Stage `number` of a part of a clip. first: whether the part is the clip's first frame."""
        if number == 0:
            x = convolved(self.conv_in, past, x)
        begin = self._ends[number - 1] if number else 0
        for layer in self.down_blocks[begin : self._ends[number]]:
            x = layer(x, past, first)
        if number == self.stages - 1:
            x = self.mid_block(x, past, first)
            x = convolved(self.conv_out, past, x, self.norm_out)
        return x


class UpBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int, blocks: int, time: bool | None) -> None:
        """time: whether frames double too; None: the last block, which keeps its size."""
        super().__init__()
        self.resnets = nn.ModuleList(Residual(out_channels if i else channels, out_channels) for i in range(blocks))
        self.upsamplers = None if time is None else nn.ModuleList([Upsample(out_channels, time)])

    def forward(self, x: Tensor, past: Past, first: bool) -> Tensor:
        for layer in self.resnets:
            x = layer(x, past, first)
        return x if self.upsamplers is None else self.upsamplers[0](x, past, first)


class Decoder(nn.Module):
    """Latents [B, T, h, w, z_dim] to pictures [B, F, 8h, 8w, 3], about -1..1."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        base = config.decoder_base_dim or config.base_dim
        widths = [base * factor for factor in (config.dim_mult[-1], *reversed(config.dim_mult))]
        times = [*reversed(config.temporal_downsample), None]
        self.conv_in = CausalConv3d(config.z_dim, widths[0])
        self.mid_block = Middle(widths[0])
        self.up_blocks = nn.ModuleList()
        for level, (width, out) in enumerate(pairwise(widths)):
            # An upsampler has halved the channels.
            width = width // 2 if level else width
            self.up_blocks.append(UpBlock(width, out, config.num_res_blocks + 1, times[level]))
        self.norm_out = RMSNorm(widths[-1], 3)
        self.conv_out = CausalConv3d(widths[-1], config.out_channels)

    @property
    def stages(self) -> int:
        return len(self.up_blocks)

    def live(self, number: int, height: int, width: int) -> int:
        """About how many numbers are live at once for one frame [height, width] at the input of a stage."""
        block: Any = self.up_blocks[number]
        channels = block.resnets[0].norm2.gamma.numel()
        if block.upsamplers is None:
            return LIVE * height * width * channels
        # The input, the enlarged copy of it, and what is convolved from that.
        copies = 4 * (1 if block.upsamplers[0].time_conv is None else 2)
        return (1 + copies + copies // 2) * height * width * channels

    def stage(self, number: int, x: Tensor, past: Past, first: bool) -> Tensor:
        """Stage `number` of a part of a clip. first: whether the part is the clip's first latent frame."""
        if number == 0:
            x = self.mid_block(convolved(self.conv_in, past, x), past, first)
        x = self.up_blocks[number](x, past, first)
        if number == self.stages - 1:
            x = convolved(self.conv_out, past, x, self.norm_out)
        return x


class WanVAE(nn.Module):
    """The whole VAE under diffusers' names. `parts` runs it."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, (1, 1, 1))
        self.post_quant_conv = CausalConv3d(config.z_dim, config.z_dim, (1, 1, 1))
        self.decoder = Decoder(config)


def run_stage(
    coder: Encoder | Decoder,
    number: int,
    x: Tensor,
    kept: Sequence[Tensor | None],
    first: bool,
    rows: Rows = WHOLE,
) -> tuple[Tensor, list[Tensor | None]]:
    """A stage as a function over tensors, which can be compiled: its output and what it keeps for the next part."""
    past = Past(kept, rows)
    return coder.stage(number, x, past, first), past.after


def channels_last(model: nn.Module) -> None:
    """Lay the weights of convolutions out as their pictures are, which spares cuDNN a copy at every call."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv3d):
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last_3d)
        elif isinstance(layer, nn.Conv2d):
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
