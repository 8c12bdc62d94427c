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


class Rows:
    """Which rows of the pictures a process has: all of them. What lies around them is the zeros of convolutions.

    around: rows of other processes, 0 or 1, that stand above and below the pictures a padded convolution sees. It does
    not pad them then.
    """

    around = 0

    def fill(self, x: Tensor, above: int) -> None:
        """Write the row below those of this process into the last of x [B, T, H, W, C], and with `above` = 1 the row
        above them into the first. What lies outside the picture is zero."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of these rows, [pictures, 1, H W, C], to those of the whole picture."""
        return F.scaled_dot_product_attention(q, k, v)


WHOLE = Rows()


class Past:
    """What a part of a clip does not hold: the last frames that each causal convolution has seen, and other rows.

    kept: those of the part before, as `after` held them at its end, in the order in which convolutions run; none for
    the first part. rows: which rows of the pictures the part has.
    """

    def __init__(self, kept: Sequence[Tensor | None] = (), rows: Rows = WHOLE) -> None:
        self._kept = kept
        self.rows = rows
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

    def around(self, rows: Rows) -> int:
        """Rows of other processes that this convolution is to see above and below; one in time alone sees none."""
        return min(rows.around, self.sides[0])

    def forward(self, x: Tensor, biased: bool = True, around: int = 0) -> Tensor:
        """biased: whether the bias is added; a caller that leaves it out adds it later.

        around: rows above and below that x has already and the convolution need not pad.
        """
        taps, bias, sides = self.kernel_size[0], self.bias if biased else None, (self.sides[0] - around, self.sides[1])
        # PyTorch convolves in 2-D many times faster than in 3-D on a CPU if there are few channels.
        if taps == 1 or x.shape[1] == 1 or x.device.type == "cpu":
            return self._sum(x, taps, self.stride[0], bias, sides)
        x = F.conv3d(x.permute(0, 4, 1, 2, 3), self.weight, bias, self.stride, (0, *sides))
        return x.permute(0, 2, 3, 4, 1)

    def _sum(self, x: Tensor, taps: int, step: int, bias: Tensor | None, sides: Sequence[int]) -> Tensor:
        """The sum of 2-D convolutions, one for each tap in time. Of a single frame only the last tap sees anything."""
        if x.shape[1] < taps:
            return self._pictures(x, -1, bias, sides)
        end = x.shape[1] - taps + 1
        total = self._pictures(x[:, taps - 1 : taps - 1 + end : step], taps - 1, bias, sides)
        for tap in range(taps - 1):
            total += self._pictures(x[:, tap : tap + end : step], tap, None, sides)
        return total

    def _pictures(self, x: Tensor, tap: int, bias: Tensor | None, sides: Sequence[int]) -> Tensor:
        weight = self.weight[:, :, tap]
        if self.kernel_size[1] == 1:
            return F.linear(x, weight.flatten(1), bias)
        return pictures(x, weight, bias, padding=sides)


def pictures(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1, padding: Sequence[int] = (0, 0)
) -> Tensor:
    """The 2-D convolution of every picture: [B, T, H, W, C] to [B, T, H', W', C']."""
    out = F.conv2d(x.flatten(0, 1).permute(0, 3, 1, 2), weight, bias, stride, tuple(padding))
    return out.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])


def normed(norm: RMSNorm, x: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """Write silu(norm(x + bias)) into `out`."""
    if kernels.usable(x):
        kernels.norm_silu(x, norm.gamma, bias, out)
        return
    x = norm(x if bias is None else x + bias)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        out.copy_(F.silu(x))
    else:
        torch.ops.aten.silu.out(x, out=out)


def convolved(
    conv: CausalConv3d,
    past: Past,
    x: Tensor,
    norm: RMSNorm | None = None,
    bias: Tensor | None = None,
    biased: bool = True,
) -> Tensor:
    """`conv` of x, or of silu(norm(x + bias)), behind the frames of the part before and between rows around it.

    x is written where it belongs at once, and only `history` frames are copied. biased: see CausalConv3d.
    """
    before, (batch, frames, height, width, channels) = past.take(), x.shape
    around = conv.around(past.rows)
    # A clip's single frame is convolved without the zeros before it.
    history = 0 if before is None and frames == 1 else conv.history
    seen = x.new_empty((batch, history + frames, height + 2 * around, width, channels))
    if before is None:
        seen[:, :history].zero_()
    else:
        seen[:, :history].copy_(before)
    new = seen[:, history:]
    own = new.narrow(2, around, height)
    if norm is None:
        own.copy_(x)
    else:
        normed(norm, x, own, bias)
    if around:
        past.rows.fill(new, above=around)
    # The last frames, behind zeros if there are fewer; never a view, which would hold the whole part in memory.
    past.keep(F.pad(seen, (0, 0, 0, 0, 0, 0, conv.history - seen.shape[1], 0)))
    out: Tensor = conv(seen, biased, around)
    return out


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
        h = convolved(self.conv1, past, x, self.norm1, biased=not fused)
        h = convolved(self.conv2, past, h, self.norm2, self.conv1.bias if fused else None, biased=not fused)
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

    def forward(self, x: Tensor, rows: Rows = WHOLE) -> Tensor:
        qkv = F.linear(self.norm(x), self.to_qkv.weight.flatten(1), self.to_qkv.bias)
        # [B T, 1 head, H W, C] each.
        q, k, v = qkv.flatten(2, 3).flatten(0, 1)[:, None].chunk(3, dim=-1)
        out = rows.attend(q, k, v).reshape(x.shape)
        return x + F.linear(out, self.proj.weight.flatten(1), self.proj.bias)


class Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention(channels)])
        self.resnets = nn.ModuleList([Residual(channels, channels) for _ in range(2)])

    def forward(self, x: Tensor, past: Past, first: bool) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, past, first), past.rows)
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
        x = F.pad(x, (0, 0, 0, 1, 0, 1))
        past.rows.fill(x, above=0)
        x = pictures(x, spatial.weight, spatial.bias, stride=2)
        if self.time_conv is None:
            return x
        if first:
            past.keep(x)
            return x
        return convolved(self.time_conv, past, x)


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
            x = convolved(self.time_conv, past, x[..., 0, :]).unflatten(-1, (2, -1))
        batch, frames, height, width, copies, channels = x.shape
        around = past.rows.around
        seen = x.new_empty((batch, frames * copies, 2 * (height + around), 2 * width, channels))
        own = seen.narrow(2, around, 2 * height).unflatten(1, (frames, copies))
        own = own.unflatten(3, (height, 2)).unflatten(5, (width, 2))
        own.copy_(x.permute(0, 1, 4, 2, 3, 5)[:, :, :, :, None, :, None])
        if around:
            past.rows.fill(seen, above=around)
        spatial: Any = self.resample[1]
        return pictures(seen, spatial.weight, spatial.bias, padding=(1 - around, 1))
