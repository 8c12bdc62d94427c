"""The layers that the blocks are made of, and the arithmetic that they share."""

from __future__ import annotations

import math
from collections.abc import Container
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

EPS = 1e-6


def timestep_features(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal features [..., dim] fp32 of timesteps t [...] in 0..1000, cosines first (DDPM, arXiv 2006.11239)."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[..., None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def linear_fp32(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer in fp32, regardless of its weights' dtype (the fp32 islands of the model)."""
    bias = None if layer.bias is None else layer.bias.float()
    out = F.linear(x.float(), layer.weight.float(), bias)
    # An adapter (a LoRA applied at run time) adds its own change.
    change = getattr(layer, "lora_change", None)
    return out if change is None else out + change(x.float())


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights, then scale and shift; fp32 inside, back in x's dtype.

    x [B, T, S, C]; shift, scale [B or 1, T or 1, 1, C] fp32.
    """
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=EPS)
    # One operation: a separate product would be another fp32 copy of the tokens.
    return torch.addcmul(shift, normed, 1 + scale).to(x.dtype)


def gated(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """x + gate * update, summed in fp32, back in x's dtype. x, update [B, T, S, C]; gate as `modulate` has it."""
    return torch.addcmul(x.float(), gate, update.float()).to(x.dtype)


def affine(
    norm: Norm, device: torch.device, dtype: torch.dtype, kept: Container[torch.dtype] = ()
) -> tuple[Tensor, ...]:
    """Weight and, if it has one, bias [C] of a norm on `device`: in `dtype`, or uncast if theirs is one of `kept`."""
    parameters = (norm.weight,) if norm.bias is None else (norm.weight, norm.bias)
    return tuple(p.to(device, p.dtype if p.dtype in kept else dtype) for p in parameters)


class Norm(nn.Module):
    """What norms share: definitions and kernels read their parameters through `affine` alone, because an owner may
    keep them in any dtype, on another device, or patch them at use. Its `operations` then carry another `affine`."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, operations: Any = nn) -> None:
        super().__init__()
        self._affine = getattr(operations, "affine", affine)

    def affine(self, device: torch.device, dtype: torch.dtype, kept: Container[torch.dtype] = ()) -> tuple[Tensor, ...]:
        """See the function `affine`."""
        return self._affine(self, device, dtype, kept)


class RMSNorm(Norm):
    """x / rms(x) over the last axis in fp32, cast back, then times the weight (in that order)."""

    def __init__(
        self,
        dim: int,
        eps: float = EPS,
        dtype: torch.dtype | None = None,
        device: Any = None,
        operations: Any = nn,
    ) -> None:
        super().__init__(operations)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, dtype=dtype, device=device))
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        del x32
        (weight,) = self.affine(x.device, x.dtype)
        return normed.to(x.dtype) * weight


class LayerNorm(Norm):
    """LayerNorm over C in fp32, back in x's dtype. Weight and bias [C]."""

    def __init__(
        self,
        dim: int,
        eps: float = EPS,
        dtype: torch.dtype | None = None,
        device: Any = None,
        operations: Any = nn,
    ) -> None:
        super().__init__(operations)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(dim, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.affine(x.device, torch.float32)
        return F.layer_norm(x.float(), x.shape[-1:], weight, bias, self.eps).to(x.dtype)


class Patches:
    """Mixed into an nn.Conv3d whose kernels do not overlap: one matrix product, whose output has the order of tokens
    (convolution kernels want other orders and would copy the latents twice)."""

    kernel_size: tuple[int, int, int]

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """x [B, C_in, T, H, W] -> [B, C, t, h, w] as a view of [B, t, h, w, C]."""
        t, h, w = self.kernel_size
        patches = rearrange(x, "b c (t pt) (h ph) (w pw) -> b t h w (c pt ph pw)", pt=t, ph=h, pw=w)
        return F.linear(patches, weight.flatten(1), bias).permute(0, 4, 1, 2, 3)
