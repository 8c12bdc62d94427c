"""LongCat Optimizations: every switch of the network, and a report of what is active."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_type_hints

import comfy.samplers
import torch
from comfy_api.latest import io

from ..longcat_core.optimize import attention as backends
from ..longcat_core.optimize.compilation import why_not
from ..longcat_core.optimize.kernels import elementwise as kernels
from ..longcat_core.optimize.quantization import missing
from ..longcat_core.optimize.switches import Optimizations
from . import comfy_fp8
from .comfy_attention import chosen
from .comfy_model import OPTIMIZATIONS_KEY
from .inputs import schema
from .sampling import require_longcat

CALC = "sampler_calc_cond_batch_function"


def report(
    optimizations: Optimizations, asked: Optimizations, device: torch.device, options: dict, casts: bool, eight: int
) -> str:
    """What is active, one line for each switch, and why a requested switch is not.

    casts: whether ComfyUI casts or streams the weights, so that fused layers run whole. eight: number of layers that
    were quantized to fp8 row by row.
    """
    lines = []
    for name, kind in get_type_hints(Optimizations).items():
        value, wanted = getattr(optimizations, name), getattr(asked, name)
        line = f"{name}: {('on' if value else 'off') if kind is bool else value}"
        if name == "compile" and value != wanted:
            line += f" ({wanted} is not available: {why_not(device)})"
        if name in ("fused_qkv", "fused_ffn") and not value and casts:
            line += " (but the layers run fused here: ComfyUI casts or streams their weights, whole)"
        if name == "explicit_fp32" and not value and device.type != "cuda":
            line += f" (without effect: autocast to fp32 exists on CUDA only, this is {device.type})"
        if name == "fused_kernels" and value and (why := kernels.missing()):
            line += f" (without effect: {why})"
        if name == "fused_text" and value and (why := _no_fused_kernels(optimizations)):
            line += f" (without effect: {why})"
        if name == "fp8":
            line += _fp8(value, device, eight)
        if name == "gradient_checkpointing" and value:
            line += " (acts in training only)"
        if name == "attention" and (other := chosen(optimizations, options)):
            line += f" (not used: {other} decides)"
        lines.append(line)
    missing = [f"{name}: {why}" for name, usable, why in backends.report() if not usable]
    if missing:
        lines += ["attention backends that this machine lacks:", *(f"  {line}" for line in missing)]
    return "\n".join(lines)


def _fp8(value: bool, device: torch.device, eight: int) -> str:
    if not eight:
        return " (without effect: no layer is in fp8; LongCat Model Loader makes them with weight_dtype fp8 rowwise)"
    if value and (why := missing(device)):
        return f" ({eight} layers, by the same numbers in wider precision: {why})"
    return f" ({eight} layers)"


def _no_fused_kernels(optimizations: Optimizations) -> str:
    return kernels.missing() if optimizations.fused_kernels else "fused_kernels is off"


def halves_in_turn(args: dict[str, Any]) -> list[torch.Tensor]:
    """ComfyUI's sampler_calc_cond_batch_function: the conds of a step one after the other, each in its own batch."""
    given = args["input"], args["sigma"], args["model_options"]
    return [out for cond in args["conds"] for out in comfy.samplers.calc_cond_batch(args["model"], [cond], *given)]


class OptimizationsNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema("LongCatOptimizations", attention=backends.listed())

    @classmethod
    def execute(cls, model, **switches: Any) -> io.NodeOutput:
        require_longcat(model, "LongCat Optimizations")
        asked = Optimizations(**switches)
        backends.check(asked.attention)
        device = model.load_device
        optimizations = asked
        if asked.compile != "off" and why_not(device):
            optimizations = replace(asked, compile="off")
        if optimizations.compile != "off" and getattr(model, "is_dynamic", lambda: False)():
            # Weights that ComfyUI pages in at use do not compile.
            model = model.clone(disable_dynamic=True)
        else:
            model = model.clone()
        options = model.model_options.setdefault("transformer_options", {})
        options[OPTIMIZATIONS_KEY] = optimizations
        if optimizations.split_guidance:
            model.set_model_sampler_calc_cond_batch_function(halves_in_turn)
        elif model.model_options.get(CALC) is halves_in_turn:
            del model.model_options[CALC]
        casts = model.model.manual_cast_dtype is not None or getattr(model, "is_dynamic", lambda: False)()
        eight = len(comfy_fp8.layers(model.model.diffusion_model))
        return io.NodeOutput(model, report(optimizations, asked, device, options, casts, eight))


NODES = [OptimizationsNode]
