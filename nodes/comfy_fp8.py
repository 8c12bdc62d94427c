"""8-bit linear layers that ComfyUI can load, stream, patch with LoRAs and save. The core does the arithmetic.

ComfyUI moves, backs up and restores one weight per layer, so the scales of its rows are stored in the same tensor.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.ops
import torch
from torch import Tensor

from ..longcat_core.checkpoints.load import Checkpoint, read_parameter
from ..longcat_core.errors import CheckpointError
from ..longcat_core.model.config import ModelConfig
from ..longcat_core.optimize.kernels.elementwise import Quantized, quantize_rows
from ..longcat_core.optimize.quantization import (
    Policy,
    check_sizes,
    dequantized,
    missing,
    quantized_linear,
    scale_rows,
    with_scales,
    without_scales,
)

E4M3 = torch.float8_e4m3fn


def is_replaced(layer: torch.nn.Module) -> bool:
    """Whether another function replaces the layer's own forward, as a bypass LoRA's does."""
    return getattr(layer.forward, "__func__", None) is not type(layer).forward


class Rowwise:
    """Passed to ComfyUI's loader as `custom_operations`, which asks LongCat-Video's config for 8-bit layers."""


class Linear(torch.nn.Module, comfy.ops.CastWeightBiasOp):
    """x [.., in] in 16 bits or fp32, or already quantized -> [.., out]; see `quantization.Fp8Linear`.

    weight: e4m3 rows followed by their scales, as `with_scales` packs them. bias [out] or None. original: reads the
    weight from the checkpoint, so that a LoRA is merged at full precision and the result quantized.
    """

    eight_bit = True

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        check_sizes(self.out_features, self.in_features)
        rows = self.out_features + scale_rows(self.out_features, self.in_features)
        # ComfyUI may create a layer on the meta device, or without a weight, until its weights are loaded.
        weight = getattr(layer, "weight", None)
        device = torch.device("cpu") if weight is None else weight.device
        weight = torch.empty(rows, self.in_features, dtype=E4M3, device=device)
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.bias = layer.bias
        if layer.bias is None and getattr(layer, "comfy_need_lazy_init_bias", False):
            bias = torch.empty(self.out_features, dtype=layer.bias_comfy_model_dtype, device=device)
            self.bias = torch.nn.Parameter(bias, requires_grad=False)
        self.weight_function, self.bias_function = [], []
        self.native, self.dtype = False, torch.bfloat16
        self.original: Callable[[], Tensor] | None = None
        # Under dynamic VRAM: the weight without LoRAs and the patches of LoRAs in it, while there are any.
        self._unmerged: torch.nn.Parameter | None = None
        self._merged: list[tuple] = []

    def _save_to_state_dict(self, state: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(state, prefix, keep_vars)
        if self._unmerged is not None:
            # The model's own weight, by which it is recognized, whichever LoRAs a clone of it runs with.
            state[f"{prefix}weight"] = self._unmerged if keep_vars else self._unmerged.detach()

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight without its scales."""
        return torch.Size((self.out_features, self.in_features))

    @property
    def takes_quantized(self) -> bool:
        # Neither functions of the weight nor another forward, as of a bypass LoRA, take 8-bit rows.
        return not self.weight_function and not is_replaced(self)

    def bare(self, x: Tensor) -> tuple[Tensor, Tensor | None, Any]:
        """The packed weight and the bias on x's device, and what to release after use if they were streamed there."""
        here = self.weight.device == x.device and not self.bias_function
        if here and (self.bias is None or self.bias.device == x.device):
            return self.weight, self.bias, None
        options = {"dtype": E4M3, "bias_dtype": self.dtype, "offloadable": True}
        functions = self.weight_function
        if functions:
            # They take plain numbers and not e4m3 with scales.
            self.weight_function = []
        try:
            weight, bias, stream = comfy.ops.cast_bias_weight(self, x, **options)
        finally:
            if functions:
                self.weight_function = functions
        return weight, bias, (self, weight, bias, stream)

    def forward(self, x: Tensor | Quantized, fp8: bool = True) -> Tensor:
        """fp8: multiply in 8 bits, or else dequantize the weights and multiply in x's dtype."""
        comfy.ops.run_every_op()
        given = x.values if isinstance(x, Quantized) else x
        dtype = self.dtype if isinstance(x, Quantized) else x.dtype
        packed, bias, streamed = self.bare(given)
        weight, scales = without_scales(packed, self.out_features)
        if self.weight_function:
            # A LoRA on a streamed layer: merged here into the dequantized weight.
            full = dequantized(weight, scales, dtype)
            for function in self.weight_function:
                full = function(full)
            out = torch.nn.functional.linear(x, full, None if bias is None else bias.to(dtype))
        else:
            out = quantized_linear(x, weight, scales, bias, dtype, fp8=fp8, native=self.native)
        if streamed is not None:
            comfy.ops.uncast_bias_weight(*streamed)
        return out

    # --- called by ComfyUI to merge LoRAs ---

    def convert_weight(self, weight: Tensor, inplace: bool = False, **unused: Any) -> Tensor:
        """The weight [out, in] to merge a LoRA into: the checkpoint's, or the quantized one if the file is gone.

        weight: the packed one, cast to any float dtype. The result is fp32, because ComfyUI merges in fp16 on CUDA.
        """
        dtype, device = self.dtype if weight.dtype == E4M3 else torch.float32, weight.device
        if self._unmerged is not None:
            weight = self._unmerged.to(device)
        if self.original is not None:
            try:
                return self.original().to(device, dtype)
            except CheckpointError as error:
                logging.warning("LongCat: a LoRA is merged into quantized weights: %s", error)
        return dequantized(*without_scales(weight.to(E4M3), self.out_features), dtype)

    def set_weight(
        self, weight: Tensor, inplace_update: bool = False, seed: Any = None, return_weight: bool = False, **unused: Any
    ) -> Tensor | None:
        """Quantize the merged weight [out, in] and store it, or return it packed if `return_weight`."""
        packed = with_scales(*quantize_rows(weight))
        if return_weight:
            return packed
        if inplace_update:
            self.weight.data.copy_(packed)
        else:
            self.weight = torch.nn.Parameter(packed, requires_grad=False)
        return None

    @property
    def weight_lowvram_function(self) -> None:
        """None: the weight that dynamic VRAM streams has its LoRAs already.

        ComfyUI's own layers are patched whenever they reach the GPU, at the precision in which they are stored. Here
        ComfyUI sets the function whenever it loads a model, and other LoRAs than before are merged then, once.
        """
        return None

    @weight_lowvram_function.setter
    def weight_lowvram_function(self, patch: Any) -> None:
        patches = [] if patch is None else list(patch.patches[patch.key])
        if len(patches) == len(self._merged) and all(map(operator.is_, patches, self._merged)):
            return
        packed, self._merged = self._unmerged, patches
        if self._unmerged is None:
            # Set aside beside the modules' parameters, where ComfyUI does not find it.
            self.__dict__["_unmerged"] = self.weight
        if patches:
            weight = self._unmerged.to(comfy.model_management.get_torch_device()).float()
            full = comfy.lora.calculate_weight(patches, self.convert_weight(weight), patch.key)
            packed = torch.nn.Parameter(self.set_weight(full, return_weight=True).cpu(), requires_grad=False)
        else:
            self.__dict__["_unmerged"] = None
        self.weight = packed
        for pinned in getattr(self, "_pins", {}).values():
            if pinned.get("pin") is not None:
                # ComfyUI's copy in pinned memory, from which it streams.
                copy, _ = comfy.memory_management.interpret_gathered_like([packed, self.bias], pinned["pin"])
                copy.copy_(packed)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


def install(model: torch.nn.Module, config: ModelConfig) -> None:
    """Replace the network's linear layers with 8-bit ones, before weights are loaded."""
    for name in Policy().names(config.depth, config.audio is not None):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Linear(model.get_submodule(name)))


def layers(model: torch.nn.Module) -> dict[str, Linear]:
    """The 8-bit layers of a network by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear)}


def remember(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Let every 8-bit layer read its weight from the checkpoint's files again."""
    for name, layer in layers(model).items():
        layer.original = lambda name=name: read_parameter(checkpoint, f"{name}.weight")


def prepare(model: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Set the device and dtype that the 8-bit layers run with. Called before `forward`, to stay out of its graph."""
    native = not missing(device)
    for module in model.modules():
        if isinstance(module, Linear):
            module.native, module.dtype = native, dtype
