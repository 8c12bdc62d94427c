"""State dicts in ComfyUI: from a checkpoint's names to the network's fused ones, and to official ones for saving."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor, get_layout_class
from torch import Tensor

from ..longcat_core.checkpoints.formats import BESIDE, OFFICIAL, Format, Table, detect, for_network
from ..longcat_core.checkpoints.load import Checkpoint, empty_parameters, open_checkpoint
from ..longcat_core.checkpoints.packings import TILE
from ..longcat_core.checkpoints.quantized import MARKERS, described_beside
from ..longcat_core.checkpoints.stored import Stored, collect, match_parameters
from ..longcat_core.errors import listed
from ..longcat_core.model.config import ModelConfig
from ..longcat_core.optimize.quantization import Policy, dequantized, without_scales
from .comfy_attention import reads_preferences
from .comfy_reading import PLACE, Unread

SOURCE = "the LongCat-Video checkpoint"
# What newer versions of ComfyUI write beside the weights of an attention layer: which kernel it wants.
SETTING = ".comfy_attention.config"
FP8 = ("float8_e4m3fn", "float8_e5m2")
# Formats whose scales are in tiles.
TILES = ("nvfp4", "mxfp8")
# What rows and columns must be multiples of. For other sizes, kernels of comfy-kitchen 0.2.31 to 0.2.40 (backends/cuda)
# raise an error instead of leaving the layer to PyTorch: CUTLASS loads 16 bytes, cuBLAS takes only multiples of 4;
# convrot_w4a4 packs 64 numbers; asym_w4a8_int8 undoes one size of rotation; nvfp4 takes 16 bytes. mxfp8 pads.
MULTIPLES = {"int8_tensorwise": (16, 16), "convrot_w4a4": (16, 64), "asym_w4a8_int8": (1, 256), "nvfp4": (1, 32)}
# PyTorch multiplies e4m3 in 8 bits if both sides are multiples of this.
FP8_MULTIPLE = 16
# The dtypes and dimensions in which every backend takes the tensors of asym_w4a8_int8; ComfyUI views bytes as e4m3.
W4A8 = {
    "weight_s_rel": ((torch.float8_e4m3fn, torch.uint8, torch.float32), 2),
    "weight_s_channel": ((torch.float32,), 1),
    "weight_codebook": ((torch.float32,), 1),
}
# Tensors of a quantized layer that have numbers for each row in any format.
ROWS = ("weight", "bias", "weight_s_rel", "weight_s_channel")


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
        if buffer is not None and hasattr(tensor, PLACE):
            file, place = getattr(tensor, PLACE)
            return file.rows(place, start, stop, buffer)
        return tensor[start:stop] if tensor.ndim else tensor


def from_checkpoint(state: dict[str, Tensor], config: ModelConfig, rowwise: bool = False) -> Unread:
    """The network's weights out of `state`, a checkpoint of any form; `state` is emptied meanwhile, to save memory.

    Layers that ComfyUI can run quantized, by their `comfy_quant` tensors, keep their tensors; split ones are stacked if
    that is exact (`joined`). All other quantized weights are dequantized to bf16, later, when `Unread` is read, as well
    as weights in files are read and, if `rowwise`, those of 8-bit layers quantized. Keys that the network does not know
    are kept, for ComfyUI to report. Raises CheckpointError naming what is missing or has the wrong shape.
    """
    form, _ = detect(state, SOURCE)
    correct(state)
    place, file = Path(SOURCE), StateDict(state)
    stored, _ = collect(place, {place: file}, form, "", left=QUANT_ALGOS)
    for name, dtype in stored.dtypes.items():
        if name not in stored.packed and state[name].dtype != dtype:
            # fp8 that is stored as bytes, which ComfyUI would take for whole numbers.
            state[name] = state[name].view(dtype)
    parameters = empty_parameters(config)
    checkpoint = Checkpoint(**(vars(stored) | {"depth": config.depth}), config=config).fitted(parameters)
    sources = dict(form.modules(config.depth))
    hears = config.audio is not None
    eight_bit = {f"{module}.weight" for module in Policy().names(config.depth, hears)} if rowwise else set()
    whole = {modules[0]: module for module, modules in sources.items() if len(modules) == 1}
    described = dict(described_beside(file.header, file.rows, SOURCE))
    beside: dict[str, list[str]] = {}
    for name in state:
        layer, _, suffix = name.rpartition(".")
        if layer in described and suffix != "bias":
            beside.setdefault(layer, []).append(suffix)

    out = {}
    for module, layers in sources.items():
        if f"{module}.weight" in eight_bit or not all(
            runs(checkpoint, layer, described.get(layer)) for layer in layers
        ):
            continue
        parts = [{suffix: state[f"{layer}.{suffix}"] for suffix in beside[layer]} for layer in layers]
        found = joined(parts, described[layers[0]]["format"])
        if found is not None:
            out |= {f"{module}.{suffix}": tensor for suffix, tensor in found.items()}
            del parameters[f"{module}.weight"]
            for layer in layers:
                for suffix in beside[layer]:
                    del state[f"{layer}.{suffix}"]
    unread, kept = {}, {}
    for name, parts in match_parameters(checkpoint, parameters, allow_unknown=True).items():
        tensors = [state[part.name] for part in parts]
        widened = any(part.scale or part.name in checkpoint.packed for part in parts)
        if name in eight_bit or widened or all(hasattr(tensor, PLACE) for tensor in tensors):
            unread[name] = parts
        else:
            out[name] = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        module, _, kind = name.rpartition(".")
        used = [stored for part in parts for stored in (part.name, part.scale)]
        packed = [checkpoint.packed[part.name] for part in parts if part.name in checkpoint.packed]
        used += [key for weight in packed for key, _ in weight.beside.values()]
        used += [f"{source}.{suffix}" for source in sources[module] for suffix in BESIDE if kind == "weight"]
        for stored in used:
            tensor = state.pop(stored, None)
            if tensor is not None and name in unread:
                kept[stored] = tensor
    file.state = kept
    for marker in MARKERS:
        state.pop(marker, None)
    out |= _attention_settings(state, sources, config.depth)
    for key in list(state):
        source, _, kind = key.rpartition(".")
        out[f"{whole.get(source, source)}.{kind}" if source else kind] = state.pop(key)
    return Unread(out, unread, checkpoint)


def runs(stored: Stored, layer: str, description: Mapping[str, Any] | None) -> bool:
    """Whether this ComfyUI runs a layer of a file by itself, on the CPU and on any card that has its kernels.

    description: the layer's, None for one without.
    """
    weight = f"{layer}.weight"
    kind = "" if description is None or weight not in stored.where else description.get("format", "")
    if kind not in QUANT_ALGOS:
        return False
    packed = stored.packed.get(weight)
    shape = stored.shapes[weight] if packed is None else packed.shape
    multiples = MULTIPLES.get(kind, (1, 1))
    if any(side % multiple for side, multiple in zip(shape, multiples, strict=False)):
        return False
    if packed is None:
        # Its fp8 layers take one scale.
        scales = (stored.shapes.get(name, ()) for name in (f"{weight}_scale", f"{layer}.scale_weight"))
        return kind not in FP8 or all(prod(shape) == 1 for shape in scales)
    # ComfyUI ignores tensors that its version does not know, and a LoRA does not fit a weight of smoothed inputs.
    known = {"weight_scale", "weight_scale_2", "weight_s_rel", "weight_s_channel", "weight_codebook"}
    if not known.issuperset(packed.beside):
        return False
    beside = {suffix: stored.files[file].header[stored.prefix + name] for suffix, (name, file) in packed.beside.items()}
    if kind == "convrot_w4a4":
        return len(beside["weight_scale"][1]) == 1
    if kind != "asym_w4a8_int8":
        return True
    group, six_bits = packed.settings.get("group_size", 16), packed.stored[1] * 2 > packed.shape[1]
    # Its kernels undo only rotations of this size.
    turned = packed.settings.get("convrot_groupsize", 256) == MULTIPLES[kind][1]
    grouped = group % 16 == 0 or (group in (4, 8) and not six_bits)
    plain = all(
        dtype in dtypes and len(beside_shape) == dimensions
        for suffix, (dtype, beside_shape) in beside.items()
        for dtypes, dimensions in [W4A8[suffix]]
    )
    layout = get_layout_class(QUANT_ALGOS[kind]["comfy_tensor_layout"])
    return turned and grouped and plain and (not six_bits or hasattr(layout, "bits"))


def joined(parts: list[dict[str, Tensor]], kind: str) -> dict[str, Tensor] | None:
    """Quantized layers of one input as one layer, with the numbers that they have; None if that is impossible.

    parts: tensors of the layers by their suffixes, as files have them. kind: the format in which all of them are.
    """
    if any(part.keys() != parts[0].keys() for part in parts):
        return None
    for part in (parts := [dict(part) for part in parts]):
        weight, scale, storage = part["weight"], part.get("weight_scale"), QUANT_ALGOS[kind]["storage_t"]
        if weight.element_size() == storage.itemsize:
            # Bytes that the file calls otherwise; ComfyUI would convert their numbers.
            part["weight"] = weight.view(storage)
        if kind == "int8_tensorwise" and scale is not None and (len(parts) > 1 or scale.numel() > 1):
            # Any layer of this kind may have a scale for each row.
            part["weight_scale"] = scale.reshape(-1, 1).expand(len(weight), 1)
    if len(parts) == 1:
        return parts[0]
    if kind in TILES and any(len(part["weight"]) % TILE[0] for part in parts):
        # Their scales fill their last tile in part.
        return None
    out = {}
    for suffix, first in parts[0].items():
        tensors = [part[suffix] for part in parts]
        if by_rows(suffix, kind):
            out[suffix] = torch.cat(tensors)
        elif all(tensor.dtype == first.dtype and torch.equal(_bytes(tensor), _bytes(first)) for tensor in tensors):
            out[suffix] = first
        else:
            return None
    return out


def by_rows(suffix: str, kind: str) -> bool:
    """Whether a tensor of a quantized layer has numbers for each row, or tile of rows, one after the other."""
    return suffix in ROWS or (suffix == "weight_scale" and kind not in FP8)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def logical_shapes(state: Mapping[str, Tensor], form: Format) -> dict[str, tuple[int, ...]]:
    """The shapes of a checkpoint's tensors, packed ones as the matrices that they hold. Raises CheckpointError."""
    place, given = Path(SOURCE), dict(state)
    correct(given)
    return collect(place, {place: StateDict(given)}, form, "", left=QUANT_ALGOS)[0].shapes


