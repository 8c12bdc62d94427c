"""LoRAs of LongCat-Video through ComfyUI's stock loaders, with a report of what did not match.

Two of ComfyUI's functions are wrapped; the wrappers act on LongCat-Video only. Official LoRAs are read by the core. All
others are ComfyUI's to read, under the module names of every checkpoint form.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import comfy.lora
import torch
from torch import Tensor

from ..longcat_core.checkpoints.formats import targets
from ..longcat_core.checkpoints.lora import LoraStack, lora_of
from ..longcat_core.checkpoints.lora_names import PREFIX, split_key
from ..longcat_core.errors import LongCatError
from . import comfy_fp8
from .comfy_model import LongCatVideo

NETWORK = "diffusion_model."
# What other trainers write in front of a module's name.
PREFIXES = (NETWORK, "transformer.", "base_model.model.")
# FastVideo's names of a LoRA's parts, which end without `.weight`, and those that ComfyUI knows.
BARE_PARTS = {".lora_A": ".lora_A.weight", ".lora_B": ".lora_B.weight", ".lora_alpha": ".alpha"}
# Where the name of a part begins, in LoRAs of any kind.
PARTS = (".lora_", ".alpha", ".diff", ".dora_scale", ".hada_", ".lokr_", ".reshape_weight", ".set_weight")
_SHOWN = 3


class KeyMap(dict):
    """ComfyUI's map from LoRA names to weights, for LongCat-Video. shapes: of the weights, by the network's names."""

    shapes: dict[str, torch.Size]


def add_names(model: LongCatVideo, key_map: dict) -> KeyMap:
    """The map with the module names of every form added, under the prefixes that trainers use.

    A part of a stacked weight (w1, w3) is a range of its rows, which ComfyUI's bypass loader cannot take.
    """
    key_map = KeyMap(key_map)
    key_map.shapes = {}
    for source, (module, i, count) in targets(model.diffusion_model.config.depth).items():
        weight = f"{module}.weight"
        if weight not in key_map.shapes:
            layer = model.diffusion_model.get_submodule(module)
            key_map.shapes[weight] = layer.shape if isinstance(layer, comfy_fp8.Linear) else layer.weight.shape
        rows = key_map.shapes[weight][0] // count
        target = NETWORK + weight if count == 1 else (NETWORK + weight, (0, i * rows, rows))
        for name in (source, *(prefix + source for prefix in PREFIXES), "lora_unet_" + source.replace(".", "_")):
            key_map.setdefault(name, target)
    return key_map


def convert(lora: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """A LoRA under names that ComfyUI knows: the official layers of a weight as one plain LoRA, FastVideo's parts
    renamed, anything else as it is.

    shapes: of the network's weights. Raises LongCatError for an official LoRA that is broken or of another size.
    """
    official = {key: tensor for key, tensor in lora.items() if key.startswith(PREFIX)}
    out: dict[str, Tensor] = {}
    matched: set[str] = set()
    if official:
        opened = lora_of(official, "the LoRA file")
        matched.update(opened.match(shapes)[0])
        layers = {module: parts for module, parts in opened.layers.items() if module in matched}
        stack = LoraStack([replace(opened, layers=layers, unknown=())], shapes)
        for weight in stack.weights:
            name, (up, down) = NETWORK + weight.removesuffix(".weight"), stack.joined(weight)
            # ComfyUI divides alpha by the rank; the scale is in `up` already.
            alpha = torch.tensor(float(len(down)))
            out |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": alpha}
    for key, tensor in lora.items():
        split = split_key(key) if key in official else None
        if split is None or split[0] not in matched:
            ending = next((ending for ending in BARE_PARTS if key.endswith(ending)), "")
            out[key.removesuffix(ending) + BARE_PARTS.get(ending, "")] = tensor
    return out


def check(lora: Mapping[str, Tensor], key_map: KeyMap, loaded: Mapping[Any, Any]) -> None:
    """Log the modules of a LoRA that match nothing. Raises LongCatError if all do, or for one of another size."""
    starts = ((name, [name.find(part) for part in PARTS if part in name]) for name in lora)
    modules = dict.fromkeys(name[: min(found, default=len(name))] for name, found in starts)
    missed = [module for module in modules if module not in key_map]
    if missed:
        examples = ", ".join(missed[:_SHOWN]) + (f" and {len(missed) - _SHOWN} more" if len(missed) > _SHOWN else "")
        matched = len(modules) - len(missed)
        if not matched:
            raise LongCatError(
                f"the LoRA matches nothing in LongCat-Video: 0 of its {len(modules)} modules; it holds for instance "
                f"{examples} and was made for another model; choose a LongCat-Video LoRA"
            )
        logging.warning(
            "LongCat: the LoRA matches %d of its %d modules; not matched: %s", matched, len(modules), examples
        )
    for target, patch in loaded.items():
        weight, rows = (target, None) if isinstance(target, str) else (target[0], target[1][2])
        shape = key_map.shapes.get(weight.removeprefix(NETWORK))
        if shape is None or getattr(patch, "name", "") != "lora" or len(shape) != 2:
            continue
        up, down = patch.weights[:2]
        if (up.shape[0], down.shape[1]) != (rows or shape[0], shape[1]):
            raise LongCatError(
                f"the LoRA changes {weight} by {[up.shape[0], down.shape[1]]}, the model has "
                f"{[rows or shape[0], shape[1]]}; choose a LoRA for a model of this size"
            )


def register() -> None:
    """Wrap ComfyUI's LoRA functions; registering again, as a second copy of the pack does, replaces the wrappers."""
    find_keys, load = (
        getattr(function, "longcat_wraps", function)
        for function in (comfy.lora.model_lora_keys_unet, comfy.lora.load_lora)
    )

    def model_lora_keys_unet(model, key_map=None):
        found = find_keys(model, {} if key_map is None else key_map)
        return add_names(model, found) if isinstance(model, LongCatVideo) else found

    def load_lora(lora, to_load, log_missing=True):
        if not isinstance(to_load, KeyMap):
            return load(lora, to_load, log_missing)
        lora = convert(lora, to_load.shapes)
        loaded = load(lora, to_load, False)
        check(lora, to_load, loaded)
        return loaded

    for function, original in ((model_lora_keys_unet, find_keys), (load_lora, load)):
        function.longcat_wraps = original
        setattr(comfy.lora, function.__name__, function)
