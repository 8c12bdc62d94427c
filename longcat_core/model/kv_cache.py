"""Keys and values of conditioning frames, which no step, prompt or noise changes."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import ModelConfig
from .rope import apply_rope, rope_table


class KVCache:
    """Pre-allocated self-attention keys and values of the clean conditioning frames, for every block.

    Filled by one pass of the network over the conditioning latents, then read at every step. Keys arrive after
    k_norm and before RoPE; `rotate` applies RoPE once, in place, since conditioning frames always stand at
    positions 0..n-1. A batch-1 cache serves any batch (both halves of classifier-free guidance).

    k, v: [depth, batch, tokens, heads, head_dim] in the network's dtype.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_latents: int,
        height: int,
        width: int,
        *,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """`height` and `width` count tokens, not latents; `num_latents` counts conditioning latent frames."""
        self.grid = (num_latents, height, width)
        self.head_dim = config.head_dim
        shape = (config.depth, batch, num_latents * height * width, config.num_heads, config.head_dim)
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty(shape, dtype=dtype, device=device)
        self.rotated = False

    @property
    def num_latents(self) -> int:
        return self.grid[0]

    def store(self, block: int, k: Tensor, v: Tensor) -> None:
        """Keep one block's keys (before RoPE) and values, each [batch, tokens, heads, head_dim]."""
        self.k[block].copy_(k)
        self.v[block].copy_(v)

    def rotate(self) -> None:
        """Apply RoPE to all keys, once; further calls do nothing."""
        if self.rotated:
            return
        cos, sin = rope_table(self.head_dim, *self.grid, 0, self.k.device)
        for k in self.k:
            k.copy_(apply_rope(k, cos, sin))
        self.rotated = True

    def read(self, block: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a block on the device of `like` [B, ...], for its batch.

        A batch-1 cache is expanded without a copy; one of b videos serves m*b samples in the order of
        torch.cat([latents] * m), which is how guidance stacks its halves.
        """
        k = self.k[block].to(like.device, non_blocking=True)
        v = self.v[block].to(like.device, non_blocking=True)
        if k.shape[0] == 1:
            return k.expand(like.shape[0], -1, -1, -1), v.expand(like.shape[0], -1, -1, -1)
        repeats = (like.shape[0] // k.shape[0], 1, 1, 1)
        return k.repeat(repeats), v.repeat(repeats)

    def to(self, device: torch.device | str) -> KVCache:
        """Move the buffers, for instance to "cpu" to free GPU memory; `read` fetches a block at a time."""
        self.k = self.k.to(device)
        self.v = self.v.to(device)
        return self

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes
