"""State dicts: official LongCat-Video names to the network's fused ones and back."""

from __future__ import annotations

import torch
from torch import Tensor

from ..longcat_core.checkpoints.formats import OFFICIAL
from ..longcat_core.errors import CheckpointError
from ..longcat_core.model.config import ModelConfig
from ..longcat_core.model.transformer import LongCatTransformer
from ..longcat_core.optimize.quantization import dequantised, without_scales

_SHOWN = 5


def _parameters(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in LongCatTransformer(config).state_dict().items()}


def from_official(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The network's weights out of `state`, which is emptied on the way: w1 and w3 stacked, INT8 multiplied out.

    What belongs to a layer besides its weight (ComfyUI's quantisation) goes along where the layer is stored whole.
    Raises CheckpointError naming what is missing or has the wrong shape. Keys of nothing in the network are kept.
    """
    table = dict(OFFICIAL.modules(config.depth))
    out, missing, wrong = {}, [], []
    for name, shape in _parameters(config).items():
        module, _, kind = name.rpartition(".")
        sources = table[module]
        parts = [_take(state, source, kind, fused=len(sources) > 1) for source in sources]
        if any(part is None for part in parts):
            missing += [f"{s}.{kind}" for s, part in zip(sources, parts, strict=True) if part is None]
            continue
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        quantised = f"{sources[0]}.comfy_quant" in state
        if tuple(tensor.shape) != shape and not (quantised and kind == "weight"):
            wrong.append(f"{', '.join(sources)}: {list(tensor.shape)} instead of {list(shape)}")
        out[name] = tensor
    for problem, names in (("lacks", missing), ("does not fit its own sizes in", wrong)):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            raise CheckpointError(
                f"the LongCat-Video checkpoint {problem} {'; '.join(names[:_SHOWN])}{more}; download it again"
            )
    whole = {sources[0]: module for module, sources in table.items() if len(sources) == 1}
    for key in list(state):
        source, _, kind = key.rpartition(".")
        out[f"{whole.get(source, source)}.{kind}" if source else kind] = state.pop(key)
    return out


def _take(state: dict[str, Tensor], source: str, kind: str, *, fused: bool) -> Tensor | None:
    """Remove one tensor of `source` from the state; in plain numbers where it is to be stacked or is official INT8."""
    name = f"{source}.{kind}"
    if f"{name}_int8" in state:
        # One scale per output row.
        scale = state.pop(f"{name}_scale").float()
        return (state.pop(f"{name}_int8").float() * scale.view(-1, 1)).to(torch.bfloat16)
    tensor = state.pop(name, None)
    if tensor is None or kind != "weight" or not fused or f"{name}_scale" not in state:
        return tensor
    # Scaled fp8: two layers with a scale each do not stack as they are.
    for extra in ("comfy_quant", "input_scale"):
        state.pop(f"{source}.{extra}", None)
    return (tensor.float() * state.pop(f"{name}_scale").float()).to(torch.bfloat16)


def to_official(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The other way: stacked weights split into the rows that the official form keeps apart, without a copy.

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
            tensor = dequantised(*without_scales(packed, shapes[name][0]), torch.bfloat16)
        for source, part in zip(sources, tensor.chunk(len(sources)) if len(sources) > 1 else (tensor,), strict=True):
            out[f"{source}.{kind}"] = part
    return out
