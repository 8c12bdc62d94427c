"""LongCat-Video as public implementations run it: the baseline against which optimizations are measured.

It makes the same costly choices: separate projections for q, k, v and for w1, w3; norms, RoPE, gates and modulation in
fp32, one operation at a time, under autocast; tokens reshaped between [B, N, C] and [B, T, S, C]; RoPE angles kept on
the host and copied to the device by every block; the text embedded at every step, with keys and values of all its
positions; timesteps embedded for every frame of every sample; FlashAttention-2; torch.compile around the whole network
or not at all. The mathematics is that of `OptimizedTransformer`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import LongCatError
from ..model.block import Block
from ..model.config import ModelConfig
from ..model.layers import timestep_features
from ..model.rope import BASE
from ..optimize import attention as backends
from ..optimize.execution import OptimizedTransformer
from ..optimize.operators import Attend

Grid = tuple[int, int, int]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer on the given weights [out, in], which are not copied."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def _split(layer: nn.Linear, parts: int) -> list[nn.Linear]:
    if type(layer) is not nn.Linear:
        raise LongCatError(
            f"the baseline slices plain linear layers, this model has a {type(layer).__name__}; make the baseline "
            "before the model is quantized"
        )
    biases = [None] * parts if layer.bias is None else layer.bias.chunk(parts)
    return [_linear(weight, bias) for weight, bias in zip(layer.weight.chunk(parts), biases, strict=True)]


def _fp32_autocast(x: Tensor) -> AbstractContextManager:
    # Only CUDA has an autocast to fp32.
    return torch.autocast("cuda", dtype=torch.float32) if x.device.type == "cuda" else nullcontext()


def _autocast_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """A layer inside `_fp32_autocast`: its weights are cast at use."""
    if x.device.type == "cuda":
        return layer(x)
    return F.linear(x.float(), layer.weight.float(), None if layer.bias is None else layer.bias.float())


class HeadNorm(nn.Module):
    """RMSNorm over head_dim in fp32, one operation at a time."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + 1e-6)
        return wide.type_as(x) * self.weight


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    affine = [None if p is None else p.float() for p in (weight, bias)]
    return F.layer_norm(x.float(), x.shape[-1:], *affine, eps=1e-6).to(x.dtype)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x [B, T, S, C] normed, scaled and shifted by fp32 tensors [B, T, 1, C]."""
    wide = layer_norm(x.to(torch.float32))
    return (wide * (scale + 1) + shift).to(x.dtype)


def rope_angles(head_dim: int, grid: Grid) -> Tensor:
    """Angle of every channel of every token, [N, head_dim] fp32 on the host; a pair of channels shares one."""
    spatial = 2 * (head_dim // 6)
    parts = []
    for axis, dim in enumerate((head_dim - 2 * spatial, spatial, spatial)):
        steps = 1.0 / BASE ** (torch.arange(0, dim, 2).float() / dim)
        angles = torch.outer(torch.arange(grid[axis]).float(), steps).repeat_interleave(2, dim=-1)
        shape = [1, 1, 1, dim]
        shape[axis] = grid[axis]
        parts.append(angles.view(shape).expand(*grid, dim))
    return torch.cat(parts, dim=-1).flatten(0, 2)


def quarter_turn(x: Tensor) -> Tensor:
    """Every pair (a, b) of channels becomes (-b, a)."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((-second, first), dim=-1).flatten(-2)


