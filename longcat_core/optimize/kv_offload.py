"""A KV cache of conditioning frames that waits in CPU memory: reading a block begins to fetch the next one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..model.config import ModelConfig
from ..model.kv_cache import KVCache
from .streaming import pinned


class OffloadableKVCache(KVCache):
    """A `KVCache` whose buffers in CPU memory are pinned where there is CUDA and prefetched block by block.

    On the device it is a plain `KVCache`.
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
        self._near: list[_Near] = []
        self._stream: torch.cuda.Stream | None = None
        super().__init__(config, num_latents, height, width, batch=batch, dtype=dtype, device=device)

    def _empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        if device.type != "cpu":
            return super()._empty(shape, dtype, device)
        # Only pinned memory is copied beside other work.
        return pinned(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)

    def _forget(self) -> None:
        self._near = []

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
        """The buffers on the device that hold a block's keys and values, or will: starts copying over the older pair.

        The same two pairs of buffers serve all blocks: memory that is allocated and freed block by block becomes free
        only when the device gets there, and the host runs a whole network ahead of it.
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


class _Near:
    """Room on the device for one block's keys and values, and whose they are."""

    def __init__(self, k: Tensor, v: Tensor, device: torch.device, stream: torch.cuda.Stream) -> None:
        self.k, self.v = (torch.empty(x.shape, dtype=x.dtype, device=device) for x in (k, v))
        for x in (self.k, self.v):
            # Given back while something is being copied there, it must not be another's before that has come.
            x.record_stream(stream)
        self.arrived, self.block = torch.cuda.Event(), -1