def _attention_settings(state: dict[str, Tensor], sources: Table, depth: int) -> dict[str, Tensor]:
    """Taken out of `state`: what the file sets about the attention of each block, under the network's names.

    Settings of layers for which this ComfyUI, or this network, has no choice are left out, with a note.
    """
    projections = {f"blocks.{i}.attn": sources[f"blocks.{i}.attn.proj"][0] for i in range(depth)}
    layers = {source.rpartition(".")[0]: ours for ours, source in projections.items()}
    found, ignored = {}, []
    for key in [key for key in state if key.endswith(SETTING)]:
        layer, setting = key.removesuffix(SETTING), state.pop(key)
        if reads_preferences() and layer in layers:
            found[layers[layer] + SETTING] = setting
        else:
            ignored.append(layer)
    if ignored:
        logging.warning(
            "LongCat: the checkpoint sets the attention of %s, which is ignored: %s",
            listed(ignored),
            "only self-attention has a choice" if reads_preferences() else "newer versions of ComfyUI read that",
        )
    return found


def correct(state: dict[str, Tensor]) -> None:
    """Describe the layers of `state` as ComfyUI must read them (`meant`)."""
    for layer, description in described_beside(StateDict(state).header, state.__getitem__, SOURCE):
        weight = state.get(f"{layer}.weight")
        if weight is not None and (found := meant(description, weight.dtype, weight.shape)) != description:
            state[f"{layer}.comfy_quant"] = as_description(found)


