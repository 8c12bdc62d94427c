"""State dicts: a checkpoint's names to the network's fused ones, and to official ones."""

from __future__ import annotations

import json

import torch
from comfy.quant_ops import QUANT_ALGOS
from torch import Tensor

from ..longcat_core.checkpoints.formats import BESIDE, MARKERS, OFFICIAL, QUANT_FORMATS, detect
from ..longcat_core.checkpoints.load import stored_part
from ..longcat_core.errors import CheckpointError
from ..longcat_core.model.config import ModelConfig
from ..longcat_core.model.transformer import LongCatTransformer
from ..longcat_core.optimize.quantization import Policy, dequantized, without_scales

_SHOWN = 5


def _parameters(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in LongCatTransformer(config).state_dict().items()}


def from_checkpoint(state: dict[str, Tensor], config: ModelConfig, rowwise: bool = False) -> dict[str, Tensor]:
    """The network's weights out of `state`, of any form, which is emptied on the way: what is split is stacked, INT8
    and fp8 with scales are multiplied out to bf16.

    What ComfyUI describes as quantized goes along as it is where its layer is stored whole: its layers have one scale.
    rowwise: layers that become fp8 by rows keep e4m3 numbers, and have their scales as `weight_scale` [out, 1].
    Raises CheckpointError naming what is missing or has the wrong shape. Keys of nothing in the network are kept.
    """
    form, _ = detect(state, "the LongCat-Video checkpoint")
    table = dict(form.modules(config.depth))
    eight_bit = {f"{module}.weight" for module in Policy().names(config.depth)} if rowwise else set()
    out, missing, wrong = {}, [], []
    for name, shape in _parameters(config).items():
        module, _, kind = name.rpartition(".")
        sources = table[module]
        parts = [stored_part(state, source, kind) for source in sources]
        lost = [f"{source}.{kind}" for source, part in zip(sources, parts, strict=True) if part is None]
        lost += [part.scale for part in parts if part and part.scale and part.scale not in state]
        if lost:
            missing += lost
            continue
        if kind == "weight" and name not in eight_bit and len(parts) == 1 and _comfyui_reads(state, sources[0]):
            out[name] = state.pop(parts[0].name)
            continue
        stored = [(state.pop(part.name), None if part.scale is None else state.pop(part.scale)) for part in parts]
        if kind == "weight":
            for source in sources:
                for suffix in BESIDE:
                    state.pop(f"{source}.{suffix}", None)
        want = (shape[0] // len(parts), *shape[1:])
        given = {source: tuple(tensor.shape) for source, (tensor, _) in zip(sources, stored, strict=True)}
        bad = [f"{source}: {list(size)} instead of {list(want)}" for source, size in given.items() if size != want]
        if bad:
            wrong += bad
            continue
        if name in eight_bit and all(tensor.dtype == torch.float8_e4m3fn for tensor, _ in stored):
            scales = [torch.ones(1) if scale is None else scale.float().flatten() for _, scale in stored]
            out[f"{module}.weight_scale"] = torch.cat([scale.expand(want[0]) for scale in scales])[:, None]
            tensors = [tensor for tensor, _ in stored]
        else:
            tensors = [tensor if scale is None else _multiplied_out(tensor, scale) for tensor, scale in stored]
        out[name] = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    for problem, names in (("lacks", missing), ("does not fit its own sizes in", wrong)):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            raise CheckpointError(
                f"the LongCat-Video checkpoint {problem} {'; '.join(names[:_SHOWN])}{more}; download it again"
            )
    for marker in MARKERS:
        state.pop(marker, None)
    whole = {sources[0]: module for module, sources in table.items() if len(sources) == 1}
    for key in list(state):
        source, _, kind = key.rpartition(".")
        out[f"{whole.get(source, source)}.{kind}" if source else kind] = state.pop(key)
    return out


def _comfyui_reads(state: dict[str, Tensor], layer: str) -> bool:
    """Whether a layer is described as quantized in a way that is left to ComfyUI: any but those that only we know."""
    description = state.get(f"{layer}.comfy_quant")
    if description is None:
        return False
    kind = json.loads(description.numpy().tobytes()).get("format")
    return kind in QUANT_ALGOS or kind not in QUANT_FORMATS


def _multiplied_out(tensor: Tensor, scale: Tensor) -> Tensor:
    """tensor [rows, ..] times one scale, or one for each row."""
    return (tensor.float() * scale.float().view(-1, *[1] * (tensor.ndim - 1))).to(torch.bfloat16)


def to_official(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Stacked weights split into the rows that the official form keeps apart, without a copy.

    Layers in 8 bits are multiplied out to bf16, on the CPU.
    """
    table, shapes = dict(OFFICIAL.modules(config.depth)), _parameters(config)
    out = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        sources = table.get(module, (module,))
        if len(sources) > 1 and type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            # ComfyUI's stand-in for a weight whose LoRAs are merged when it is moved; its rows would be bare.
            tensor = tensor.to("cpu")
        if tensor.dtype == torch.float8_e4m3fn and kind == "weight" and tuple(tensor.shape) != shapes.get(name):
            packed = tensor.to("cpu")
            tensor = dequantized(*without_scales(packed, shapes[name][0]), torch.bfloat16)
        for source, part in zip(sources, tensor.chunk(len(sources)) if len(sources) > 1 else (tensor,), strict=True):
            out[f"{source}.{kind}"] = part
    return out
