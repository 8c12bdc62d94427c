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

# Folder -> names of the GGUF files in it, and the times of its folders when they were looked for.
_searched: dict[str, tuple[list[str], dict[str, float]]] = {}


def choices_of(node_id: str) -> dict[str, Sequence[str]]:
    """Input -> its choices now, of the inputs of a node whose choices are not declared."""
    if node_id == "LongCatModelLoader":
        return {"model_name": model_names(), "weight_dtype": [*WEIGHT_DTYPES, FP8_ROWWISE]}
    if node_id == "LongCatTextEncoderLoader":
        return {"text_encoder_name": text_encoder_names()}
    if node_id == "LongCatAudioEncoderLoader":
        return {"audio_encoder_name": audio_encoder_names()}
    if node_id == "LongCatOptimizations":
        from ..longcat_core.optimize.attention import listed

        return {"attention": listed()}
    return {}


def model_names() -> list[str]:
    """Names of single files and, in place of shards, of their folders, as ComfyUI lists names."""
    names = {}
    gguf = [name for root in folder_paths.get_folder_paths("diffusion_models") for name in _gguf_names(root)]
    for name in [*folder_paths.get_filename_list("diffusion_models"), *sorted(gguf)]:
        if name.lower().endswith((".safetensors", ".sft", ".gguf")):
            names[os.path.dirname(name) if "-of-" in os.path.basename(name) else name] = None
    return [name for name in names if name]


def _gguf_names(root: str) -> list[str]:
    """Names of the GGUF files in a folder, which ComfyUI cannot load itself and does not list. As its own lists, this
    one is made again when a folder has changed: ComfyUI asks several times for each prompt."""
    names, folders = _searched.get(root, ([], {root: -1.0}))
    if any(not os.path.isdir(folder) or os.path.getmtime(folder) != then for folder, then in folders.items()):
        found, folders = folder_paths.recursive_search(root)
        names = [name for name in found if name.lower().endswith(".gguf")]
        _searched[root] = names, folders
    return names


def text_encoder_names() -> list[str]:
    return _safetensors("text_encoders")


def audio_encoder_names() -> list[str]:
    return _safetensors("audio_encoders")


def _safetensors(kind: str) -> list[str]:
    names = folder_paths.get_filename_list(kind)
    return [name for name in names if name.lower().endswith((".safetensors", ".sft"))]
