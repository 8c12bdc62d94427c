"""LoRA files on the native model: official LongCat ones through ComfyUI's stock loaders, and what matched, said aloud.

ComfyUI's loaders call three functions of its modules; they are wrapped, and act on LongCat-Video only.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import comfy.lora
import comfy.lora_convert
import torch
from torch import Tensor

from ..longcat_core.checkpoints.formats import OFFICIAL, targets
from ..longcat_core.checkpoints.lora import PREFIX, SEPARATOR
from ..longcat_core.errors import LongCatError
from . import comfy_fp8
from .comfy_model import LongCatVideo

# What other trainers write in front of a module's name.
PREFIXES = ("diffusion_model.", "transformer.", "base_model.model.")
_SHOWN = 3
_SUFFIXES = (".lora_", ".alpha", ".diff", ".dora_scale", ".hada_", ".lokr_", ".reshape_weight", ".set_weight")


class KeyMap(dict):
    """ComfyUI's map of LoRA names to weights, known to be a LongCat-Video model's; `shapes` of those weights."""

    shapes: dict[str, torch.Size]


def _canonical(module: str) -> tuple[str, int, int] | None:
    """(module of the network, which of its stacked parts, of how many) of an official module name."""
    block, name = "", module
    table = OFFICIAL.outer
    if module.startswith("blocks."):
        _, number, name = module.split(".", 2)
        block, table = f"blocks.{number}.", OFFICIAL.block
    for canonical, sources in table.items():
        if name in sources:
            return block + canonical, sources.index(name), len(sources)
    return None


def convert_official(lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An official LongCat LoRA as one plain LoRA per weight of the network, in ComfyUI's generic names.

    A fused layer has a LoRA for each slice: all downs are stacked and the ups stand on a block diagonal, so that slice
    i changes by alpha_scale * up_i @ down_i and by nothing else. `alpha_scale` is alpha / rank already, ComfyUI
    divides `.alpha` by the rank of what it gets. Names of nothing in the network stay, and are reported as unmatched.
    """
    layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
    out: dict[str, Tensor] = {}
    for key, tensor in lora.items():
        module, _, part = key.removeprefix(PREFIX).replace(SEPARATOR, ".").partition(".lora_")
        if not part:
            module, _, part = module.rpartition(".")
        if key.startswith(PREFIX) and _canonical(module):
            layers[module][part] = tensor
        else:
            out[key] = tensor

    fused: dict[str, dict[int, tuple[Tensor, Tensor]]] = defaultdict(dict)
    counts = {}
    for module, parts in layers.items():
        canonical, index, count = _canonical(module)
        ups = [parts[name] for name in sorted(parts, key=_slice_number) if name.startswith("up")]
        down, scale = parts.get("down.weight"), parts.get("alpha_scale")
        if not ups or down is None or scale is None or down.shape[0] != sum(up.shape[1] for up in ups):
            raise LongCatError(
                f"the LoRA is broken at {module}: it holds {', '.join(sorted(parts))}; download the file again"
            )
        fused[canonical][index] = (torch.block_diag(*(up.float() for up in ups)) * float(scale), down)
        counts[canonical] = count
    for canonical, slices in fused.items():
        rows = next(iter(slices.values()))[0].shape[0]
        # w1 and w3 are one weight here: where only one of them has a LoRA, the rows of the other stay as they are.
        ups = [slices[i][0] if i in slices else torch.zeros(rows, 0) for i in range(counts[canonical])]
        downs = [slices[i][1] for i in sorted(slices)]
        name, down = f"diffusion_model.{canonical}", torch.cat(downs)
        out[f"{name}.lora_up.weight"] = torch.block_diag(*ups)
        out[f"{name}.lora_down.weight"] = down
        out[f"{name}.alpha"] = torch.tensor(float(down.shape[0]))
    return out


def _slice_number(name: str) -> int:
    pieces = name.split(".")
    return int(pieces[2]) if pieces[:2] == ["up", "blocks"] else 0


