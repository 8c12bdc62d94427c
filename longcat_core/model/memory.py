"""How much memory the activations of one forward take, counted tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .config import ModelConfig


def activation_bytes(config: ModelConfig, latents: Sequence[int], itemsize: int) -> int:
    """Peak bytes that live at once in a forward over latents of shape [B, C, T, H, W], without the weights.

    itemsize: bytes of an activation (2 for bf16). Per token and in units of C values, whichever is more of

    - RoPE on the keys: the block's input, its modulated copy, q, k and v fused, q and k normed, q rotated and the old
      q and k still held: 9 in the activations' dtype; the fp32 copy of k and the products it is made of: 3 in fp32;
    - the FFN's product: the block's input, x, its modulated copy and one to spare: 4, and gate with up, silu(gate) and
      the product: 4 times the FFN's width.

    To that come the RoPE tables, in fp32, and the largest weight that is cast to fp32. Self-attention is taken to need
    nothing beyond its output, which holds for flash kernels. What the allocator wastes is not in it.
    """
    batch, _, frames, height, width = latents
    tokens = frames * math.ceil(height / config.patch_size[1]) * math.ceil(width / config.patch_size[2])
    dim = config.hidden_size
    rope = dim * (9 * itemsize + 3 * 4)
    ffn = itemsize * (4 * dim + 4 * config.ffn_hidden)
    tables = tokens * config.head_dim * 4
    return batch * tokens * max(rope, ffn) + tables + 6 * dim * config.adaln_dim * 4
