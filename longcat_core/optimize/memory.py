"""Memory of the activations of one forward pass, counted tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..model.config import ModelConfig


def activation_bytes(config: ModelConfig, latents: Sequence[int], itemsize: int) -> int:
    """Peak bytes that are live at once in a forward over latents of shape [B, C, T, H, W], without the weights.

    itemsize: bytes of an activation (2 for bf16). Counted for uncompiled blocks without gradients and without our
    kernels; compiled blocks and our kernels need at most 7 C values per token. At the worst moment, RoPE on the keys,
    these are live per token, in units of C values: the block's input, q, k and v fused, q normed and rotated, k normed,
    k rotated: 7 in the activations' dtype; a quarter of the keys in fp32, two products and a swapped copy: 4 quarters
    in fp32, of which fp32 keys save the first. The FFN, cut into pieces, needs less.

    Added are the RoPE tables in fp32 and the largest weight that is cast to fp32. Self-attention is assumed to need
    nothing beyond its output, which holds for flash kernels. What the allocator wastes is not included.
    """
    batch, _, frames, height, width = latents
    tokens = frames * math.ceil(height / config.patch_size[1]) * math.ceil(width / config.patch_size[2])
    dim = config.hidden_size
    rope = dim * (7 * itemsize + (4 if itemsize < 4 else 3))
    tables = tokens * config.head_dim * 4
    return batch * tokens * rope + tables + 6 * dim * config.adaln_dim * 4


# Measured peak of one forward over the counted one, plus 3 % for what the allocator wastes. Measured: 1.02 to 1.15 with
# PyTorch's kernels, more for smaller videos, and 0.78 with ours (480p and 720p with and without guidance, H100,
# 2026-11-23; `longcat bench memory` measures it).
MEMORY_FIT, MEMORY_FIT_OWN = 1.1, 0.8
# With PyTorch's kernels and 8-bit layers, which quantize their input by three copies in fp32: 1.3 counted tensor by
# tensor, with the same margin as MEMORY_FIT.
MEMORY_FIT_QUANTIZING = 1.45


def forward_bytes(
    config: ModelConfig, latents: Sequence[int], itemsize: int, own: bool, eight_bit: bool = False
) -> int:
    """`activation_bytes` as measured. own: our kernels do the element-wise work. eight_bit: some layers are 8-bit."""
    fit = MEMORY_FIT_OWN if own else MEMORY_FIT_QUANTIZING if eight_bit else MEMORY_FIT
    return int(activation_bytes(config, latents, itemsize) * fit)


def kv_cache_bytes(config: ModelConfig, latents: int, height: int, width: int, itemsize: int) -> int:
    """Keys and values of `latents` conditioning frames of height x width latents, in all blocks."""
    tokens = latents * math.ceil(height / config.patch_size[1]) * math.ceil(width / config.patch_size[2])
    return 2 * config.depth * tokens * config.hidden_size * itemsize


def audio_rows(config: ModelConfig, frames: int, speakers: int) -> int:
    """Audio tokens of all speakers in `frames` latent frames; 0 for a network that does not hear."""
    return 0 if config.audio is None else config.audio.tokens * frames * speakers


def text_bytes(config: ModelConfig, batch: int, tokens: int, itemsize: int) -> int:
    """Keys and values of the tokens of text and audio in all blocks, which `reuse_text` keeps."""
    return 2 * config.depth * batch * tokens * config.hidden_size * itemsize
