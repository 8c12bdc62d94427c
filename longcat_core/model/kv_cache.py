"""Keys and values of conditioning frames, which no step, prompt or noise changes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import LongCatError
from ..optimize.streaming import pinned
from .config import ModelConfig
from .rope import apply_rope, rope_table

KVMode = Literal["exact", "official", "off"]
KV_MODES: tuple[KVMode, ...] = get_args(KVMode)


def check_mode(mode: str) -> None:
    """Raise LongCatError for a mode that is not one of KV_MODES."""
    if mode not in KV_MODES:
        raise LongCatError(f"unknown KV cache mode {mode!r}; choose one of {', '.join(KV_MODES)}")


class KVCache:
    """Pre-allocated self-attention keys and values of the clean conditioning frames, for every block.

    Filled by one pass of the network over the conditioning latents, then read at every step. Keys arrive after
    k_norm and before RoPE; `rotate` applies RoPE once, in place, since conditioning frames always stand at
    positions 0..n-1. A batch-1 cache serves any batch (both halves of classifier-free guidance).

    k, v: [depth, batch, tokens, heads, head_dim] in the network's dtype. out: what the network returned for these
    frames, [batch, C, n, H, W] fp32, the same at every step and for every prompt: guidance sums over all frames need
    it.

    In CPU memory the buffers are pinned where there is CUDA, and reading a block begins to fetch the next one.
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
        self.k, self.v = (_empty(shape, dtype, torch.device(device)) for _ in range(2))
        self.rotated = False
        self.out: Tensor | None = None
        self._fetched: tuple[int, Tensor, Tensor, torch.cuda.Event] | None = None
        self._stream: torch.cuda.Stream | None = None

    @property
    def num_latents(self) -> int:
        return self.grid[0]

    def store(self, block: int, k: Tensor, v: Tensor) -> None:
        """Keep one block's keys (before RoPE) and values, each [batch, tokens, heads, head_dim]."""
        self.k[block].copy_(k)
        self.v[block].copy_(v)

    def rotate(self, device: torch.device | None = None) -> None:
        """Apply RoPE to all keys, once; further calls do nothing. device: where to do it; None: where they lie."""
        if self.rotated:
            return
        device = device or self.k.device
        cos, sin = rope_table(self.head_dim, *self.grid, 0, device)
        for k in self.k:
            k.copy_(apply_rope(k.to(device), cos, sin))
        self.rotated = True

    def read(self, block: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a block on the device of `like` [B, ...], for its batch.

        A batch-1 cache is expanded without a copy; one of b videos serves m*b samples in the order of
        torch.cat([latents] * m), which is how guidance stacks its halves.
        """
        k, v = self._on(like.device, block)
        if k.shape[0] == 1:
            return k.expand(like.shape[0], -1, -1, -1), v.expand(like.shape[0], -1, -1, -1)
        repeats = (like.shape[0] // k.shape[0], 1, 1, 1)
        return k.repeat(repeats), v.repeat(repeats)

    def _on(self, device: torch.device, block: int) -> tuple[Tensor, Tensor]:
        if self.k.device == device:
            return self.k[block], self.v[block]
        if device.type != "cuda":
            return self.k[block].to(device), self.v[block].to(device)
        fetched = self._fetched if self._fetched and self._fetched[0] == block else self._fetch(block, device)
        _, k, v, arrived = fetched
        now = torch.cuda.current_stream(device)
        now.wait_event(arrived)
        for tensor in (k, v):
            # Made on another stream: its memory may be given away only once this one is done with it.
            tensor.record_stream(now)
        # The next step begins with the first block again.
        self._fetched = self._fetch((block + 1) % len(self.k), device)
        return k, v

    def _fetch(self, block: int, device: torch.device) -> tuple[int, Tensor, Tensor, torch.cuda.Event]:
        """Begin to copy a block's keys and values to the device, beside what runs there."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        with torch.cuda.stream(self._stream):
            k, v = (buffer[block].to(device, non_blocking=True) for buffer in (self.k, self.v))
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
        return block, k, v, arrived

    def to(self, device: torch.device | str) -> KVCache:
        """Move the buffers, for instance to "cpu" to free GPU memory; `read` fetches a block at a time."""
        self._fetched = None
        device = torch.device(device)
        if self.k.device != device:
            self.k, self.v = (_empty(x.shape, x.dtype, device).copy_(x) for x in (self.k, self.v))
        return self

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes


def _empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    # Only pinned memory is copied beside other work.
    return pinned(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
