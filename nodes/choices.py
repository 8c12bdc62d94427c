"""Choices of inputs that depend on the machine: the user's files, and what is installed."""

from __future__ import annotations

import os
from collections.abc import Sequence

import folder_paths
import torch

WEIGHT_DTYPES = {
    "default": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8_e4m3fn": torch.float8_e4m3fn,
}
FP8_ROWWISE = "fp8 rowwise"


def choices_of(node_id: str) -> dict[str, Sequence[str]]:
    """Input -> its choices now, of the inputs of a node whose choices are not declared."""
    if node_id == "LongCatModelLoader":
        return {"model_name": model_names(), "weight_dtype": [*WEIGHT_DTYPES, FP8_ROWWISE]}
    if node_id == "LongCatTextEncoderLoader":
        return {"text_encoder_name": text_encoder_names()}
    if node_id == "LongCatOptimizations":
        from ..longcat_core.optimize.attention import listed

        return {"attention": listed()}
    return {}


def model_names() -> list[str]:
    """Names of single files and, in place of shards, of their folders, as ComfyUI lists names."""
    names = {}
    gguf = []
    for root in folder_paths.get_folder_paths("diffusion_models"):
        # ComfyUI does not list GGUF files, which it cannot load itself.
        gguf += [name for name in folder_paths.recursive_search(root)[0] if name.lower().endswith(".gguf")]
    for name in [*folder_paths.get_filename_list("diffusion_models"), *sorted(gguf)]:
        if name.lower().endswith((".safetensors", ".sft", ".gguf")):
            names[os.path.dirname(name) if "-of-" in os.path.basename(name) else name] = None
    return [name for name in names if name]


def text_encoder_names() -> list[str]:
    names = folder_paths.get_filename_list("text_encoders")
    return [name for name in names if name.lower().endswith((".safetensors", ".sft"))]
