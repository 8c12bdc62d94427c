"""LongCat Optimizations: sets every switch of the network, and reports what is active."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_type_hints

import comfy.samplers
import torch
from comfy_api.latest import io

from ..longcat_core.optimize import attention as backends
from ..longcat_core.optimize import quantization
from ..longcat_core.optimize.compilation import why_not
from ..longcat_core.optimize.kernels import elementwise as kernels
from ..longcat_core.optimize.switches import Optimizations
from . import comfy_fp8
from .comfy_attention import attention_by_comfyui
from .comfy_network import BLOCK_SPARSE_KEY, OPTIMIZATIONS_KEY
from .inputs import LongCatNode
from .models import execution_of, options_of, preferences_of, require_longcat

CALC_COND_BATCH = "sampler_calc_cond_batch_function"


def report(
    switches: Optimizations,
    requested: Optimizations,
    device: torch.device,
    attention: str,
    sparse: str,
    casts: bool,
    fp8_layers: int,
) -> str:
    """What is active, one line for each switch, and why a requested switch is not.

    attention: what decides about self-attention in place of the switch, or "". sparse: the sparse attention that is on
    and its kernel, or "". casts: whether ComfyUI casts or streams the weights, so that fused layers run whole.
    fp8_layers: number of layers that were quantized to fp8 row by row.
    """
    lines = []
    for name, kind in get_type_hints(Optimizations).items():
        value = getattr(switches, name)
        line = f"{name}: {('on' if value else 'off') if kind is bool else value}"
        if name == "compile" and value != requested.compile:
            line += f" ({requested.compile} is not available: {why_not(device)})"
        if name in ("fused_qkv", "fused_ffn") and not value and casts:
            line += " (but the layers run fused here: ComfyUI casts or streams their weights, whole)"
        if name == "explicit_fp32" and not value and device.type != "cuda":
            line += f" (without effect: autocast to fp32 exists on CUDA only, this is {device.type})"
        if name == "fused_kernels" and value and (why := kernels.missing()):
            line += f" (without effect: {why})"
        if name == "fused_text" and value:
            why = kernels.missing() if switches.fused_kernels else "fused_kernels is off"
            line += f" (without effect: {why})" if why else ""
        if name == "fp8":
            line += _fp8(value, device, fp8_layers)
        if name == "gradient_checkpointing" and value:
            line += " (acts in training only)"
        if name == "exchange" and value != "exact":
            line += " (acts under LongCat Multi-GPU only)"
        if name == "attention" and attention:
            line += f" (not used: {attention} decides)"
        if name == "attention" and sparse:
            line += f" (where attention is not sparse)\nsparse attention: {sparse}"
        lines.append(line)
    missing = [f"  {name}: {why}" for name, usable, why in backends.report() if not usable]
    if missing:
        lines += ["attention backends that this machine lacks:", *missing]
    return "\n".join(lines)


def _fp8(value: bool, device: torch.device, layers: int) -> str:
    if not layers:
        return " (without effect: no layer is in fp8; LongCat Model Loader makes them with weight_dtype fp8 rowwise)"
    if value and (why := quantization.missing(device)):
        return f" ({layers} layers, multiplied in wider precision: {why})"
    return f" ({layers} layers)"


def split_guidance(args: dict[str, Any]) -> list[torch.Tensor]:
    """ComfyUI's sampler_calc_cond_batch_function that runs the conds of a step one after the other, or at once on as
    many devices."""
    given = args["input"], args["sigma"], args["model_options"]
    if len(args["conds"]) <= len(args["model_options"].get("multigpu_clones", ())):
        return comfy.samplers.calc_cond_batch(args["model"], args["conds"], *given)
    return [out for cond in args["conds"] for out in comfy.samplers.calc_cond_batch(args["model"], [cond], *given)]


class OptimizationsNode(LongCatNode):
    ID = "LongCatOptimizations"

    @classmethod
    def execute(cls, model, **switches: Any) -> io.NodeOutput:
        require_longcat(model, "LongCat Optimizations")
        requested = active = Optimizations(**switches)
        backends.check(requested.attention)
        device, dynamic = model.load_device, getattr(model, "is_dynamic", lambda: False)()
        if requested.compile != "off" and why_not(device):
            active = replace(requested, compile="off")
        # Weights that ComfyUI pages in at use do not compile.
        model = model.clone(disable_dynamic=True) if dynamic and active.compile != "off" else model.clone()
        model.model_options.setdefault("transformer_options", {})[OPTIMIZATIONS_KEY] = active
        if active.split_guidance:
            model.set_model_sampler_calc_cond_batch_function(split_guidance)
        elif model.model_options.get(CALC_COND_BATCH) is split_guidance:
            del model.model_options[CALC_COND_BATCH]
        casts = model.model.manual_cast_dtype is not None or getattr(model, "is_dynamic", lambda: False)()
        layers = len(comfy_fp8.layers(model.model.diffusion_model))
        if options_of(model).get(BLOCK_SPARSE_KEY) is not None:
            attention = "LongCat Block-Sparse Attention"
        else:
            attention = attention_by_comfyui(active, options_of(model), preferences_of(model))
        sparse = execution_of(model).sparse_in_words(device)
        return io.NodeOutput(model, report(active, requested, device, attention, sparse, casts, layers))


NODES = [OptimizationsNode]
