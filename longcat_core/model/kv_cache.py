"""Keys and values of conditioning frames, which no step, prompt or noise changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ..errors import LongCatError
from .config import ModelConfig
from .rope import apply_rope, referenced_table, rope_table

KVMode = Literal["exact", "official", "off"]
KV_MODES: tuple[KVMode, ...] = get_args(KVMode)


def check_mode(mode: str) -> None:
    """Raise LongCatError for a mode that is not one of KV_MODES."""
    if mode not in KV_MODES:
        raise LongCatError(f"unknown KV cache mode {mode!r}; choose one of {', '.join(KV_MODES)}")


class Reference(NamedTuple):
    """How a clean frame in front of all others, which shows who the video is about, enters self-attention.

    position: its RoPE position in time, any whole number; the clean frames behind it start at 0. skip: noisy frames
    whose position is at most this far from it do not see it, unless that range sticks out of the noisy frames: then all
    do, as in the public code. 0: all do.
    """

    position: int = 10
    skip: int = 3


class KVCache:
    """Pre-allocated self-attention keys and values of the clean conditioning frames, for every block.

    One pass of the network over the conditioning latents fills it; then it is read at every step. Keys arrive after
    k_norm and before RoPE; `rotate` applies RoPE once, in place, since conditioning frames always have positions
    0..n-1, or with a reference frame in front its position and then 0..n-2. A batch-1 cache serves any batch (all parts
    of guidance).

    k, v: [depth, batch, tokens, heads, head_dim] in the network's dtype. out: the network's output for these frames,
    [batch, C, n, H, W] fp32, which does not depend on step or prompt; guidance sums over all frames need it.

    `optimize.kv_offload` has a subclass with buffers in pinned CPU memory.
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
        reference: int | None = None,
    ) -> None:
        """`height` and `width` count tokens, not latents; `num_latents` counts conditioning latent frames.

        reference: RoPE position of the first frame, or None: the first frame is like the others.
        """
        self.grid = (num_latents, height, width)
        self.head_dim = config.head_dim
        shape = (config.depth, batch, num_latents * height * width, config.num_heads, config.head_dim)
        self.k, self.v = (self._empty(shape, dtype, torch.device(device)) for _ in range(2))
        self.rotated, self.reference = False, reference
        self.out: Tensor | None = None

    @property
    def num_latents(self) -> int:
        return self.grid[0]

    def store(self, block: int, k: Tensor, v: Tensor) -> None:
        """Store one block's keys (before RoPE) and values, each [batch, tokens, heads, head_dim]."""
        self._forget()
        self.k[block].copy_(k)
        self.v[block].copy_(v)

    def rotate(self, device: torch.device | None = None) -> None:
        """Apply RoPE to all keys, once; further calls do nothing. device: where to compute; None: beside the keys."""
        if self.rotated:
            return
        self._forget()
        device = device or self.k.device
        table = rope_table if self.reference is None else referenced_table
        cos, sin = table(self.head_dim, *self.grid, self.reference or 0, device)
        for k in self.k:
            k.copy_(apply_rope(k.to(device), cos, sin))
        self.rotated = True

    def read(self, block: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a block on the device of `like` [B, ...], for its batch.

        A batch-1 cache is expanded without a copy; a cache of b videos serves m*b samples in the order of
        torch.cat([latents] * m), in which guidance stacks its halves.
        """
        k, v = self._on(like.device, block)
        if k.shape[0] == 1:
            return k.expand(like.shape[0], -1, -1, -1), v.expand(like.shape[0], -1, -1, -1)
        repeats = (like.shape[0] // k.shape[0], 1, 1, 1)
        return k.repeat(repeats), v.repeat(repeats)

    def _on(self, device: torch.device, block: int) -> tuple[Tensor, Tensor]:
        return self.k[block].to(device), self.v[block].to(device)

    def to(self, device: torch.device | str) -> KVCache:
        """Move the buffers, for instance to "cpu" to free GPU memory; `read` then fetches one block at a time."""
        self._forget()
        device = torch.device(device)
        if self.k.device != device:
            self.k, self.v = (self._empty(x.shape, x.dtype, device).copy_(x) for x in (self.k, self.v))
        return self

    def keep(self, block: int) -> None:
        """None: a pass that reads the cache does not write to it; see `Filling`."""
        return None

    def _empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def _forget(self) -> None:
        """Called before the buffers change, to drop copies."""

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes


class NoCache:
    """A pass over all frames: nothing is read and nothing is kept."""

    num_latents = 0

    def read(self, block: int, like: Tensor) -> None:
        return None

    def keep(self, block: int) -> None:
        return None


class Filling:
    """The cache of a pass that fills a `KVCache`: it stores every block's keys and values and reads none."""

    num_latents = 0

    def __init__(self, cache: KVCache, restore: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        """restore: brings keys and values [B, N, heads, head_dim] into the cache's order, frame by frame."""
        self.cache, self.restore = cache, restore

    def read(self, block: int, like: Tensor) -> None:
        return None

    def keep(self, block: int) -> Callable[[Tensor, Tensor], None]:
        return lambda k, v: self.cache.store(block, self.restore(k), self.restore(v))