class PlainSelfAttention(nn.Module):
    """Separate q, k, v and proj; heads come before tokens, as in public rotary code."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        source = block.attn
        self.heads = source.num_heads
        self.q, self.k, self.v = _split(source.qkv, 3)
        self.proj = _split(source.proj, 1)[0]
        self.q_norm, self.k_norm = HeadNorm(source.q_norm.weight), HeadNorm(source.k_norm.weight)
        self.angles: dict[Grid, Tensor] = {}

    def forward(self, x: Tensor, grid: Grid, attend: Attend) -> Tensor:
        q, k, v = (layer(x).view(*x.shape[:2], self.heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k = self.q_norm(q), self.k_norm(k)
        angles = self.angles[grid].to(x.device)
        cos, sin = angles.cos()[None, None], angles.sin()[None, None]
        wide_q, wide_k = q.float(), k.float()
        q = (wide_q * cos + quarter_turn(wide_q) * sin).type_as(q)
        k = (wide_k * cos + quarter_turn(wide_k) * sin).type_as(k)
        out = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.proj(out.reshape(x.shape))


class PlainCrossAttention(nn.Module):
    """Attends every position of the text, or with a mask every real one."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        source = block.cross_attn
        self.heads = source.num_heads
        self.q, self.proj = _split(source.q, 1)[0], _split(source.proj, 1)[0]
        self.k, self.v = _split(source.kv, 2)
        self.q_norm, self.k_norm = HeadNorm(source.q_norm.weight), HeadNorm(source.k_norm.weight)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None, attend: Attend) -> Tensor:
        q, k, v = (
            layer(rows).view(*rows.shape[:2], self.heads, -1)
            for layer, rows in ((self.q, x), (self.k, text), (self.v, text))
        )
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
        self.modulation = _split(block.modulation, 1)[0]
        self.attn, self.cross_attn = PlainSelfAttention(block), PlainCrossAttention(block)
        self.norm_weight, self.norm_bias = (
            nn.Parameter(p.detach(), requires_grad=False) for p in (block.cross_norm.weight, block.cross_norm.bias)
        )
        self.w1, self.w3 = _split(block.ffn.gate_up, 2)
        self.w2 = _split(block.ffn.down, 1)[0]

    def forward(
        self, x: Tensor, text: Tensor, mask: Tensor | None, temb: Tensor, grid: Grid, attend: Attend
    ) -> Tensor:
        """Tokens x [B, N, C], text [B, L, C], temb [B, T, adaLN] fp32 -> [B, N, C]."""
        batch, tokens, dim = x.shape
        by_frame = (batch, grid[0], -1, dim)
        with _fp32_autocast(x):
            values = _autocast_linear(self.modulation, F.silu(temb)).unsqueeze(2)
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = values.chunk(6, dim=-1)
        h = modulated(x.view(by_frame), shift_a, scale_a).view(batch, tokens, dim)
        h = self.attn(h, grid, attend)
        with _fp32_autocast(x):
            summed = x + (gate_a * h.view(by_frame)).view(batch, tokens, dim)
        x = summed.to(x.dtype)
        x = x + self.cross_attn(layer_norm(x, self.norm_weight, self.norm_bias), text, mask, attend)
        h = modulated(x.view(by_frame), shift_f, scale_f).view(batch, tokens, dim)
        h = self.w2(F.silu(self.w1(h)) * self.w3(h))
        with _fp32_autocast(x):
            summed = x + (gate_f * h.view(by_frame)).view(batch, tokens, dim)
        return summed.to(x.dtype)


class BaselineTransformer(nn.Module):
    """The plain network on the weights of a loaded `OptimizedTransformer`, sharing their storage."""

    def __init__(self, model: OptimizedTransformer, attention: str | None = None) -> None:
        """attention: a backend's name; None: FlashAttention-2 where there is CUDA and a 16-bit dtype, else SDPA."""
        super().__init__()
        self.config: ModelConfig = model.config
        self.dtype = model.dtype
        weight = model.patch_embed.weight
        self.patch_weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.patch_bias = nn.Parameter(model.patch_embed.bias.detach(), requires_grad=False)
        self.time_embed = nn.ModuleList(_split(layer, 1)[0] for layer in model.time_embed)
        self.text_embed = nn.ModuleList(_split(layer, 1)[0] for layer in model.text_embed)
        self.blocks = nn.ModuleList(PlainBlock(block) for block in model.blocks)
        self.final_modulation = _split(model.final_layer.modulation, 1)[0]
        self.final_linear = _split(model.final_layer.linear, 1)[0]
        if attention is None:
            attention = "sdpa-flash" if weight.device.type == "cuda" and self.dtype in backends.HALF else "sdpa"
        inputs = backends.Inputs(weight.device, self.dtype, self.config.head_dim, False)
        self.attend = backends.resolve(attention, inputs).attend

    def prepare(self, latents: tuple[int, ...]) -> None:
        """RoPE angles for latents [B, C, T, H, W], before the first forward of that size."""
        grid = self._grid(latents)
        if grid not in self.blocks[0].attn.angles:
            angles = rope_angles(self.config.head_dim, grid)
            for block in self.blocks:
                # One copy for each block, as in public implementations.
                block.attn.angles[grid] = angles.clone()

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
        size = self.config.patch_size
        patches = F.conv3d(x.to(self.dtype), self.patch_weight, self.patch_bias, stride=size)
        tokens = patches.flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens, text, attended, temb, grid, self.attend)
        with _fp32_autocast(x):
            values = _autocast_linear(self.final_modulation, F.silu(temb)).unsqueeze(2)
            shift, scale = values.chunk(2, dim=-1)
            tokens = modulated(tokens.view(batch, grid[0], -1, tokens.shape[-1]), shift, scale)
            out = _autocast_linear(self.final_linear, tokens.flatten(1, 2))
        return self._unpatchify(out, grid).float()

    def _unpatchify(self, tokens: Tensor, grid: Grid) -> Tensor:
        """[B, N, patch * C_out] -> [B, C_out, T, H, W]."""
        frames, rows, columns = grid
        _, ph, pw = self.config.patch_size
        out = tokens.view(-1, frames, rows, columns, ph, pw, self.config.out_channels)
        return out.permute(0, 6, 1, 2, 4, 3, 5).reshape(-1, out.shape[-1], frames, rows * ph, columns * pw)
