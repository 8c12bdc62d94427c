"""Layers of the Wan 2.1 VAE on pictures [B, T, H, W, C], channels last, named as in diffusers' checkpoints.

Every layer works on a part of a clip at a time. What a causal convolution must remember of earlier parts is in a
`Past`, so a clip in parts of any length gives the same numbers as the whole clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# By its own name, because comfy-test takes the dotted one for a layer of a ComfyUI model.
from torch.nn import Conv2d

from ..optimize.kernels import vae as kernels

# x / max(|x|, tiny) in other words: only a pixel of zeros sees this addend.
EPS = 1e-24


class Past:
    """The last frames of what each causal convolution has seen, in the order in which they run.

    kept: those of the part before, as `after` held them at its end; none for the first part.
    """

    def __init__(self, kept: Sequence[Tensor | None] = ()) -> None:
        self._kept = kept
        self.after: list[Tensor | None] = []

    def take(self) -> Tensor | None:
        """The frames of the next convolution; None: there were none."""
        return self._kept[len(self.after)] if len(self.after) < len(self._kept) else None

    def keep(self, frames: Tensor | None) -> None:
        """The frames that this convolution needs for the next part."""
        self.after.append(frames)


class RMSNorm(nn.Module):
    """x / |x| * sqrt(C) * gamma over the channels; `dims` ones follow the channels in gamma's shape."""

    def __init__(self, channels: int, dims: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * dims))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.gamma.flatten(), EPS)


class CausalConv3d(nn.Conv3d):
    """A convolution that sees the frames before, in time without padding: [B, history + T, H, W, C] to [B, T', ...].

    history: frames before the first one that the first output sees. A single frame has no history: zeros.
    """

    def __init__(
        self, channels: int, out_channels: int, kernel: tuple[int, int, int] = (3, 3, 3), stride: int = 1
    ) -> None:
        self.sides = kernel[1] // 2, kernel[2] // 2
        super().__init__(channels, out_channels, kernel, stride=(stride, 1, 1), padding=(0, *self.sides))
        self.history = kernel[0] - stride

    def forward(self, x: Tensor, biased: bool = True) -> Tensor:
        """biased: whether the bias is added; a caller that leaves it out adds it later."""
        taps, bias = self.kernel_size[0], self.bias if biased else None
        # PyTorch convolves in 2-D many times faster than in 3-D on a CPU if there are few channels.
        if taps == 1 or x.shape[1] == 1 or x.device.type == "cpu":
            return self._sum(x, taps, self.stride[0], bias)
        x = F.conv3d(x.permute(0, 4, 1, 2, 3), self.weight, bias, self.stride, self.padding)
        return x.permute(0, 2, 3, 4, 1)

    def _sum(self, x: Tensor, taps: int, step: int, bias: Tensor | None) -> Tensor:
        """The sum of 2-D convolutions, one for each tap in time. Of a single frame only the last tap sees anything."""
        if x.shape[1] < taps:
            return self._pictures(x, -1, bias)
        end = x.shape[1] - taps + 1
        total = self._pictures(x[:, taps - 1 : taps - 1 + end : step], taps - 1, bias)
        for tap in range(taps - 1):
            total += self._pictures(x[:, tap : tap + end : step], tap, None)
        return total

    def _pictures(self, x: Tensor, tap: int, bias: Tensor | None) -> Tensor:
        weight = self.weight[:, :, tap]
        if self.kernel_size[1] == 1:
            return F.linear(x, weight.flatten(1), bias)
        return pictures(x, weight, bias, padding=self.sides)


def pictures(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1, padding: Sequence[int] = (0, 0)
) -> Tensor:
    """The 2-D convolution of every picture: [B, T, H, W, C] to [B, T, H', W', C']."""
    out = F.conv2d(x.flatten(0, 1).permute(0, 3, 1, 2), weight, bias, stride, tuple(padding))
    return out.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])


