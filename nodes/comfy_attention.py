"""ComfyUI's attention as a kernel of the network, for users who chose an attention in ComfyUI itself."""

from __future__ import annotations

from typing import Any

import torch
from comfy.cli_args import args
from comfy.ldm.modules import attention
from torch import Tensor

from ..longcat_core.optimize.attention import Kernels
from ..longcat_core.optimize.switches import Optimizations

OVERRIDE = "optimized_attention_override"
# ComfyUI's command line options that name an attention, except --use-pytorch-cross-attention, our default anyway.
FLAGS = (
    "use_sage_attention",
    "use_flash_attention",
    "use_ck_attention",
    "use_split_cross_attention",
    "use_quad_cross_attention",
)


class ComfyAttention:
    """ComfyUI's attention over q [B, Nq, H, D] and k, v [B, Nk, H, D]. options: transformer_options."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options

    @torch.compiler.disable
    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = q.shape[2]
        q, k, v = (part.flatten(2) for part in (q, k, v))
        out = attention.optimized_attention(q, k, v, heads=heads, transformer_options=self.options)
        return out.unflatten(-1, (heads, -1))


def attention_by_comfyui(optimizations: Optimizations, options: dict[str, Any]) -> str:
    """What in ComfyUI decides which self-attention runs, in words; "" if `Optimizations.attention` decides.

    An override set by a node always decides, a command line option only if `attention` is auto.
    """
    if options.get(OVERRIDE) is not None:
        return "an attention override set by another node"
    flag = next((flag for flag in FLAGS if getattr(args, flag, False)), None)
    return f"ComfyUI's --{flag.replace('_', '-')}" if flag and optimizations.attention == "auto" else ""


def with_comfyui_attention(kernels: Kernels, optimizations: Optimizations, options: dict[str, Any]) -> Kernels:
    """`kernels`, with ComfyUI's self-attention if `attention_by_comfyui` says so.

    Cross-attention keeps our kernel: padding is a single key with a raised logit, which few kernels support.
    """
    if not attention_by_comfyui(optimizations, options):
        return kernels
    return kernels._replace(attend=ComfyAttention(options), quantized=None)
