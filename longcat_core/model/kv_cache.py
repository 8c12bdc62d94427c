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
        self._near: list[_Near] = []
        self._stream: torch.cuda.Stream | None = None

    @property
    def num_latents(self) -> int:
        return self.grid[0]

    def store(self, block: int, k: Tensor, v: Tensor) -> None:
        """Keep one block's keys (before RoPE) and values, each [batch, tokens, heads, head_dim]."""
        self._near = []
        self.k[block].copy_(k)
        self.v[block].copy_(v)

    def rotate(self, device: torch.device | None = None) -> None:
        """Apply RoPE to all keys, once; further calls do nothing. device: where to do it; None: where they lie."""
        if self.rotated:
            return
        self._near = []
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
        now = torch.cuda.current_stream(device)
        near = self._fetch(block, device)
        now.wait_event(near.arrived)
        # The next step begins with the first block again.
        self._fetch((block + 1) % len(self.k), device, keep=near)
        return near.k, near.v

    def _fetch(self, block: int, device: torch.device, keep: _Near | None = None) -> _Near:
        """Room on the device that holds a block's keys and values, or will: begins to copy them there, beside what
        runs, over the older ones.

        Always the same room: memory that is taken and given back block by block is free only when the device has come
        so far, and the host is a whole network ahead of it.
        """
        if not self._near:
            self._stream = torch.cuda.Stream(device)
            self._near = [_Near(self.k[0], self.v[0], device, self._stream) for _ in range(min(2, len(self.k)))]
        near = next((near for near in self._near if near.block == block), None)
        if near is None:
            near = next(near for near in self._near if near is not keep)
            # Whoever read it is in the current stream already.
            self._stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(self._stream):
                near.k.copy_(self.k[block], non_blocking=True)
                near.v.copy_(self.v[block], non_blocking=True)
                near.arrived.record(self._stream)
            near.block = block
        return near

    def to(self, device: torch.device | str) -> KVCache:
        """Move the buffers, for instance to "cpu" to free GPU memory; `read` fetches a block at a time."""
        self._near = []
        device = torch.device(device)
        if self.k.device != device:
            self.k, self.v = (_empty(x.shape, x.dtype, device).copy_(x) for x in (self.k, self.v))
        return self

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes


class _Near:
    """Room on the device for one block's keys and values, and whose they are."""

    def __init__(self, k: Tensor, v: Tensor, device: torch.device, stream: torch.cuda.Stream) -> None:
        self.k, self.v = (torch.empty(x.shape, dtype=x.dtype, device=device) for x in (k, v))
        for x in (self.k, self.v):
            # Given back while something is being copied there, it must not be another's before that has come.
            x.record_stream(stream)
        self.arrived, self.block = torch.cuda.Event(), -1


def _empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    # Only pinned memory is copied beside other work.
    return pinned(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