def normed(norm: RMSNorm, x: Tensor, out: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """silu(norm(x + bias)), written into `out` if that is given."""
    if kernels.usable(x):
        out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
        kernels.norm_silu(x, norm.gamma, bias, out)
        return out
    x = norm(x if bias is None else x + bias)
    if out is None:
        return F.silu(x)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return out.copy_(F.silu(x))
    return torch.ops.aten.silu.out(x, out=out)


def with_past(
    conv: CausalConv3d, past: Past, x: Tensor, norm: RMSNorm | None = None, bias: Tensor | None = None
) -> Tensor:
    """What `conv` is to see: x, or silu(norm(x + bias)), behind the frames of the part before.

    x is written where it belongs at once, and only `history` frames are copied.
    """
    before, frames, history = past.take(), x.shape[1], conv.history
    if before is None and frames == 1:
        x = x if norm is None else normed(norm, x, bias=bias)
        past.keep(F.pad(x, (0, 0, 0, 0, 0, 0, history - 1, 0)))
        return x
    seen = x.new_empty((x.shape[0], history + frames, *x.shape[2:]))
    if before is None:
        seen[:, :history].zero_()
    else:
        seen[:, :history].copy_(before)
    if norm is None:
        seen[:, history:].copy_(x)
    else:
        normed(norm, x, seen[:, history:], bias)
    past.keep(seen[:, -history:].clone())
    return seen


class Residual(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))))))."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(channels, 3)
        self.conv1 = CausalConv3d(channels, out_channels)
        self.norm2 = RMSNorm(out_channels, 3)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        same = channels == out_channels
        self.conv_shortcut = nn.Identity() if same else CausalConv3d(channels, out_channels, (1, 1, 1))

    def forward(self, x: Tensor, past: Past, first: bool) -> Tensor:
        # The kernels add the biases.
        fused = kernels.usable(x)
        h = self.conv1(with_past(self.conv1, past, x, self.norm1), not fused)
        h = self.conv2(with_past(self.conv2, past, h, self.norm2, self.conv1.bias if fused else None), not fused)
        if fused:
            return kernels.add(h, self.conv2.bias, self.conv_shortcut(x))
        out: Tensor = h + self.conv_shortcut(x)
        return out


class Attention(nn.Module):
    """x + attention of each picture to itself, with one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, 2)
        self.to_qkv = Conv2d(channels, channels * 3, 1)
        self.proj = Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = F.linear(self.norm(x), self.to_qkv.weight.flatten(1), self.to_qkv.bias)
        # [B T, 1 head, H W, C] each.
        q, k, v = qkv.flatten(2, 3).flatten(0, 1)[:, None].chunk(3, dim=-1)
        out = F.scaled_dot_product_attention(q, k, v).reshape(x.shape)
        return x + F.linear(out, self.proj.weight.flatten(1), self.proj.bias)


class Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention(channels)])
        self.resnets = nn.ModuleList([Residual(channels, channels) for _ in range(2)])

    def forward(self, x: Tensor, past: Past, first: bool) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, past, first))
        out: Tensor = self.resnets[1](x, past, first)
        return out


class Downsample(nn.Module):
    """Half the height and width and, with `time`, half the frames; the first frame of a clip stays by itself."""

    def __init__(self, channels: int, time: bool) -> None:
        super().__init__()
        self.mode = "downsample3d" if time else "downsample2d"
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), Conv2d(channels, channels, 3, stride=2))
        self.time_conv = CausalConv3d(channels, channels, (3, 1, 1), stride=2) if time else None

    def forward(self, x: Tensor, past: Past, first: bool) -> Tensor:
        spatial: Any = self.resample[1]
        x = pictures(F.pad(x, (0, 0, 0, 1, 0, 1)), spatial.weight, spatial.bias, stride=2)
        if self.time_conv is None:
            return x
        if first:
            past.keep(x)
            return x
        out: Tensor = self.time_conv(with_past(self.time_conv, past, x))
        return out


class Upsample(nn.Module):
    """Twice the height and width, half the channels and, with `time`, twice the frames except the first of a clip."""

    def __init__(self, channels: int, time: bool) -> None:
        super().__init__()
        self.mode = "upsample3d" if time else "upsample2d"
        self.resample = nn.Sequential(nn.Identity(), Conv2d(channels, channels // 2, 3, padding=1))
        self.time_conv = CausalConv3d(channels, channels * 2, (3, 1, 1)) if time else None

    def forward(self, x: Tensor, past: Past, first: bool) -> Tensor:
        x = x[..., None, :]
        if self.time_conv is not None and first:
            # Later frames do not see the first one either.
            past.keep(None)
        elif self.time_conv is not None:
            # Each frame's channels are those of two frames, one after the other.
            x = self.time_conv(with_past(self.time_conv, past, x[..., 0, :])).unflatten(-1, (2, -1))
        batch, frames, height, width, copies, channels = x.shape
        x = x.permute(0, 1, 4, 2, 3, 5)[:, :, :, :, None, :, None]
        x = x.expand(batch, frames, copies, height, 2, width, 2, channels)
        x = x.reshape(batch, frames * copies, 2 * height, 2 * width, channels)
        spatial: Any = self.resample[1]
        return pictures(x, spatial.weight, spatial.bias, padding=(1, 1))
