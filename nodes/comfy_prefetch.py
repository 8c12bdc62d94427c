"""ComfyUI's dynamic VRAM fetches all weights of a block at once, ahead of the GPU, if the network says which comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

try:
    from comfy import model_prefetch
except ImportError:
    # ComfyUI before 0.33 does not fetch ahead.
    model_prefetch = None


def prefetching(
    blocks: Sequence[torch.nn.Module], device: torch.device, options: dict[str, Any]
) -> Callable[[int], AbstractContextManager[None]] | None:
    """What block i runs under, so that its weights are fetched together; None if ComfyUI does not fetch ahead.

    options: transformer_options. Blocks come in order; a pass that begins with block 0 again starts over.
    """
    if model_prefetch is None or not options.get("prefetch_dynamic_vbars"):
        return None
    fresh = queue = model_prefetch.make_prefetch_queue(list(blocks), device, options)
    if queue is None:
        return None

    @contextmanager
    def block(i: int) -> Iterator[None]:
        nonlocal fresh, queue
        if i == 0:
            queue, fresh = fresh or model_prefetch.make_prefetch_queue(list(blocks), device, options), None
        model_prefetch.prefetch_queue_pop(queue, device, blocks[i])
        yield
        if i == len(blocks) - 1:
            model_prefetch.prefetch_queue_pop(queue, device, None)

    return block
