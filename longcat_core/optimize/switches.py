"""The switches that say how a loaded network runs. Every optimization is one field here."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

from ..errors import check_choice, check_type, plain_fields
from ..model.text import TextMode

CompileMode = Literal["off", "blocks"]
Exchange = Literal["exact", "messages", "int8"]


@dataclass(frozen=True)
class Optimizations:
    """How the network runs. Each field is one switch, which can be changed on a loaded model.

    fused_qkv
        One GEMM for q, k, v (and for k, v of the text); off: one GEMM per slice of the same weight. Exact.
    fused_ffn
        One GEMM for gate and up; off: two. Exact.
    text_mode
        Which text keys cross-attention reads. `exact`: what the checkpoint defines, at the least cost: with
        `text_tokens_zero_pad` all padding is folded into one key whose logit is raised by ln(count), without it
        padding is dropped. `padded`: the same values the plain way, over every position. `packed`: padding is
        always dropped, which changes the output of a `text_tokens_zero_pad` checkpoint (the released one).
    attention
        Name of an attention backend, or `auto`: the fastest exact one of this machine. Lossy ones (`cudnn-fp8`, `sage`)
        must be named; the first output is then checked, and if it is NaN or zero it is computed again by `auto`.
    compile
        `blocks`: torch.compile of the transformer block, one graph for all blocks, steps and prompts. Same
        mathematics, different rounding.
    explicit_fp32
        Modulation, norms and gates cast to fp32 explicitly; off: autocast regions, as in public implementations (on a
        CPU, where autocast does not support fp32, both are the same).
    gradient_checkpointing
        Recompute each block in the backward pass instead of keeping its activations. Exact.
    reuse_text
        Compute each block's keys and values of the text once per result of `embed_text`; off: at every step. Exact.
    reuse_modulation
        Compute time embedding and modulation once for a timestep that the halves of guidance and the frames share; off:
        for every frame of every sample. Exact.
    fused_step
        Guidance and the Euler step in one compiled function, in fp32, if `compile` is on; otherwise the same function
        runs op by op. Same mathematics, different rounding.
    fp8
        8-bit GEMMs in layers whose weights were quantized to fp8; off: 16-bit GEMMs of the dequantized weights. Other
        layers are not affected. Lossy, and checked like a lossy attention backend.
    fused_kernels
        Our Triton kernels for the element-wise work of a block (norm with modulation or RoPE, residual with gate,
        silu(gate) * up), on CUDA in 16 bits; off, and elsewhere: PyTorch or its compiler. Same mathematics, different
        rounding.
    split_guidance
        Run the halves of guidance one after the other instead of as one batch: activations take half the memory. Same
        mathematics, different rounding if kernels depend on the batch.
    fused_text
        Our Triton kernel for attention to the text, including the norm of its queries, if fused_kernels applies and the
        text is short enough for it to be the fastest; folded padding stays folded. Same mathematics, different
        rounding.
    exchange
        How GPUs that share the tokens of a video send queries, keys, values and attention's output to each other.
        `exact`: by writing into each other's memory where they reach it, else as `messages`, by the messages of
        `torch.distributed`; both give the same. `int8`: by messages, with a scale for each token and head, in half of
        the bytes. Lossy, and checked like a lossy attention backend. Without effect on one GPU.
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
    exchange: Exchange = "exact"

    @property
    def lossy_exchange(self) -> bool:
        """Whether what GPUs send to each other loses precision."""
        return self.exchange == "int8"

    def __post_init__(self) -> None:
        plain_fields(self)
        for name, allowed in (
            ("text_mode", ("exact", "packed", "padded")),
            ("compile", ("off", "blocks")),
            ("exchange", get_args(Exchange)),
        ):
            check_choice(f"optimization {name}", getattr(self, name), allowed)
        check_type("optimization attention", self.attention, str, "the name of a backend, or auto")
        for switch in fields(self):
            if isinstance(switch.default, bool):
                check_type(f"optimization {switch.name}", getattr(self, switch.name), bool, "True or False")
