"""LoRAs of LongCat-Video through ComfyUI's stock loaders, with a report of what did not match.

`registration` wraps three of ComfyUI's functions; the wrappers act on LongCat-Video only, except that the one which
reads files remembers those of LoRAs, whose alpha may be in the header or in PEFT's config beside it. Plain LoRAs are
read by the core. All other kinds (LoKr, LoHa, DoRA, diffs) are ComfyUI's to read, under the module names of every
checkpoint form.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..longcat_core.checkpoints.formats import targets
from ..longcat_core.checkpoints.lora import LoraStack, lora_of
from ..longcat_core.checkpoints.lora_names import PREFIX, first_names, flat, other_kind_modules, split_key
from ..longcat_core.errors import LongCatError
from . import comfy_fp8
from .comfy_model import LongCatVideo
from .lora_files import KeyMap, file_of

NETWORK = "diffusion_model."
# What other trainers write in front of a module's name.
PREFIXES = (NETWORK, "transformer.", "base_model.model.")
# Where the name of a part begins, in LoRAs of any kind.
PARTS = (".lora_", ".alpha", ".diff", ".dora_scale", ".hada_", ".lokr_", ".reshape_weight", ".set_weight")


def add_names(model: LongCatVideo, key_map: dict) -> KeyMap:
    """The map with the module names of every form added, under the prefixes that trainers use.

    A part of a stacked weight (w1, w3) is a range of its rows, which ComfyUI's bypass loader cannot take.
    """
    key_map = KeyMap(key_map)
    key_map.shapes = {}
    layers = dict(model.diffusion_model.named_modules())
    for source, (module, i, count) in targets(model.diffusion_model.config.depth).items():
        weight = f"{module}.weight"
        if weight not in key_map.shapes:
            layer = layers.get(module)
            if layer is None or isinstance(layer, torch.nn.Identity):
                continue  # of an avatar, or of another avatar
            key_map.shapes[weight] = layer.shape if isinstance(layer, comfy_fp8.Linear) else layer.weight.shape
        rows = key_map.shapes[weight][0] // count
        target = NETWORK + weight if count == 1 else (NETWORK + weight, (0, i * rows, rows))
        for name in (source, *(prefix + source for prefix in PREFIXES), "lora_unet_" + source.replace(".", "_")):
            key_map.setdefault(name, target)
    return key_map


def convert(lora: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """A LoRA under names that ComfyUI knows: the plain layers with the scales that the core finds, those of official
    files as one LoRA for each weight, and anything else as it is.

    shapes: of the network's weights. Logs what the core warns of. Raises LongCatError for a LoRA that is broken or of
    another size.
    """
    others = other_kind_modules(lora)
    split = {key: parts for key in lora if (parts := split_key(key)) is not None and flat(parts[0]) not in others}
    if not split:
        return dict(lora)
    official = any(key.startswith(PREFIX) for key in split)
    file = file_of(lora.values())
    opened = lora_of({key: lora[key] for key in split}, "the LoRA file" if file is None else file.name, file)
    matched, _ = opened.match(shapes)
    layers = {module: parts for module, parts in opened.layers.items() if module in matched}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        stack = LoraStack([replace(opened, layers=layers, unknown=())] if layers else [], shapes)
    for warning in said:
        logging.warning("LongCat: %s", warning.message)
    depth = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
    names = {target: NETWORK + name for name, target in targets(depth).items()}
    out: dict[str, Tensor] = {}
    for weight in stack.weights:
        modules = [module for module, target in matched.items() if f"{target[0]}.weight" == weight]
        if official or any(len(change.ups) > 1 for change in stack.changes(weight)):
            # ComfyUI has no slices, and its bypass loader no parts of weights; the scale is in `up` already.
            up, down = stack.joined(weight)
            out |= _layer(NETWORK + weight.removesuffix(".weight"), up, down, 1.0)
            continue
        for module in modules:
            parts = layers[module]
            up = parts.get("lora_up.weight", parts.get("lora_up.blocks.0.weight"))
            out |= _layer(names[matched[module]], up, parts["lora_down.weight"], float(parts["alpha_scale"]))
    return out | {key: tensor for key, tensor in lora.items() if key not in split or split[key][0] not in matched}


def _layer(name: str, up: Tensor, down: Tensor, scale: float) -> dict[str, Tensor]:
    rank = len(down)
    if not rank:
        return {}
    # ComfyUI divides alpha by the rank.
    return {
        f"{name}.lora_up.weight": up,
        f"{name}.lora_down.weight": down,
        f"{name}.alpha": torch.tensor(scale * rank, dtype=torch.float64),
    }


def check(lora: Mapping[str, Tensor], key_map: KeyMap, loaded: Mapping[Any, Any]) -> None:
    """Log the modules of a LoRA that match nothing. Raises LongCatError if all do, or for one of another size."""
    starts = ((name, [name.find(part) for part in PARTS if part in name]) for name in lora)
    modules = dict.fromkeys(name[: min(found, default=len(name))] for name, found in starts)
    missed = [module for module in modules if module not in key_map]
    if missed:
        examples = first_names(missed)
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
