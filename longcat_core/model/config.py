"""The two parameter sets of the network: what it is (`ModelConfig`) and how it is run (`Optimizations`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ..errors import LongCatError

TextMode = Literal["exact", "packed", "padded"]
CompileMode = Literal["off", "blocks"]


def swiglu_hidden(hidden_size: int, mlp_ratio: float, multiple_of: int = 256) -> int:
    """Width of the gated FFN: two thirds of `mlp_ratio * hidden_size`, rounded up to a multiple of 256."""
    hidden = int(2 * int(hidden_size * mlp_ratio) / 3)
    return multiple_of * ((hidden + multiple_of - 1) // multiple_of)


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a LongCat-Video transformer. The defaults are the released 13.58 B model.

    Channels count features, not bytes; `patch_size` is (frames, rows, columns) of latents per token.
    """

    in_channels: int = 16
    out_channels: int = 16
    hidden_size: int = 4096
    depth: int = 48
    num_heads: int = 32
    caption_channels: int = 4096
    ffn_hidden: int = 11008
    adaln_dim: int = 512
    frequency_dim: int = 256
    patch_size: tuple[int, int, int] = (1, 2, 2)
    text_tokens_zero_pad: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (not isinstance(value, int) or value < 1):
                raise LongCatError(f"model config: {field.name} is {value!r}; it must be a whole number of at least 1")
        if self.hidden_size % self.num_heads:
            raise LongCatError(
                f"model config: hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}"
            )
        if self.head_dim % 8:
            # An even share of channels for each of the three axes of RoPE needs it.
            raise LongCatError(f"model config: head dim {self.head_dim} must be a multiple of 8 for 3-D RoPE")
        if len(self.patch_size) != 3 or not all(isinstance(n, int) and n >= 1 for n in self.patch_size):
            raise LongCatError(f"model config: patch_size {self.patch_size} must be three whole numbers of at least 1")
        if self.patch_size[0] != 1:
            raise LongCatError(
                f"model config: patch_size {self.patch_size} joins frames; only 1 frame a token is known"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Read the keys of an official `dit/config.json`; keys that say nothing of the network are ignored."""
        names = {
            "adaln_tembed_dim": "adaln_dim",
            "frequency_embedding_size": "frequency_dim",
            # FastVideo's word.
            "num_attention_heads": "num_heads",
        }
        known = {f.name for f in fields(cls)}
        kwargs = {names.get(k, k): v for k, v in values.items() if names.get(k, k) in known}
        if "patch_size" in kwargs:
            kwargs["patch_size"] = tuple(kwargs["patch_size"])
        if "ffn_hidden" not in kwargs:
            kwargs["ffn_hidden"] = swiglu_hidden(kwargs.get("hidden_size", cls.hidden_size), values.get("mlp_ratio", 4))
        return cls(**kwargs)

    @classmethod
    def from_json(cls, path: Path) -> ModelConfig:
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise LongCatError(
                f"{path} is no readable model config ({error}); give a folder with its config.json"
            ) from error
        if not isinstance(values, dict):
            raise LongCatError(f"{path} holds no JSON object; give a folder with the model's own config.json")
        try:
            return cls.from_dict(values)
        except LongCatError:
            raise
        except (TypeError, ValueError, OverflowError) as error:
            raise LongCatError(
                f"{path} has a value of the wrong kind ({error}); give a folder with the model's own config.json"
            ) from error

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


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
        8-bit GEMMs in layers whose weights were quantised to fp8; off: the same weights, multiplied out, in 16-bit
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
