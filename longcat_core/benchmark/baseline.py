"""LongCat-Video as public implementations run it: the baseline against which optimizations are measured.

It makes the same costly choices: separate projections for q, k, v and for w1, w3; norms, RoPE, gates and modulation in
fp32, one operation at a time, under autocast; tokens reshaped between [B, N, C] and [B, T, S, C]; RoPE angles kept on
the host and copied to the device by every block; the text embedded at every step, with keys and values of all its
positions; timesteps embedded for every frame of every sample; FlashAttention-2; torch.compile around the whole network
or not at all. The mathematics is that of `model.ops.PlainOps`.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, autocast, nn

from ..errors import LongCatError
from ..model.block import Block
from ..model.layers import EPS, linear_fp32, timestep_features
from ..model.rope import rope_angles
from ..optimize import attention as backends
from ..optimize.operators import Attend
from ..optimize.optimized import OptimizedTransformer

Grid = tuple[int, int, int]
Module = TypeVar("Module", bound=nn.Module)


def _shared(module: Module) -> Module:
    """A copy of a module on the same weights, without gradients."""
    return copy.deepcopy(module, {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()})


def _split(layer: nn.Linear, parts: int = 1) -> list[nn.Linear]:
    """Layers on equal slices of a layer's weights, which are not copied."""
    if type(layer) is not nn.Linear:
        raise LongCatError(
            f"the baseline slices plain linear layers, this model has a {type(layer).__name__}; make the baseline "
            "before the model is quantized"
        )
    slices = [_shared(layer) for _ in range(parts)]
    for name, whole in layer.named_parameters():
        for piece, values in zip(slices, whole.detach().chunk(parts), strict=True):
            setattr(piece, name, nn.Parameter(values, requires_grad=False))
    return slices


def _fp32_autocast(x: Tensor) -> AbstractContextManager:
    # Only CUDA has an autocast to fp32.
    return autocast("cuda", dtype=torch.float32) if x.device.type == "cuda" else nullcontext()


def _autocast_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """A layer inside `_fp32_autocast`: its weights are cast at use."""
    return layer(x) if x.device.type == "cuda" else linear_fp32(layer, x)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x [B, T, S, C] normed, scaled and shifted by fp32 tensors [B, T, 1, C], one operation at a time."""
    wide = F.layer_norm(x.float(), x.shape[-1:], eps=EPS)
    return (wide * (scale + 1) + shift).to(x.dtype)


def quarter_turn(x: Tensor) -> Tensor:
    """Every pair (a, b) of channels becomes (-b, a)."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((-second, first), dim=-1).flatten(-2)


class PlainAttention(nn.Module):
    """Separate q, k, v and proj, on the weights of a block's attention; qkv: where they come from."""

    def __init__(self, source: Any, qkv: list[nn.Linear]) -> None:
        super().__init__()
        self.heads, (self.q, self.k, self.v), (self.proj,) = source.num_heads, qkv, _split(source.proj)
        self.q_norm, self.k_norm = _shared(source.q_norm), _shared(source.k_norm)
        self.angles: dict[Grid, Tensor] = {}

    def own(self, x: Tensor, grid: Grid, attend: Attend) -> Tensor:
        """Attention of x [B, N, C] to itself; heads come before tokens, as in public rotary code."""
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k = self.q_norm(q), self.k_norm(k)
        angles = self.angles[grid].to(x.device)
        cos, sin = angles.cos()[None, None], angles.sin()[None, None]
        wide_q, wide_k = q.float(), k.float()
        q = (wide_q * cos + quarter_turn(wide_q) * sin).type_as(q)
        k = (wide_k * cos + quarter_turn(wide_k) * sin).type_as(k)
        out = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.proj(out.reshape(x.shape))

    def to_text(self, x: Tensor, text: Tensor, mask: Tensor | None, attend: Attend) -> Tensor:
        """Attention to every position of the text, or with a mask to every real one."""
        layers = (self.q, x), (self.k, text), (self.v, text)
        q, k, v = (layer(rows).unflatten(-1, (self.heads, -1)) for layer, rows in layers)
        q, k = self.q_norm(q), self.k_norm(k)
        if mask is None:
            out = attend(q, k, v)
        else:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None]).transpose(1, 2)
        return self.proj(out.reshape(x.shape))


