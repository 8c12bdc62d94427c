"""LoRA files in the official form, merged into a loaded network.

A fused layer (qkv, kv) is one module with a block-diagonal LoRA: `lora_down` [n*r, in] and one `lora_up.blocks.i`
[out/n, r] per slice, so slice i changes by alpha_scale * up_i @ down_i; up and down are never multiplied whole.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError, LongCatError
from ..model.transformer import LongCatTransformer
from .formats import OFFICIAL, Format
from .safetensors_io import read_tensors

PREFIX = "lora___lorahyphen___"
SEPARATOR = "___lorahyphen___"
_SHOWN = 3


def read_lora(path: str | Path) -> dict[str, dict[str, Tensor]]:
    """An official LoRA file by target module: {module: {"lora_down.weight": ..., "alpha_scale": ...}}.

    Raises CheckpointError for a file that is none, or that also holds other tensors.
    """
    targets: dict[str, dict[str, Tensor]] = defaultdict(dict)
    strange = []
    for name, tensor in read_tensors(path).items():
        if not name.startswith(PREFIX):
            strange.append(name)
            continue
        module, _, part = name.removeprefix(PREFIX).replace(SEPARATOR, ".").partition(".lora_")
        if part:
            targets[module][f"lora_{part}"] = tensor
        else:
            targets[module.removesuffix(".alpha_scale")]["alpha_scale"] = tensor
    if strange or not targets:
        found = ", ".join(strange[:_SHOWN]) or "nothing"
        raise CheckpointError(f"{path} is no LongCat-Video LoRA in the official form (it holds {found})")
    return dict(targets)


def _deltas(parts: dict[str, Tensor], module: str, path: str | Path) -> Tensor:
    """The change of a module's weight, [out, in] fp32, at strength 1."""
    ups = [parts[k] for k in sorted(parts, key=_block_number) if k.startswith("lora_up.")]
    if not ups or "lora_down.weight" not in parts or "alpha_scale" not in parts:
        raise CheckpointError(f"{path} has a broken LoRA for {module} (it holds {', '.join(sorted(parts))})")
    downs = parts["lora_down.weight"].float().chunk(len(ups))
    if len(downs) != len(ups) or any(up.shape[1] != down.shape[0] for up, down in zip(ups, downs, strict=True)):
        shapes = [list(up.shape) for up in ups]
        raise CheckpointError(
            f"{path} has mismatched ranks for {module}: up {shapes}, down {list(parts['lora_down.weight'].shape)}"
        )
    scale = float(parts["alpha_scale"])
    return torch.cat([scale * (up.float() @ down) for up, down in zip(ups, downs, strict=True)])


def _block_number(name: str) -> int:
    pieces = name.split(".")
    return int(pieces[2]) if len(pieces) > 3 and pieces[1] == "blocks" else 0


@torch.no_grad()
def merge_lora(
    model: LongCatTransformer, path: str | Path, strength: float = 1.0, form: Format = OFFICIAL
) -> list[str]:
    """Add a LoRA file to the network's weights, computed in fp32; returns the modules changed.

    `strength` 1 is the file's own; -1 takes a merged LoRA out again, up to rounding. Everything is checked before
    any weight changes: a target that the network lacks or of another shape raises CheckpointError.
    """
    rows: dict[str, tuple[str, int, int]] = {}
    for canonical, sources in form.modules(model.config.depth):
        for i, source in enumerate(sources):
            rows[source] = (canonical, i, len(sources))
    targets = read_lora(path)
    unknown = [module for module in targets if module not in rows]
    if unknown:
        more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
        raise CheckpointError(
            f"{path} targets modules that the model lacks: {', '.join(unknown[:_SHOWN])}{more}; "
            "it belongs to another model"
        )
    eight_bit = [module for module in targets if model.get_parameter(f"{rows[module][0]}.weight").itemsize == 1]
    if eight_bit:
        raise LongCatError(
            f"{path} cannot be merged into 8-bit weights ({eight_bit[0]}); merge it before the network is quantised"
        )
    changes = []
    for module, parts in targets.items():
        canonical, i, count = rows[module]
        weight = model.get_parameter(f"{canonical}.weight").chunk(count)[i]
        delta = _deltas(parts, module, path)
        if delta.shape != weight.flatten(1).shape:
            raise CheckpointError(
                f"{path} changes {module} by {list(delta.shape)}, the model has {list(weight.shape)}; "
                "it belongs to a model of another size"
            )
        changes.append((weight, delta))
    for weight, delta in changes:
        merged = weight.float() + strength * delta.to(weight.device).view(weight.shape)
        weight.copy_(merged.to(weight.dtype))
    return list(targets)
