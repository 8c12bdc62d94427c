"""State dicts in ComfyUI: from a checkpoint's names to the network's fused ones, and to official ones for saving."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from comfy.quant_ops import QUANT_ALGOS
from torch import Tensor

from ..longcat_core.checkpoints.formats import BESIDE, OFFICIAL, detect
from ..longcat_core.checkpoints.load import Checkpoint, open_checkpoint
from ..longcat_core.checkpoints.quantized import MARKERS, described_beside
from ..longcat_core.checkpoints.reader import Reader
from ..longcat_core.checkpoints.stored import collect, match_parameters
from ..longcat_core.model.config import ModelConfig
from ..longcat_core.model.transformer import LongCatTransformer
from ..longcat_core.optimize.quantization import Policy, dequantized, without_scales

SOURCE = "the LongCat-Video checkpoint"


@dataclass
class StateDict:
    """Tensors in memory as one file of a `Checkpoint`."""

    state: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def header(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self.state.items()}

    def rows(self, name: str, start: int = 0, stop: int | None = None, buffer: Tensor | None = None) -> Tensor:
        tensor = self.state[name]
        return tensor[start:stop] if tensor.ndim else tensor


def from_checkpoint(state: dict[str, Tensor], config: ModelConfig, rowwise: bool = False) -> dict[str, Tensor]:
    """The network's weights out of `state`, a checkpoint of any form; `state` is emptied meanwhile, to save memory.

    Split weights are stacked, and 8-bit ones with scales are dequantized to bf16, except layers that ComfyUI can run
    quantized: those described by a `comfy_quant` tensor and stored whole. rowwise: layers that become fp8 row by row
    keep stored e4m3 values, with their scales as `weight_scale` [out, 1] fp32. Keys that the network does not know are
    kept, for ComfyUI to report. Raises CheckpointError naming what is missing or has the wrong shape.
    """
    form, _ = detect(state, SOURCE)
    _correct(state)
    place, file = Path(SOURCE), StateDict(state)
    stored, _ = collect(place, {place: file}, form, "", left=QUANT_ALGOS)
    for name, dtype in stored.dtypes.items():
        if state[name].dtype != dtype:
            # fp8 that is stored as bytes, which ComfyUI would take for whole numbers.
            state[name] = state[name].view(dtype)
    checkpoint = Checkpoint(**(vars(stored) | {"depth": config.depth}), config=config)
    reader, sources = Reader(checkpoint), dict(form.modules(config.depth))
    eight_bit = {f"{module}.weight" for module in Policy().names(config.depth)} if rowwise else set()
    whole = {modules[0]: module for module, modules in sources.items() if len(modules) == 1}
    described = dict(described_beside(file.header, file.rows, SOURCE))
    # ComfyUI runs their format, and they are stored whole.
    quantized = {layer for layer, conf in described.items() if conf["format"] in QUANT_ALGOS and layer in whole}
    left_to_comfyui = {f"{whole[layer]}.weight" for layer in quantized if f"{layer}.weight" in state} - eight_bit
    parameters = {name: tensor for name, tensor in empty_parameters(config).items() if name not in left_to_comfyui}

    out = {}
    for name, parts in match_parameters(checkpoint, parameters, allow_unknown=True).items():
        rows = reader.e4m3(parts, "cpu") if name in eight_bit else None
        if rows is not None:
            out[name], out[f"{name}_scale"] = rows
        elif any(part.scale for part in parts):
            out[name] = reader.into(torch.empty(parameters[name].shape, dtype=torch.bfloat16), parts)
        else:
            tensors = [state[part.name] for part in parts]
            out[name] = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        module, _, kind = name.rpartition(".")
        used = [stored for part in parts for stored in (part.name, part.scale)]
        used += [f"{source}.{suffix}" for source in sources[module] for suffix in BESIDE if kind == "weight"]
        for stored in used:
            state.pop(stored, None)
    for marker in MARKERS:
        state.pop(marker, None)
    for key in list(state):
        source, _, kind = key.rpartition(".")
        out[f"{whole.get(source, source)}.{kind}" if source else kind] = state.pop(key)
    return out


def empty_parameters(config: ModelConfig) -> dict[str, Tensor]:
    """The network's parameters by name, on the meta device."""
    with torch.device("meta"):
        return LongCatTransformer(config).state_dict()


def _correct(state: dict[str, Tensor]) -> None:
    """Describe e5m2 weights as such: ComfyUI describes every weight of a file with a marker as e4m3."""
    for layer, description in described_beside(StateDict(state).header, state.__getitem__, SOURCE):
        weight = state.get(f"{layer}.weight")
        if description.get("format") == "float8_e4m3fn" and weight is not None and weight.dtype == torch.float8_e5m2:
            text = json.dumps(description | {"format": "float8_e5m2"}).encode()
            state[f"{layer}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)


def open_for_comfyui(path: str | Path) -> Checkpoint:
    """`open_checkpoint` of a file that ComfyUI is to load, which runs more quantized formats than we do."""
    return open_checkpoint(path, left=QUANT_ALGOS)


def to_official(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Stacked weights split into the rows that the official form keeps apart, without a copy.

    8-bit layers with scales of their rows are dequantized to bf16 on the CPU.
    """
    table, parameters = dict(OFFICIAL.modules(config.depth)), empty_parameters(config)
    out = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        sources = table.get(module, (module,))
        if len(sources) > 1 and type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            # ComfyUI's stand-in for a weight whose LoRAs are merged when it is moved; its rows would lack them.
            tensor = tensor.to("cpu")
        if tensor.dtype == torch.float8_e4m3fn and kind == "weight" and tensor.shape != parameters[name].shape:
            tensor = dequantized(*without_scales(tensor.to("cpu"), parameters[name].shape[0]), torch.bfloat16)
        parts = tensor.chunk(len(sources)) if len(sources) > 1 else (tensor,)
        out |= {f"{source}.{kind}": part for source, part in zip(sources, parts, strict=True)}
    return out
