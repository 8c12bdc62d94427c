"""The UMT5 encoder's network (arXiv 2304.09151), which is T5's (arXiv 1910.10683) with a position bias in every block.

Modules have the names of transformers' UMT5EncoderModel, and results are its own bit for bit; importing it would take
seconds at every start.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# By its own name, because comfy-test takes the dotted one for a layer of a ComfyUI model.
from torch.nn import Linear


@dataclass(frozen=True)
class Umt5Config:
    """Sizes of an encoder, by transformers' names."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6


class RMSNorm(nn.Module):
    """In fp32 for any input; the output has the weight's dtype."""

    def __init__(self, config: Umt5Config) -> None:
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.empty(config.d_model)), config.layer_norm_epsilon

    def forward(self, x: Tensor) -> Tensor:
        normed = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.epsilon)
        return self.weight * normed.to(self.weight.dtype)


class SelfAttention(nn.Module):
    def __init__(self, config: Umt5Config) -> None:
        super().__init__()
        self.heads, inner = config.num_heads, config.num_heads * config.d_kv
        self.q, self.k, self.v = (Linear(config.d_model, inner, bias=False) for _ in range(3))
        self.o = Linear(inner, config.d_model, bias=False)
        self.relative_attention_bias = _table(config.relative_attention_num_buckets, config.num_heads)

    def forward(self, x: Tensor, buckets: Tensor, mask: Tensor | None) -> Tensor:
        """x [B, N, D], buckets [N, N], mask [B, 1, 1, N] or None -> [B, N, D]."""
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        bias = self.relative_attention_bias(buckets).permute(2, 0, 1)[None]
        if mask is not None:
            bias = torch.where(mask, bias, torch.finfo(k.dtype).min)
        # T5 does not scale the products.
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.contiguous(), scale=1.0)
        return self.o(out.transpose(1, 2).flatten(-2))


class GatedFeedForward(nn.Module):
    def __init__(self, config: Umt5Config) -> None:
        super().__init__()
        self.wi_0, self.wi_1 = (Linear(config.d_model, config.d_ff, bias=False) for _ in range(2))
        self.wo = Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.wi_0(x)
        # GELU by its tanh formula (arXiv 1606.08415), rounded after every operation as in transformers.
        gate = 0.5 * gate * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (gate + 0.044715 * torch.pow(gate, 3.0))))
        # In fp16 the last layer is fp32.
        return self.wo((gate * self.wi_1(x)).to(self.wo.weight.dtype))


class Normed(nn.Module):
    """A layer of a block behind its norm, under transformers' name of that layer."""

    def __init__(self, config: Umt5Config, name: str, layer: nn.Module) -> None:
        super().__init__()
        self.name, self.layer_norm = name, RMSNorm(config)
        self.add_module(name, layer)

    def forward(self, x: Tensor, *more: Tensor | None) -> Tensor:
        return _within_fp16(x + self.get_submodule(self.name)(self.layer_norm(x), *more))


class Block(nn.Module):
    def __init__(self, config: Umt5Config) -> None:
        super().__init__()
        attention = Normed(config, "SelfAttention", SelfAttention(config))
        self.layer = nn.ModuleList([attention, Normed(config, "DenseReluDense", GatedFeedForward(config))])

    def forward(self, x: Tensor, buckets: Tensor, mask: Tensor | None) -> Tensor:
        return self.layer[1](self.layer[0](x, buckets, mask))


class Stack(nn.Module):
    def __init__(self, config: Umt5Config) -> None:
        super().__init__()
        self.config = config
        self.block = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_layer_norm = RMSNorm(config)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        where = self.where(mask)
        for block in self.block:
            x = block(x, *where)
        return self.final_layer_norm(x)

    def where(self, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """Buckets and mask that every block takes, of a mask [B, N]."""
        # Attention is faster, and rounds otherwise, without a mask.
        return _buckets(mask.shape[1], self.config, mask.device), None if mask.all() else mask.bool()[:, None, None]


class Umt5Encoder(nn.Module):
    """Embedded tokens [B, N, D] and mask [B, N] (1: token) -> hidden states [B, N, D]."""

    def __init__(self, config: Umt5Config) -> None:
        super().__init__()
        self.config, self.shared, self.encoder = config, _table(config.vocab_size, config.d_model), Stack(config)

    def forward(self, embedded: Tensor, mask: Tensor) -> Tensor:
        return self.encoder(embedded, mask)


def _table(rows: int, columns: int) -> nn.Embedding:
    # Drawing numbers on the meta device, as nn.Embedding itself does, imports PyTorch's compiler.
    return nn.Embedding.from_pretrained(torch.empty(rows, columns), freeze=False)


def _buckets(length: int, config: Umt5Config, device: torch.device) -> Tensor:
    """The bucket of each key's distance to each query, [N, N]: exact up to a quarter of all, then logarithmic."""
    at = torch.arange(length, device=device)
    distance = at[None] - at[:, None]
    half, distance, later = config.relative_attention_num_buckets // 2, distance.abs(), (distance > 0).long()
    exact = half // 2
    share = torch.log(distance.float() / exact) / math.log(config.relative_attention_max_distance / exact)
    far = (exact + (share * (half - exact)).long()).clamp(max=half - 1)
    return later * half + torch.where(distance < exact, distance, far)


def _within_fp16(x: Tensor) -> Tensor:
    """Infinity as fp16's largest numbers, as transformers does between layers."""
    if x.dtype != torch.float16:
        return x
    largest = torch.finfo(x.dtype).max
    bound = torch.where(x.isinf().any(), largest - 1000, largest)
    return x.clamp(-bound, bound)