class PlainBlock(nn.Module):
    def __init__(self, block: Block) -> None:
        super().__init__()
        cross = block.cross_attn
        self.attn = PlainAttention(block.attn, _split(block.attn.qkv, 3))
        self.cross_attn = PlainAttention(cross, [*_split(cross.q), *_split(cross.kv, 2)])
        (self.modulation,), self.cross_norm = _split(block.modulation), _shared(block.cross_norm)
        (self.w1, self.w3), (self.w2,) = _split(block.ffn.gate_up, 2), _split(block.ffn.down)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None, temb: Tensor, grid: Grid, attend: Attend) -> Tensor:
        """Tokens x [B, N, C], text [B, L, C], temb [B, T, adaLN] fp32 -> [B, N, C]."""
        batch, tokens, dim = x.shape
        by_frame = (batch, grid[0], -1, dim)
        with _fp32_autocast(x):
            values = _autocast_linear(self.modulation, F.silu(temb)).unsqueeze(2)
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = values.chunk(6, dim=-1)
        h = modulated(x.view(by_frame), shift_a, scale_a).view(batch, tokens, dim)
        h = self.attn.own(h, grid, attend)
        with _fp32_autocast(x):
            summed = x + (gate_a * h.view(by_frame)).view(batch, tokens, dim)
        x = summed.to(x.dtype)
        x = x + self.cross_attn.to_text(self.cross_norm(x), text, mask, attend)
        h = modulated(x.view(by_frame), shift_f, scale_f).view(batch, tokens, dim)
        h = self.w2(F.silu(self.w1(h)) * self.w3(h))
        with _fp32_autocast(x):
            summed = x + (gate_f * h.view(by_frame)).view(batch, tokens, dim)
        return summed.to(x.dtype)


class BaselineTransformer(nn.Module):
    """The plain network on the weights of a loaded `OptimizedTransformer`, sharing their storage."""

    def __init__(self, model: OptimizedTransformer) -> None:
        """Attention is FlashAttention-2 where there is CUDA and a 16-bit dtype, else SDPA."""
        super().__init__()
        self.config, self.dtype = model.config, model.dtype
        self.patch_embed = _shared(model.patch_embed)
        self.time_embed: Any = nn.ModuleList(_split(layer)[0] for layer in model.time_embed)
        self.text_embed: Any = nn.ModuleList(_split(layer)[0] for layer in model.text_embed)
        self.blocks: Any = nn.ModuleList(PlainBlock(block) for block in model.blocks)
        (self.final_modulation,), (self.final_linear,) = map(
            _split, (model.final_layer.modulation, model.final_layer.linear)
        )
        device = self.patch_embed.weight.device
        name = "sdpa-flash" if device.type == "cuda" and self.dtype in backends.HALF else "sdpa"
        self.attend = backends.resolve(name, backends.Inputs(device, self.dtype, self.config.head_dim, False)).attend

    def prepare(self, latents: tuple[int, ...]) -> None:
        """RoPE angles for latents [B, C, T, H, W], before the first forward of that size."""
        grid = self._grid(latents)
        for block in self.blocks:
            if grid not in block.attn.angles:
                # One copy for each block, and an angle for each channel, as in public implementations.
                block.attn.angles[grid] = rope_angles(self.config.head_dim, *grid).repeat_interleave(2, dim=-1)

    def _grid(self, latents: tuple[int, ...]) -> Grid:
        _, ph, pw = self.config.patch_size
        return latents[2], latents[3] // ph, latents[4] // pw

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Latents x [B, C_in, T, H, W], timestep [B] or [B, T], text [B, L, caption] and mask [B, L] -> x0 - noise."""
        grid, batch = self._grid(x.shape), x.shape[0]
        if timestep.ndim == 1:
            timestep = timestep.unsqueeze(1).expand(-1, grid[0])
        features = timestep_features(timestep.to(self.dtype).float().flatten(), self.config.frequency_dim)
        first, second = self.time_embed
        with _fp32_autocast(x):
            temb = _autocast_linear(second, F.silu(_autocast_linear(first, features))).view(batch, grid[0], -1)
        first, second = self.text_embed
        text = second(F.gelu(first(context.to(self.dtype)), approximate="tanh"))
        attended = None
        if mask is not None and self.config.text_tokens_zero_pad:
            text = text * mask[..., None].to(text.dtype)
        elif mask is not None:
            attended = mask != 0
        size, patch = self.config.patch_size, self.patch_embed
        # As the convolution that it is in public code.
        tokens = F.conv3d(x.to(self.dtype), patch.weight, patch.bias, stride=size).flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens, text, attended, temb, grid, self.attend)
        with _fp32_autocast(x):
            values = _autocast_linear(self.final_modulation, F.silu(temb)).unsqueeze(2)
            shift, scale = values.chunk(2, dim=-1)
            tokens = modulated(tokens.view(batch, grid[0], -1, tokens.shape[-1]), shift, scale)
            out = _autocast_linear(self.final_linear, tokens.flatten(1, 2))
        (t, h, w), (_, ph, pw) = grid, size
        pattern = "b (t h w) (ph pw c) -> b c t (h ph) (w pw)"
        return rearrange(out, pattern, t=t, h=h, w=w, ph=ph, pw=pw).float()
