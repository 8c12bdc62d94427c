"""The switches: how a loaded network is run. Every optimization is one field here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import LongCatError
from ..model.text import TextMode

CompileMode = Literal["off", "blocks"]


@dataclass(frozen=True)
class Optimizations:
    """How the network is run. Each field is one switch; all of them flip on a loaded model.

    fused_qkv
        One GEMM for q, k, v (and for k, v of the text); off: one GEMM per slice of the same weight. Exact.
    fused_ffn
        One GEMM for gate and up; off: two. Exact.
    text_mode
        Which text keys cross-attention sees. `exact`: what the checkpoint defines, at the least cost: with
        `text_tokens_zero_pad` all padding is folded into one key whose logit is raised by ln(count), without it
        padding is dropped. `padded`: the same values the plain way, over every position. `packed`: padding is
        dropped always; on a `text_tokens_zero_pad` checkpoint (the released one) that changes the output.
    attention
        Name of an attention backend or `auto`, the fastest exact one that this machine has. Lossy ones (`cudnn-fp8`,
        `sage`) only by name; the first output is then checked, and one of NaN or zeros is computed anew by `auto`.
    compile
        `blocks`: torch.compile of the transformer block, one graph for all blocks, steps and prompts. Same
        mathematics, other rounding.
    explicit_fp32
        Modulation, norms and gates by explicit casts; off: autocast regions as public implementations have
        them (on CPU, where autocast knows no fp32, both are the same).
    gradient_checkpointing
        Recompute each block in the backward pass instead of keeping its activations. Exact.
    reuse_text
        Each block's keys and values of the text are computed once for a result of `embed_text`; off: at every step.
        Exact.
    reuse_modulation
        Time embedding and modulation once for every distinct timestep of a batch, which the halves of guidance and the
        frames share; off: for every frame of every sample. Exact.
    fused_step
        Guidance and the Euler step in one compiled function, in fp32. Acts where `compile` is on; without it the same
        function runs op by op. Same mathematics, other rounding.
    fp8
        8-bit GEMMs in layers whose weights were quantized to fp8; off: the same weights, multiplied out, in 16-bit
        GEMMs. Without effect on other layers. Lossy, and checked as a lossy attention is.
    fused_kernels
        The element-wise work of a block (norm with modulation or RoPE, residual with gate, silu(gate) * up) by Triton
        kernels of our own, on CUDA and in 16 bits; off, and elsewhere: by PyTorch or its compiler. Same mathematics,
        other rounding.
    split_guidance
        The halves of guidance one after the other instead of as one batch: activations take half the memory. Same
        mathematics, other rounding where kernels choose by batch.
    fused_text
        Attention to the text with the norm of its queries by a Triton kernel of our own, where fused_kernels acts and
        the text is short enough for it to be the faster one; folded padding stays folded there. Same mathematics, other
        rounding.
    """

    fused_qkv: bool = True
    fused_ffn: bool = True
    text_mode: TextMode = "exact"
    attention: str = "auto"
    compile: CompileMode = "off"
    explicit_fp32: bool = True
    gradient_checkpointing: bool = False
    reuse_text: bool = True
    reuse_modulation: bool = True
    fused_step: bool = True
    fp8: bool = True
    fused_kernels: bool = True
    split_guidance: bool = False
    fused_text: bool = True

    def __post_init__(self) -> None:
        for name, allowed in (("text_mode", ("exact", "packed", "padded")), ("compile", ("off", "blocks"))):
            value = getattr(self, name)
            if value not in allowed:
                raise LongCatError(f"optimization {name} is {value!r}; choose one of {', '.join(allowed)}")
