"""ComfyUI's attention as a kernel of the network, for users who chose an attention in ComfyUI itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from comfy.cli_args import args
from comfy.ldm.modules import attention
from torch import Tensor

from ..longcat_core.optimize.attention import Kernels
from ..longcat_core.optimize.operators import Attend
from ..longcat_core.optimize.switches import Optimizations

# An attention of ComfyUI: (q, k, v, heads, transformer_options=...) -> [B, Nq, H * D].
Attention = Callable[..., Tensor]

OVERRIDE = "optimized_attention_override"
# The class of newer versions that reads the attention settings of one layer from a checkpoint.
PREFERENCE = "ComfyAttention"
# ComfyUI before 0.33 passes plain tensors.
CONTAINER = getattr(attention, "AttentionTensorContainer", lambda tensor: tensor)
# ComfyUI's command line options that name an attention, except --use-pytorch-cross-attention, our default anyway.
FLAGS = (
    "use_sage_attention",
    "use_flash_attention",
    "use_ck_attention",
    "use_split_cross_attention",
    "use_quad_cross_attention",
)


class ComfyAttention:
    """ComfyUI's attention over q [B, Nq, H, D] and k, v [B, Nk, H, D].

    options: transformer_options of the pass that runs. preferred: see `preferences`; own: our kernel, for blocks
    without a preference, or None: ComfyUI's attention runs there too.
    """

    def __init__(
        self, options: dict[str, Any], preferred: Sequence[Attention | None] = (), own: Attend | None = None
    ) -> None:
        self.options, self.preferred, self.own = options, preferred, own

    @torch.compiler.disable
    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        function = self.preferred[self.options["block_index"]] if self.preferred else None
        if function is None and self.own is not None:
            return self.own(q, k, v)
        heads = q.shape[2]
        # A kernel that declares containers may free each tensor once it is read; others get the tensors.
        tensors = [CONTAINER(part.flatten(2)) for part in (q, k, v)]
        del q, k, v
        out = (function or attention.optimized_attention)(*tensors, heads=heads, transformer_options=self.options)
        return out.unflatten(-1, (heads, -1))


def reads_preferences() -> bool:
    """Whether this ComfyUI reads the attention of single layers from checkpoints."""
    return hasattr(attention, PREFERENCE)


def add_preferences(blocks: Iterable[torch.nn.Module]) -> None:
    """Let each block's self-attention read a checkpoint's setting for it, if this ComfyUI does that."""
    for block in blocks if reads_preferences() else ():
        block.attn.comfy_attention = getattr(attention, PREFERENCE)()


def preferences(blocks: Iterable[torch.nn.Module]) -> list[Attention | None]:
    """The attention that the checkpoint sets in each block, if ComfyUI can run it here; [] if it sets none."""
    found = [getattr(getattr(block.attn, "comfy_attention", None), "function", None) for block in blocks]
    return found if any(found) else []


def attention_by_comfyui(
    optimizations: Optimizations, options: dict[str, Any], preferred: Sequence[Attention | None] = ()
) -> str:
    """What in ComfyUI decides which self-attention runs, in words; "" if `Optimizations.attention` decides.

    An override set by a node always decides. A checkpoint's settings, and after them a command line option, decide only
    if `attention` is auto.
    """
    if options.get(OVERRIDE) is not None:
        return "an attention override set by another node"
    if optimizations.attention != "auto":
        return ""
    if preferred:
        return f"the checkpoint's setting for {sum(map(bool, preferred))} of {len(preferred)} blocks"
    flag = _flag()
    return f"ComfyUI's --{flag.replace('_', '-')}" if flag else ""


def _flag() -> str | None:
    return next((flag for flag in FLAGS if getattr(args, flag, False)), None)


def with_comfyui_attention(
    kernels: Kernels,
    optimizations: Optimizations,
    options: dict[str, Any],
    preferred: Sequence[Attention | None] = (),
    sparse: bool = False,
) -> Kernels:
    """`kernels`, with ComfyUI's self-attention if `attention_by_comfyui` says so.

    Cross-attention keeps our kernel: padding is a single key with a raised logit, which few kernels support. sparse:
    whether self-attention is block-sparse, which gives cross-attention the kernel that self-attention had.
    """
    if not attention_by_comfyui(optimizations, options, preferred):
        return kernels
    attend = ComfyAttention(options)
    if preferred and options.get(OVERRIDE) is None:
        attend = ComfyAttention(options, preferred, None if _flag() else kernels.attend)
    text = kernels.text or kernels.attend if sparse else kernels.text
    return kernels._replace(attend=attend, text=text, quantized=None)
