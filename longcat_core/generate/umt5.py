"""The UMT5 encoder's single-file form: Hugging Face T5 names, ComfyUI's scaled fp8, sizes inferred from the shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import CheckpointError

SPIECE = "spiece_model"  # the SentencePiece model itself, as uint8 [bytes]
EMBEDDING, TIED_EMBEDDING = "shared.weight", "encoder.embed_tokens.weight"
# What a file may hold besides the encoder's weights.
FP8_MARKER, FP8_SCALE, FP8_INPUT_SCALE = "scaled_fp8", ".scale_weight", ".scale_input"
_BLOCK = re.compile(r"encoder\.block\.(\d+)\.")


def weight_names(names: Mapping[str, object]) -> list[str]:
    """The names that are weights of the encoder: without vocabulary, fp8 scales and the tied copy of the embedding."""
    beside = (SPIECE, FP8_MARKER, TIED_EMBEDDING)
    return [name for name in names if name not in beside and not name.endswith((FP8_SCALE, FP8_INPUT_SCALE))]


def config_from_state(shapes: Mapping[str, tuple[int, ...]], source: str = "the text encoder") -> dict[str, int]:
    """UMT5Config's sizes for a state dict given as name -> shape.

    Raises CheckpointError, naming `source`, for anything but a UMT5 encoder with a gated feed-forward.
    """
    block = "encoder.block.0.layer"

    def sides(name: str) -> tuple[int, int]:
        shape = shapes.get(name, ())
        if len(shape) != 2:
            raise CheckpointError(
                f"{source} is not a UMT5 encoder: it has no matrix '{name}'; choose umt5_xxl, or longcat_nano_umt5 "
                "for the test model"
            )
        return shape[0], shape[1]

    vocab_size, d_model = sides(EMBEDDING)
    buckets, num_heads = sides(f"{block}.0.SelfAttention.relative_attention_bias.weight")
    inner, _ = sides(f"{block}.0.SelfAttention.q.weight")
    d_ff, _ = sides(f"{block}.1.DenseReluDense.wi_0.weight")
    num_layers = 1 + max(int(match[1]) for name in shapes if (match := _BLOCK.match(name)))
    # T5 1.1 has the same names, but one position bias for all blocks.
    if num_layers > 1 and "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight" not in shapes:
        raise CheckpointError(f"{source} is a T5 encoder, not UMT5, which has a position bias in every block")
    if inner % num_heads:
        raise CheckpointError(f"{source} has {num_heads} heads, which do not divide its {inner} attention channels")
    return {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "d_kv": inner // num_heads,
        "d_ff": d_ff,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "relative_attention_num_buckets": buckets,
    }


def dequantize(name: str, tensor: Tensor, scales: Mapping[str, Tensor]) -> Tensor:
    """The weight as stored, or weight * scale in fp32 where `scales` holds the module's `scale_weight`."""
    scale = scales.get(name.removesuffix(".weight") + FP8_SCALE)
    return tensor if scale is None else tensor.to(torch.float32) * scale.to(torch.float32)
