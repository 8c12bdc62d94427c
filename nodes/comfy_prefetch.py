"""ComfyUI's dynamic VRAM fetches all weights of a block at once, ahead of the GPU, if the network says which comes."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import comfy.ops
import torch

try:
    from comfy import model_prefetch
except ImportError:
    # ComfyUI before 0.33 does not fetch ahead.
    model_prefetch = None


def prefetching(
    blocks: Sequence[torch.nn.Module],
    device: torch.device,
    dtype: torch.dtype,
    options: dict[str, Any],
    fp32: Container[torch.nn.Module] = (),
) -> Callable[[int], AbstractContextManager[None]] | None:
    """What block i runs under, so that its weights are fetched together; None if ComfyUI does not fetch ahead.

    dtype: of the activations. options: transformer_options. fp32: layers that take fp32 input. Blocks come in order; a
    pass that begins with block 0 again starts over.
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
        patched = [layer for layer in blocks[i].modules() if layer not in fp32 and patch_once(layer, device, dtype)]
        yield
        for layer in patched:
            layer._v_weight = layer._v_bias = None
        if i == len(blocks) - 1:
            model_prefetch.prefetch_queue_pop(queue, device, None)

    return block


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
