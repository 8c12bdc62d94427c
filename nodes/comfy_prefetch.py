"""ComfyUI's dynamic VRAM fetches all weights of a block at once, ahead of the GPU, if the network says which comes."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.ops
import torch

try:
    from comfy import model_prefetch
except ImportError:
    # ComfyUI before 0.33 does not fetch ahead.
    model_prefetch = None


class Prefetch:
    """What a block runs under, so that its weights are fetched together: `with prefetch(i)`.

    Blocks come in order; a pass that begins with block 0 again starts over.
    """

    def __init__(self, start: Callable[[], list], blocks: Sequence[torch.nn.Module], device: torch.device,
                 dtype: torch.dtype, fp32: Container[torch.nn.Module]) -> None:  # fmt: skip
        """start: makes ComfyUI's queue of all blocks. dtype: of the activations. fp32: layers that take fp32 input."""
        self.start, self.blocks, self.device, self.dtype, self.fp32 = start, blocks, device, dtype, fp32
        self.fresh: list | None = start()
        self.queue = self.fresh

    @contextmanager
    def __call__(self, i: int) -> Iterator[None]:
        if i == 0:
            self.queue, self.fresh = self.fresh or self.start(), None
        block = self.blocks[i]
        model_prefetch.prefetch_queue_pop(self.queue, self.device, block)
        layers = (layer for layer in block.modules() if layer not in self.fp32)
        patched = [layer for layer in layers if patch_once(layer, self.device, self.dtype)]
        yield
        for layer in patched:
            layer._v_weight = layer._v_bias = None
        if i == len(self.blocks) - 1:
            self.queue[1:] = [None]
            model_prefetch.prefetch_queue_pop(self.queue, self.device, None)


def prefetching(
    blocks: Sequence[torch.nn.Module],
    device: torch.device,
    dtype: torch.dtype,
    options: dict[str, Any],
    fp32: Container[torch.nn.Module] = (),
) -> Prefetch | None:
    """What blocks run under; None if ComfyUI does not fetch ahead. options: transformer_options."""
    if model_prefetch is None or not options.get("prefetch_dynamic_vbars"):
        return None
    found = Prefetch(
        lambda: model_prefetch.make_prefetch_queue(list(blocks), device, options), blocks, device, dtype, fp32
    )
    return None if found.queue is None else found


def patch_once(layer: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> bool:
    """Apply the LoRAs of a fetched layer that does not stay on the GPU; whether it has any.

    ComfyUI adds them to the fetched weight in place, whenever the layer is used. The feed-forward takes a large video
    in pieces, and each piece would add them again.
    """
    fetched = getattr(layer, "_prefetch", None)
    if fetched is None or fetched["resident"] or fetched["signature"] is not None or fetched["needs_cast"]:
        return False
    if not any(getattr(layer, f"{name}_lowvram_function", None) for name in ("weight", "bias")):
        return False
    stored = {part.dtype for part in fetched["cast_geometry"] if part is not None}
    if isinstance(layer.weight, comfy.ops.QuantizedTensor) or stored != {dtype}:
        # Multiplied out or cast at each use, into memory of its own.
        return False
    found = comfy.ops.resolve_cast_module_with_vbar(layer, dtype, device, dtype, None, False)
    layer._v_weight, layer._v_bias = found
    fetched["resident"] = True
    return True
