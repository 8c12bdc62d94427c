"""The forms of weights in the matrix: which file, which loader, which weight_dtype; written from the nano model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longcat_core.checkpoints.convert import convert
from longcat_core.files.safetensors_io import read_header, read_tensors, write_safetensors
from longcat_core.generate.paths import NANO_MODEL

from ..checkpoints.written_forms import (
    E4M3,
    E5M2,
    comfyui,
    described,
    fastvideo,
    fp8_scaled,
    is_matrix,
    write_gguf,
)
from ..comfyui.prompts import FILES, node
from ..support.quantized_files import quantized

State = dict[str, Tensor]
OWN, STOCK = "LongCatModelLoader", "UNETLoader"
# Forms with the very numbers of the nano file: their videos are compared with one video of the CPU.
EXACT = "exact"
FOLDER = "matrix"


@dataclass(frozen=True)
class Weights:
    """One value of the axis. file: in models/diffusion_models. numbers: EXACT, or a name for what the file or the
    weight_dtype makes of the numbers, which the CPU's video shares."""

    loader: str
    file: str
    dtype: str
    numbers: str

    def node(self) -> dict[str, Any]:
        name = "model_name" if self.loader == OWN else "unet_name"
        return node(self.loader, **{name: self.file, "weight_dtype": self.dtype})


def plain(kind: torch.dtype) -> Callable[[State], State]:
    return lambda state: {name: t.to(kind) if is_matrix(name, t) else t for name, t in comfyui(state).items()}


def scaled_e5m2(state: State) -> State:
    return {name: t.to(E5M2) if t.dtype == E4M3 else t for name, t in fp8_scaled(comfyui(state)).items()}


# Name of the form -> what makes its tensors of the official ones.
MADE: dict[str, Callable[[State], State]] = {
    "ComfyUI names": comfyui,
    "FastVideo names": fastvideo,
    "scaled fp8": lambda state: fp8_scaled(comfyui(state)),
    "scaled fp8 by rows": lambda state: fp8_scaled(comfyui(state), rows=True),
    "scaled e5m2": scaled_e5m2,
    "plain e4m3": plain(E4M3),
    "plain e5m2": plain(E5M2),
    "comfy_quant fp8": lambda state: described(
        fp8_scaled(comfyui(state), scale="weight_scale", marker=False), "float8_e4m3fn"
    ),
}
# Of comfy-kitchen, which writes those that it can.
QUANTIZED = (
    "int8_tensorwise",
    "int8 convrot",
    "nvfp4",
    "mxfp8",
    "convrot_w4a4",
    "asym_w4a8_int8",
    "svdquant_w4a4",
    "awq_w4a16",
)
SHARDED, INT8, GGUF = "official shards", "official INT8", "GGUF Q8_0"


def file_of(form: str) -> str:
    return f"{FOLDER}/{form.lower().replace(' ', '_')}.{'gguf' if form == GGUF else 'safetensors'}"


def _axis() -> dict[str, Weights]:
    nano = FILES["model"]
    axis = {
        "bf16": Weights(OWN, nano, "default", EXACT),
        "weight_dtype bf16": Weights(OWN, nano, "bf16", EXACT),
        "weight_dtype fp16": Weights(OWN, nano, "fp16", EXACT),
        "weight_dtype fp32": Weights(OWN, nano, "fp32", EXACT),
        "weight_dtype fp8_e4m3fn": Weights(OWN, nano, "fp8_e4m3fn", "e4m3"),
        "fp8 rowwise": Weights(OWN, nano, "fp8 rowwise", "rowwise"),
        "UNETLoader": Weights(STOCK, nano, "default", EXACT),
        "UNETLoader fp8_e4m3fn": Weights(STOCK, nano, "fp8_e4m3fn", "e4m3"),
        "UNETLoader fp8_e4m3fn_fast": Weights(STOCK, nano, "fp8_e4m3fn_fast", "e4m3"),
        "UNETLoader fp8_e5m2": Weights(STOCK, nano, "fp8_e5m2", "e5m2"),
        SHARDED: Weights(OWN, f"{FOLDER}/dit", "default", EXACT),
        INT8: Weights(OWN, file_of(INT8), "default", INT8),
        GGUF: Weights(OWN, file_of(GGUF), "default", GGUF),
        f"{GGUF}, rowwise": Weights(OWN, file_of(GGUF), "fp8 rowwise", f"{GGUF}, rowwise"),
        "scaled fp8, rowwise": Weights(OWN, file_of("scaled fp8"), "fp8 rowwise", "scaled fp8, rowwise"),
    }
    for number, form in enumerate((*MADE, *QUANTIZED)):
        numbers = EXACT if form.endswith("names") else form
        # Both loaders take all of these; they take turns.
        axis[form] = Weights((STOCK, OWN)[number % 2], file_of(form), "default", numbers)
    return axis


AXIS = _axis()


def shards(state: State, folder: Path, count: int = 3) -> None:
    """The official folder: shards and their index, without a config."""
    folder.mkdir(parents=True)
    names, where = list(state), {}
    for i in range(count):
        part = f"diffusion_pytorch_model-{i + 1:05}-of-{count:05}.safetensors"
        write_safetensors(folder / part, {name: state[name] for name in names[i::count]})
        where |= dict.fromkeys(names[i::count], part)
    index = {"metadata": {}, "weight_map": where}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def write(models: Path) -> dict[str, str]:
    """Write every form under `models`/diffusion_models; names of the forms that could not be written -> why."""
    folder, missing = models / "diffusion_models", {}
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    state = read_tensors(NANO_MODEL)
    shards(state, folder / FOLDER / "dit")
    convert(NANO_MODEL, folder / file_of(INT8), "int8")
    for form in (*MADE, *QUANTIZED):
        try:
            made, metadata = (MADE[form](state), {}) if form in MADE else quantized(state, form)
            write_safetensors(folder / file_of(form), {n: t.contiguous() for n, t in made.items()}, metadata)
        except (RuntimeError, ImportError, ValueError) as error:
            missing[form] = f"{type(error).__name__}: {error}"
    try:
        split = comfyui(state)
        kinds = {name: "Q8_0" for name, t in split.items() if is_matrix(name, t) and t.shape[1] % 32 == 0}
        write_gguf(folder / file_of(GGUF), {n: t.contiguous() for n, t in split.items()}, kinds)
    except ImportError as error:
        missing[GGUF] = str(error)
    return missing


def lora(path: Path, model: Path = NANO_MODEL, rank: int = 4, strength: float = 0.05) -> None:
    """Write a LoRA in the official form on the attention and the FFN of every block of a file with official names."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, (_, shape) in read_header(model).items():
        found = re.fullmatch(r"(blocks\.\d+\.(?:attn\.(qkv|proj)|ffn\.w[123]))\.weight", name)
        if not found:
            continue
        (rows, columns), count = shape, 3 if found[2] == "qkv" else 1
        stem = "lora___lorahyphen___" + found[1].replace(".", "___lorahyphen___")
        down = torch.randn(rank * count, columns, generator=generator) * columns**-0.5
        tensors[f"{stem}.lora_down.weight"] = down
        for i in range(count):
            up = torch.randn(rows // count, rank, generator=generator) * strength
            tensors[f"{stem}.lora_up.blocks.{i}.weight" if count > 1 else f"{stem}.lora_up.weight"] = up
        tensors[f"{stem}.alpha_scale"] = torch.tensor(1.0)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, tensors)