def meant(description: Mapping[str, Any], dtype: torch.dtype, shape: Sequence[int]) -> dict[str, Any]:
    """A layer's description as ComfyUI must read it; dtype, shape: of its weight as stored.

    ComfyUI describes all weights of a file with a marker as e4m3, e5m2 too, and does not know descriptions without a
    format, which are of int8. It multiplies in 8 bits what CUDA does not multiply, unless the description says
    otherwise: e5m2 by e5m2, and e4m3 of any size.
    """
    found = dict(description)
    if found.get("format") == "float8_e4m3fn" and dtype == torch.float8_e5m2:
        found["format"] = "float8_e5m2"
    elif found.get("format") is None and "per_row" in found:
        found["format"] = "int8_tensorwise"
    odd = any(side % FP8_MULTIPLE for side in shape)
    if found.get("format") == "float8_e5m2" or (found.get("format") == "float8_e4m3fn" and odd):
        found["full_precision_matrix_mult"] = True
    return found


def as_description(settings: Mapping[str, Any]) -> Tensor:
    """The description of a quantized layer as files hold it: JSON, uint8 [n]."""
    return torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)


def open_for_comfyui(path: str | Path) -> Checkpoint:
    """`open_checkpoint` of a file that ComfyUI is to load, which runs more quantized formats than we do."""
    return open_checkpoint(path, left=QUANT_ALGOS)


def to_official(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Stacked weights split into the rows that the official form keeps apart, without a copy.

    8-bit layers with scales of their rows are dequantized to bf16 on the CPU.
    """
    form = for_network(OFFICIAL, config.audio is not None)
    table, parameters = dict(form.modules(config.depth)), empty_parameters(config)
    kinds = {layer: conf["format"] for layer, conf in described_beside(StateDict(state).header, state.get, SOURCE)}
    # ComfyUI 0.8 would write the bytes of packed weights as wide numbers.
    wide = {layer for layer in kinds if isinstance(state[f"{layer}.weight"], QuantizedTensor)}
    out = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if module in wide and kind not in ("weight", "bias"):
            continue
        if isinstance(tensor, QuantizedTensor):
            tensor = tensor.dequantize().to(torch.bfloat16)
        sources = table.get(module, (module,))
        if len(sources) > 1 and type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            # ComfyUI's stand-in for a weight whose LoRAs are merged when it is moved; its rows would lack them.
            tensor = tensor.to("cpu")
        packed = kind == "weight" and module not in kinds and tensor.dtype == torch.float8_e4m3fn
        if packed and tensor.shape != parameters[name].shape:
            tensor = dequantized(*without_scales(tensor.to("cpu"), parameters[name].shape[0]), torch.bfloat16)
        shared = module in kinds and not by_rows(kind, kinds[module])
        if len(sources) == 1:
            parts = [tensor]
        elif shared:
            # Files do not hold one tensor under two names.
            parts = [tensor.clone() for _ in sources]
        else:
            parts = tensor.chunk(len(sources))
        out |= {f"{source}.{kind}": part for source, part in zip(sources, parts, strict=True)}
    return out
