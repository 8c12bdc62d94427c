"""LoRAs applied at run time, beside the weights: y = layer(x) + ((x @ down^T) * scale) @ up^T.

Several LoRAs of a layer form one stack of ranks. A layer gets its adapter by a change of class, not by a wrapper, so
that its place, the names of its weights and its state dict do not change.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

NAMES = ("lora_down", "lora_up", "lora_scale")


class Adapted(nn.Module):
    """Mixed into the class of an adapted layer: nn.Linear, Fp8Linear, or the patch embedding.

    lora_down [R, in]; lora_up [out, R]; lora_scale [R] fp32, the weight of every rank, 0 for unused ones. They are not
    part of the state dict.
    """

    lora_down: nn.Parameter
    lora_up: nn.Parameter
    lora_scale: nn.Parameter
    # The LoRA needs the input in 16 bits; an 8-bit layer then quantizes it itself.
    takes_quantized = False

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        """x [.., in] -> [.., out]. options: of the layer itself."""
        out = super().forward(x, **options)
        size = getattr(self, "kernel_size", None)
        if size is None:
            return self._added(out, x)
        t, h, w = size
        patches = rearrange(x, "b c (t pt) (h ph) (w pw) -> b t h w (c pt ph pw)", pt=t, ph=h, pw=w)
        return out + self.lora_change(patches).permute(0, 4, 1, 2, 3)

    def lora_change(self, x: Tensor) -> Tensor:
        """What the LoRAs add for x [.., in] -> [.., out], computed in x's dtype."""
        return F.linear(self._ranks(x), self.lora_up.to(x.dtype))

    def _ranks(self, x: Tensor) -> Tensor:
        # The ranks of all LoRAs in one product; lora_up is zero in rows that a LoRA does not change.
        return (F.linear(x, self.lora_down.to(x.dtype)) * self.lora_scale).to(x.dtype)

    def _added(self, out: Tensor, x: Tensor) -> Tensor:
        """out [.., out], the layer's own output, plus what the LoRAs add for x [.., in]."""
        ranks, up = self._ranks(x), self.lora_up.to(x.dtype)
        learns = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (out, ranks, up))
        if learns or torch.compiler.is_compiling() or out.dtype != x.dtype or not out.is_contiguous():
            return out + F.linear(ranks, up)
        # In place: for fused projections the change and the sum would be the largest tensors of a forward pass.
        out.flatten(0, -2).addmm_(ranks.flatten(0, -2), up.t())
        return out

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        tensors = {name: getattr(self, name).data for name in NAMES}
        super()._apply(fn, recurse)
        device = self.get_parameter("weight").device
        for name, tensor in tensors.items():
            # Scales move but are not cast.
            moved = tensor.to(device) if name == "lora_scale" else fn(tensor)
            setattr(self, name, nn.Parameter(moved, requires_grad=getattr(self, name).requires_grad))
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in NAMES:
            destination.pop(prefix + name, None)

    def _load_from_state_dict(
        self, state: dict, prefix: str, metadata: dict, strict: bool, missing: list, *lists: list
    ) -> None:
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, *lists)
        missing[:] = [name for name in missing if name not in [prefix + adapter for adapter in NAMES]]


@cache
def _adapted(kind: type) -> type:
    return type(f"Adapted{kind.__name__}", (Adapted, kind), {})


def adapt(layer: Any, rank: int, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Adapted:
    """Give a layer an adapter of `rank` ranks, all zero, so that its output does not change; an old one is replaced.

    dtype: of down and up; None: the layer's own, or of its output if it is 8-bit. device: where the layer runs; None:
    where its weights lie.
    """
    release(layer)
    rows, columns = layer.weight.shape[0], layer.weight[0].numel()
    if dtype is None:
        dtype = layer.weight.dtype if layer.weight.itemsize > 1 else layer.dtype
    own: Any = type(layer)
    layer.__class__ = _adapted(own)
    # Not as inference tensors, even while sampling: they are written to later.
    with torch.inference_mode(False):
        shapes = (rank, columns), (rows, rank), (rank,)
        for name, shape, kind in zip(NAMES, shapes, (dtype, dtype, torch.float32), strict=True):
            zeros = torch.zeros(shape, dtype=kind, device=device or layer.weight.device)
            setattr(layer, name, nn.Parameter(zeros, requires_grad=False))
    return layer


def release(layer: nn.Module) -> None:
    """Remove a layer's adapter, if it has one; the layer's weights were never changed."""
    if isinstance(layer, Adapted):
        for name in NAMES:
            delattr(layer, name)
        layer.__class__ = type(layer).__bases__[1]


def rank_of(layer: nn.Module) -> int:
    """Number of ranks of a layer's adapter, 0 without one."""
    return len(layer.lora_scale) if isinstance(layer, Adapted) else 0
