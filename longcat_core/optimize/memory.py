"""How much memory the activations of one forward take, counted tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..model.config import ModelConfig


def activation_bytes(config: ModelConfig, latents: Sequence[int], itemsize: int) -> int:
    """Peak bytes that live at once in a forward over latents of shape [B, C, T, H, W], without the weights.

    itemsize: bytes of an activation (2 for bf16). Counted for blocks that are not compiled, without gradients and
    without own kernels (compiled ones, and those of own kernels, need 7 values of C a token at most). Per token and in
    units of C values these live at the worst moment, RoPE on the keys: the block's input, q, k and v fused, q normed
    and rotated, k normed, k rotated: 7 in the activations' dtype; a quarter of the keys in fp32, two products and a
    swapped copy: 4 quarters in fp32, of which fp32 keys save the first. The FFN, cut into pieces, needs less.

    To that come the RoPE tables, in fp32, and the largest weight that is cast to fp32. Self-attention is taken to need
    nothing beyond its output, which holds for flash kernels. What the allocator wastes is not in it.
    """
    batch, _, frames, height, width = latents
    tokens = frames * math.ceil(height / config.patch_size[1]) * math.ceil(width / config.patch_size[2])
    dim = config.hidden_size
    rope = dim * (7 * itemsize + (4 if itemsize < 4 else 3))
    tables = tokens * config.head_dim * 4
    return batch * tokens * rope + tables + 6 * dim * config.adaln_dim * 4


# Measured peak over counted peak of one forward, and 3 % for what the allocator wastes: 1.02 to 1.15 by PyTorch's
# kernels, the smaller the video the more, 0.78 by our own (480p and 720p with and without guidance, H100, 2026-11-23;
# `longcat bench memory` measures it).
MEMORY_FIT, MEMORY_FIT_OWN = 1.1, 0.8
# Of PyTorch's kernels where 8-bit layers quantize what they are given, by three copies of it in fp32: 1.3, followed
# tensor by tensor, and as much more as MEMORY_FIT has.
MEMORY_FIT_QUANTIZING = 1.45


def forward_bytes(
    config: ModelConfig, latents: Sequence[int], itemsize: int, own: bool, eight_bit: bool = False
) -> int:
    """`activation_bytes` as measured. own: the element-wise work is done by `optimize.kernels`. eight_bit: there are
    8-bit layers."""
    fit = MEMORY_FIT_OWN if own else MEMORY_FIT_QUANTIZING if eight_bit else MEMORY_FIT
    return int(activation_bytes(config, latents, itemsize) * fit)


def kv_cache_bytes(config: ModelConfig, latents: int, height: int, width: int, itemsize: int) -> int:
    """Keys and values of `latents` given frames of height x width latents, in every block."""
    tokens = latents * math.ceil(height / config.patch_size[1]) * math.ceil(width / config.patch_size[2])
    return 2 * config.depth * tokens * config.hidden_size * itemsize


def text_bytes(config: ModelConfig, batch: int, tokens: int, itemsize: int) -> int:
    """Keys and values of the text in every block, which `reuse_text` keeps."""
    return 2 * config.depth * batch * tokens * config.hidden_size * itemsize