def _official_names(model: LongCatVideo, key_map: dict) -> KeyMap:
    """The map with the module names of every form added, under the prefixes that trainers use.

    A part of a stacked weight (w1, w3) is a range of its rows, which ComfyUI's bypass loader cannot take.
    """
    key_map = KeyMap(key_map)
    key_map.shapes = {}
    for source, (canonical, i, count) in targets(model.diffusion_model.config.depth).items():
        weight = f"diffusion_model.{canonical}.weight"
        if weight not in key_map.shapes:
            layer = model.diffusion_model.get_submodule(canonical)
            key_map.shapes[weight] = layer.shape if isinstance(layer, comfy_fp8.Linear) else layer.weight.shape
        rows = key_map.shapes[weight][0] // count
        target = weight if count == 1 else (weight, (0, i * rows, rows))
        for name in (source, *(prefix + source for prefix in PREFIXES), "lora_unet_" + source.replace(".", "_")):
            key_map.setdefault(name, target)
    return key_map


def convert_bare(lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """FastVideo's names of a LoRA's parts, which end without `.weight`, as those that ComfyUI knows."""
    endings = {".lora_A": ".lora_A.weight", ".lora_B": ".lora_B.weight", ".lora_alpha": ".alpha"}
    out = {}
    for key, tensor in lora.items():
        ending = next((ending for ending in endings if key.endswith(ending)), "")
        out[key.removesuffix(ending) + endings.get(ending, "")] = tensor
    return out


def _module(name: str) -> str:
    """The module that a LoRA key belongs to."""
    return name[: min((name.find(suffix) for suffix in _SUFFIXES if suffix in name), default=len(name))]


def _check(lora: Mapping[str, Tensor], key_map: KeyMap, loaded: Mapping[Any, Any]) -> None:
    """Say what of a LoRA found no place in the model. Raises LongCatError where nothing did, or where it cannot fit."""
    modules = dict.fromkeys(_module(name) for name in lora)
    missed = [module for module in modules if module not in key_map]
    if missed:
        examples = ", ".join(missed[:_SHOWN]) + (f" and {len(missed) - _SHOWN} more" if len(missed) > _SHOWN else "")
        matched = len(modules) - len(missed)
        if not matched:
            raise LongCatError(
                f"the LoRA matches nothing in LongCat-Video: 0 of its {len(modules)} modules; it has for instance "
                f"{examples}. It was made for another model; choose a LongCat-Video LoRA"
            )
        logging.warning(
            "LongCat: the LoRA matches %d of its %d modules; not matched: %s", matched, len(modules), examples
        )
    for target, patch in loaded.items():
        weight, rows = (target, None) if isinstance(target, str) else (target[0], target[1][2])
        shape = key_map.shapes.get(weight)
        if shape is None or getattr(patch, "name", "") != "lora" or len(shape) != 2:
            continue
        up, down = patch.weights[:2]
        if (up.shape[0], down.shape[1]) != (rows or shape[0], shape[1]):
            raise LongCatError(
                f"the LoRA changes {weight} as a matrix of {up.shape[0]}x{down.shape[1]}, the model has "
                f"{rows or shape[0]}x{shape[1]}; the LoRA belongs to a model of another size"
            )


def register() -> None:
    """Wrap ComfyUI's LoRA functions; a second call, or copy of the pack, replaces the first."""
    keys, convert, load = (
        getattr(function, "longcat_wraps", function)
        for function in (comfy.lora.model_lora_keys_unet, comfy.lora_convert.convert_lora, comfy.lora.load_lora)
    )

    def model_lora_keys_unet(model, key_map=None):
        found = keys(model, {} if key_map is None else key_map)
        return _official_names(model, found) if isinstance(model, LongCatVideo) else found

    def convert_lora(lora, *args, **kwargs):
        if any(key.startswith(PREFIX) for key in lora):
            return convert_official(lora)
        bare = any(key.endswith(".lora_A") for key in lora)
        return convert(convert_bare(lora) if bare else lora, *args, **kwargs)

    def load_lora(lora, to_load, log_missing=True):
        if not isinstance(to_load, KeyMap):
            return load(lora, to_load, log_missing)
        loaded = load(lora, to_load, False)
        _check(lora, to_load, loaded)
        return loaded

    for module, function, original in (
        (comfy.lora, model_lora_keys_unet, keys),
        (comfy.lora_convert, convert_lora, convert),
        (comfy.lora, load_lora, load),
    ):
        function.longcat_wraps = original
        setattr(module, function.__name__, function)
