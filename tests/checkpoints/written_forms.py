"""Checkpoints in the forms that are found in the wild, written from the golden model.

By rules on names of their own, not by the loader's tables: what those have wrong must not be wrong here too.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

State = dict[str, Tensor]

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# Official beginnings of names -> those of other forms; longer ones first. Fused layers are split before.
COMFYUI = (
    (r"^x_embedder\.proj", "patch_embedding"),
    (r"^t_embedder", "time_embedding"),
    (r"^y_embedder\.y_proj", "text_embedding"),
    (r"^final_layer\.linear", "head.head"),
    (r"^final_layer\.adaLN_modulation", "head.modulation"),
    (r"\.adaLN_modulation", ".modulation"),
    (r"\.pre_crs_attn_norm", ".norm3"),
    (r"(?<!audio_cross_attn)\.([qk])_norm", r".norm_\1"),
    (r"(?<!audio_cross_attn)\.proj\b", ".o"),
    (r"\.attn\b", ".self_attn"),
    (r"(?<!audio_cross_attn)\.q_linear", ".q"),
    # Of the avatar.
    (r"^audio_proj", "multitalk_audio_proj"),
    (r"\.audio_adaLN_modulation", ".audio_modulation"),
    (r"\.pre_video_crs_attn_norm", ".norm_x"),
)
FASTVIDEO = (
    (r"^x_embedder", "patch_embed"),
    (r"^t_embedder\.mlp\.0", "time_embedder.linear_1"),
    (r"^t_embedder\.mlp\.2", "time_embedder.linear_2"),
    (r"^y_embedder\.y_proj\.0", "caption_embedder.linear_1"),
    (r"^y_embedder\.y_proj\.2", "caption_embedder.linear_2"),
    (r"^final_layer\.linear", "final_layer.proj"),
    (r"^final_layer\.adaLN_modulation\.1", "final_layer.adaln_linear"),
    (r"\.adaLN_modulation\.1", ".adaln_linear_1"),
    (r"\.pre_crs_attn_norm", ".norm_cross"),
    (r"attn\.proj\b", "attn.to_out"),
    (r"\.attn\b", ".self_attn"),
    (r"\.q_linear", ".to_q"),
    (r"\.(q|k|v)\.(weight|bias)$", r".to_\1.\2"),
)


def renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, new in rules:
        name = re.sub(pattern, new, name)
    return name


def split(state: State) -> State:
    """qkv and kv_linear as q, k, v by themselves."""
    out = {}
    for name, tensor in state.items():
        match = re.search(r"(?<!audio_cross_attn)\.(qkv|kv_linear)\.", name)
        letters = "" if match is None else match[1].removesuffix("_linear")
        for letter, part in zip(letters, tensor.chunk(max(1, len(letters))), strict=False):
            out[name.replace(match[1], letter)] = part
        if match is None:
            out[name] = tensor
    return out


def comfyui(state: State) -> State:
    return {renamed(name, COMFYUI): tensor for name, tensor in split(state).items()}


def fastvideo(state: State) -> State:
    return {renamed(name, FASTVIDEO): tensor for name, tensor in split(state).items()}


def is_matrix(name: str, tensor: Tensor) -> bool:
    """A weight that such files have in 8 bits: of the blocks' projections, not of embeddings, modulation and head."""
    return tensor.ndim == 2 and re.search(r"blocks\.\d+\.(\w*attn|ffn)\.", name) is not None


def fp8_scaled(state: State, *, scale: str = "scale_weight", marker: bool = True, rows: bool = False) -> State:
    """e4m3 with a scale for each matrix, or for each of its rows; everything else in bf16."""
    out = {}
    for name, tensor in state.items():
        if not is_matrix(name, tensor):
            out[name] = tensor.bfloat16()
            continue
        factor = (tensor.abs().amax(1, keepdim=True) if rows else tensor.abs().max()) / 448
        out[name] = (tensor / factor).to(E4M3)
        out[name.removesuffix("weight") + scale] = factor
    return out | ({"scaled_fp8": torch.empty(0, dtype=E4M3)} if marker else {})


def described(state: State, kind: str) -> State:
    """Every layer with a scale also with the description of it that newer ComfyUI writes."""
    out = dict(state)
    for name in state:
        if name.endswith(".weight_scale"):
            text = json.dumps({"format": kind}).encode()
            out[name.replace("weight_scale", "comfy_quant")] = torch.tensor(list(text), dtype=torch.uint8)
    return out


def multiplied_out(state: State) -> State:
    """8-bit weights times their scales, and no scales."""
    out = {}
    for name, tensor in state.items():
        factors = [state.get(name.removesuffix("weight") + suffix) for suffix in ("scale_weight", "weight_scale")]
        factor = next((f for f in factors if f is not None), None)
        if name.endswith((".scale_weight", ".weight_scale", ".comfy_quant")) or name == "scaled_fp8":
            continue
        wide = tensor.float()
        out[name] = wide if factor is None or not name.endswith("weight") else wide * factor
    return out


# GGUF


def q4_k(rows: np.ndarray) -> np.ndarray:
    """Rows of 256 n numbers as Q4_K blocks, [rows, 144 n] bytes.

    A block: d and dmin fp16, eight 6-bit scales and mins in 12 bytes, 256 values of 4 bits; x = d*scale*q - dmin*min.
    """
    count, columns = rows.shape
    x = rows.reshape(count, columns // 256, 8, 32).astype(np.float32)
    low = np.minimum(x.min(-1), 0)
    step = (x.max(-1) - low) / 15
    d = np.maximum(step.max(-1, keepdims=True) / 63, 1e-12).astype(np.float16).astype(np.float32)
    dmin = np.maximum(-low.min(-1, keepdims=True) / 63, 1e-12).astype(np.float16).astype(np.float32)
    scale = np.clip(np.ceil(step / d), 1, 63).astype(np.uint8)
    least = np.clip(np.rint(-low / dmin), 0, 63).astype(np.uint8)
    q = np.rint((x + (dmin * least)[..., None]) / (d * scale)[..., None]).clip(0, 15).astype(np.uint8)
    packed = np.empty((*scale.shape[:-1], 12), dtype=np.uint8)
    packed[..., :4] = scale[..., :4] | (scale[..., 4:] >> 4) << 6
    packed[..., 4:8] = least[..., :4] | (least[..., 4:] >> 4) << 6
    packed[..., 8:] = (scale[..., 4:] & 15) | (least[..., 4:] & 15) << 4
    nibbles = q[..., 0::2, :] | q[..., 1::2, :] << 4
    parts = [d.astype(np.float16).view(np.uint8), dmin.astype(np.float16).view(np.uint8), packed]
    blocks = np.concatenate([*parts, nibbles.reshape(*packed.shape[:-1], 128)], -1)
    return np.ascontiguousarray(blocks.reshape(count, -1))


def write_gguf(path: Path, state: State, kinds: dict[str, str], *, flat_patches: bool = False) -> None:
    """kinds: name -> type of GGUF; others are F32. flat_patches: five dimensions as three, with the shape beside."""
    import gguf

    types = gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(path, arch="wan")
    for name, tensor in state.items():
        kind = types[kinds.get(name, "F32")]
        array = tensor.float().contiguous().numpy()
        if flat_patches and array.ndim == 5:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(array.shape))
            array = array.reshape(array.shape[0], array.shape[1], -1)
        if kind == types.Q4_K:
            writer.add_tensor(name, q4_k(array), raw_dtype=kind)
        else:
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
