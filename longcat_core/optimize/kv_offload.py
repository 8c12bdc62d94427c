"""A KV cache of conditioning frames in CPU memory: reading a block starts to prefetch the next one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..model.config import ModelConfig
from ..model.kv_cache import KVCache
from .streaming import pinned


class OffloadableKVCache(KVCache):
    """A `KVCache` whose buffers in CPU memory are pinned if there is CUDA, and prefetched block by block.

    On the device it is a plain `KVCache`.
    """

    def __init__(self, config: ModelConfig, num_latents: int, height: int, width: int, **options: Any) -> None:
        """See `KVCache`."""
        self._buffers: list[_Buffer] = []
        self._stream: torch.cuda.Stream | None = None
        super().__init__(config, num_latents, height, width, **options)

    def _empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        if device.type != "cpu":
            return super()._empty(shape, dtype, device)
        # Only pinned memory is copied while other work runs.
        return pinned(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)

    def _forget(self) -> None:
        self._buffers = []

    def _on(self, device: torch.device, block: int) -> tuple[Tensor, Tensor]:
        if self.k.device == device:
            return self.k[block], self.v[block]
        if device.type != "cuda":
            return self.k[block].to(device), self.v[block].to(device)
        current = torch.cuda.current_stream(device)
        buffer = self._fetch(block, device)
        current.wait_event(buffer.arrived)
        # The next step begins with the first block again.
        self._fetch((block + 1) % len(self.k), device, keep=buffer)
        return buffer.k, buffer.v

    def _fetch(self, block: int, device: torch.device, keep: _Buffer | None = None) -> _Buffer:
        """The buffer on the device that holds a block's keys and values, or will: starts a copy into one but `keep`.

        The same two buffers serve all blocks. Memory allocated and freed block by block would become free only when the
        device gets there, and the host runs a whole network ahead of it.
        """
        if self._stream is None or not self._buffers:
            self._stream = torch.cuda.Stream(device)
            self._buffers = [_Buffer(self.k[0], self.v[0], device, self._stream) for _ in range(min(2, len(self.k)))]
        buffer = next((buffer for buffer in self._buffers if buffer.block == block), None)
        if buffer is None:
            buffer = next(buffer for buffer in self._buffers if buffer is not keep)
            # Everything that reads the buffer is already queued on the current stream.
            self._stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(self._stream):
                buffer.k.copy_(self.k[block], non_blocking=True)
                buffer.v.copy_(self.v[block], non_blocking=True)
                buffer.arrived.record(self._stream)
            buffer.block = block
        return buffer


class _Buffer:
    """Memory on the device for one block's keys and values, and the number of the block that it holds."""

    def __init__(self, k: Tensor, v: Tensor, device: torch.device, stream: torch.cuda.Stream) -> None:
        self.k, self.v = (torch.empty(x.shape, dtype=x.dtype, device=device) for x in (k, v))
        for x in (self.k, self.v):
            # If freed during a copy, the memory must not be reused before the copy is complete.
            x.record_stream(stream)
        self.arrived, self.block = torch.cuda.Event(), -1
