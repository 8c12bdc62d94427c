"""Read LoRA files of every kind and merge them into a network's weights; `adapted` applies them at run time instead.

A file names modules as one of the checkpoint forms does, or as the network does; a module may be a whole fused weight
or a part of one. In every kind, a layer is down [n*r, in], n ups [out/n, r] and a scale here: slice i of its rows
changes by scale * up_i @ down_i. Kinds differ in names, and in what their alpha means:

    official    `alpha_scale` is the scale; n > 1 where the layer is fused (`lora_up.blocks.i`)
    all others  scale = alpha / r, 1 without an alpha; PEFT keeps alpha in `adapter_config.json`
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError, LongCatError
from ..files.safetensors_io import Stamp, read_tensors, stamp
from ..model.transformer import LongCatTransformer
from .formats import targets

PREFIX = "lora___lorahyphen___"
SEPARATOR = "___lorahyphen___"
# What trainers put before a module's name, possibly several; after the second kind, "_" stands for ".".
PREFIXES = ("base_model.model.", "model.", "diffusion_model.", "transformer.", "unet.", "dit.")
FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lora_dit_", "lycoris_")
# The suffix after a module's name.
_PART = re.compile(
    r"\.(?:(?P<down>lora_down\.weight|lora\.down\.weight|lora_A(?:\.[^.]+)?\.weight|lora_A)"
    r"|(?P<up>lora_up\.weight|lora\.up\.weight|lora_B(?:\.[^.]+)?\.weight|lora_B)"
    r"|lora_up\.blocks\.(?P<slice>\d+)\.weight"
    r"|(?P<scale>alpha_scale)|(?P<alpha>alpha|lora_alpha))$"
)
# Kinds of LoRA that change a weight by more than a product of two matrices.
_OTHER_KINDS = re.compile(r"\.(dora_scale|lora_magnitude_vector.*|hada_\w+|lokr_\w+|oft_\w+|lora_mid.*|diff|diff_b)$")
_PEFT_CONFIG = "adapter_config.json"
_SHOWN = 3

# A file and its strength; 1 is the file's own.
Lora = tuple[str | Path, float]
# Module of the network, index of the part of its weight, number of parts that the weight stacks.
Target = tuple[str, int, int]
# Far beyond useful values, and far below overflow.
MAX_STRENGTH = 1000.0


def check_strength(path: str | Path, strength: float) -> None:
    """Raise LongCatError unless the strength of the LoRA at `path` is a number from -1000 to 1000."""
    if not abs(strength) <= MAX_STRENGTH:
        raise LongCatError(
            f"strength {strength:g} of {path} is out of range; give a number from {-MAX_STRENGTH:g} to "
            f"{MAX_STRENGTH:g}, such as 0.8"
        )


@dataclass(frozen=True, eq=False)
class OpenedLora:
    """A LoRA file that was read, with its strength.

    layers: the official parts of every target module, by its name in the file without prefixes: {"lora_down.weight":
    [n*r, in], "lora_up.weight" or "lora_up.blocks.i.weight": [out/n, r], "alpha_scale": []}. unknown: keys that are not
    a LoRA's. read: the stamp of the file before it was read, None if it was missing.
    """

    path: Path
    strength: float
    layers: dict[str, dict[str, Tensor]]
    unknown: tuple[str, ...]
    read: Stamp | None

    def match(self, shapes: Mapping[str, Sequence[int]]) -> tuple[dict[str, Target], list[str]]:
        """(module of the file -> what it changes of a network with parameters `shapes`, names that match nothing)."""
        depth = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
        by_name = targets(depth)
        by_flat_name = {name.replace(".", "_"): target for name, target in by_name.items()}
        matched, missed = {}, list(self.unknown)
        for module in self.layers:
            target = by_name.get(module) or by_flat_name.get(_flat(module))
            if target is None or f"{target[0]}.weight" not in shapes:
                missed.append(module)
            else:
                matched[module] = target
        return matched, missed


def open_loras(loras: Iterable[Lora | OpenedLora]) -> list[OpenedLora]:
    """Read LoRA files; opened ones are returned as they are.

    Raises LongCatError for a file that is not a LoRA, or is of a kind that cannot be merged, and for a strength out of
    range.
    """
    return [lora if isinstance(lora, OpenedLora) else _open(*lora) for lora in loras]


def stamp_of(path: Path) -> Stamp | None:
    """The stamp of a file; None if it is missing."""
    try:
        return stamp(os.stat(path))
    except OSError:
        return None


def changed_weights(loras: Iterable[Lora | OpenedLora], shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Parameters of a network with parameters `shapes` that these LoRAs change."""
    matched = (target for lora in open_loras(loras) for target in lora.match(shapes)[0].values())
    return list(dict.fromkeys(f"{name}.weight" for name, _, _ in matched))


def lora_of(tensors: Mapping[str, Tensor], source: str) -> OpenedLora:
    """A LoRA from tensors in memory, at strength 1. source: its name in errors, which are those of `open_loras`."""
    return OpenedLora(Path(source), 1.0, *_read_layers(tensors, source, lambda rank: 1.0), None)


def split_key(key: str) -> tuple[str, str] | None:
    """(module without prefixes, official name of the part) of a key of a LoRA; None for a key of anything else."""
    plain = key.removeprefix(PREFIX).replace(SEPARATOR, ".") if key.startswith(PREFIX) else key
    match = _PART.search(plain)
    if match is None:
        return None
    kind = match.lastgroup or ""
    part = {"down": "lora_down.weight", "up": "lora_up.weight", "scale": "alpha_scale"}.get(kind, kind)
    if kind == "slice":
        part = f"lora_up.blocks.{int(match['slice'])}.weight"
    return _bare(plain[: match.start()]), part


def _open(path: str | Path, strength: float) -> OpenedLora:
    check_strength(path, strength)
    path = Path(path)
    read = stamp_of(path)
    return OpenedLora(path, strength, *_read_layers(read_tensors(path), path, _peft_scale(path)), read)


def _read_layers(
    tensors: Mapping[str, Tensor], source: str | Path, default_scale: Callable[[int], float]
) -> tuple[dict[str, dict[str, Tensor]], tuple[str, ...]]:
    """`OpenedLora.layers` and `OpenedLora.unknown`. default_scale: scale by rank of layers without an alpha."""
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    unknown = []
    for key, tensor in tensors.items():
        if _OTHER_KINDS.search(key):
            raise CheckpointError(f"{source} holds {key}: a kind of LoRA that cannot be merged here; give a plain LoRA")
        split = split_key(key)
        if split is None:
            unknown.append(key)
            continue
        module, part = split
        if part in found[module]:
            raise CheckpointError(f"{source} changes {module} twice; give a file with one LoRA")
        found[module][part] = tensor
    if not found:
        raise CheckpointError(
            f"{source} is not a LoRA (it holds {', '.join(unknown[:_SHOWN]) or 'nothing'}); give a LoRA file"
        )
    for parts in found.values():
        alpha = parts.pop("alpha", None)
        if "alpha_scale" not in parts and _ups(parts):
            # An alpha belongs to one slice and its rank.
            rank = max((1, *_ups(parts)[0].shape[1:2]))
            parts["alpha_scale"] = torch.tensor(default_scale(rank) if alpha is None else float(alpha) / rank)
    return dict(found), tuple(unknown)


def _bare(module: str) -> str:
    """A module's name without the prefixes of trainers."""
    while prefix := next((prefix for prefix in PREFIXES if module.startswith(prefix)), ""):
        module = module.removeprefix(prefix)
    return module


def _peft_scale(path: Path) -> Callable[[int], float]:
    """Scale by rank of layers without an alpha of their own: that of a PEFT config beside the file, else 1."""
    config = path.with_name(_PEFT_CONFIG)
    if not config.is_file():
        return lambda rank: 1.0
    try:
        values = dict(json.loads(config.read_text(encoding="utf-8")))
        alpha, root = values.get("lora_alpha"), bool(values.get("use_rslora"))
        alpha = None if alpha is None else float(alpha)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{config} is not a readable PEFT config ({error}); download it again") from error
    if values.get("alpha_pattern") or values.get("use_dora"):
        raise CheckpointError(
            f"{config} asks for alpha_pattern or DoRA, which cannot be merged here; give a plain LoRA"
        )
    return lambda rank: 1.0 if alpha is None else alpha / (math.sqrt(rank) if root else rank)


def _ups(parts: Mapping[str, Tensor]) -> list[Tensor]:
    return [parts[name] for name in sorted(parts, key=_slice_number) if name.startswith("lora_up.")]


def _slice_number(name: str) -> int:
    pieces = name.split(".")
    return int(pieces[2]) if len(pieces) > 3 and pieces[1] == "blocks" else 0


@dataclass(frozen=True)
class Change:
    """What one layer of a file adds to part `index` of the `count` parts that a weight stacks.

    downs [r, in] and ups [rows, r], slice by slice; file: its number in the stack.
    """

    file: int
    index: int
    count: int
    downs: tuple[Tensor, ...]
    ups: tuple[Tensor, ...]
    scale: float
    strength: float

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix that is added."""
        return sum(up.shape[0] for up in self.ups), self.downs[0].shape[1]

    @property
    def rank(self) -> int:
        """Rank of all slices together."""
        return sum(len(down) for down in self.downs)


class LoraStack:
    """LoRA files with strengths, ready to be added to the weights of one network."""

    def __init__(self, loras: Iterable[Lora | OpenedLora], shapes: Mapping[str, Sequence[int]]) -> None:
        """shapes: of the network's parameters by name.

        Everything is checked here. Raises CheckpointError for a file that matches nothing, does not fit or is broken;
        warns (UserWarning) if only some of a file's modules match.
        """
        self._changes: dict[str, list[Change]] = defaultdict(list)
        # Modules of all files that match the network, as the files name them.
        self.modules: list[str] = []
        for file, lora in enumerate(open_loras(loras)):
            matched, missed = lora.match(shapes)
            for module, target in matched.items():
                change = _change(lora, module, target, file)
                self._add(f"{target[0]}.weight", change, module, lora.path, shapes)
            self.modules += matched
            _report(lora.path, len(matched), missed)

    def _add(
        self, weight: str, change: Change, module: str, path: str | Path, shapes: Mapping[str, Sequence[int]]
    ) -> None:
        rows, columns = shapes[weight][0] // change.count, math.prod(shapes[weight][1:])
        if change.shape != (rows, columns):
            raise CheckpointError(
                f"{path} changes {module} by {list(change.shape)}, the model has {[rows, columns]}; "
                "it belongs to a model of another size"
            )
        self._changes[weight].append(change)

    def __contains__(self, name: str) -> bool:
        return name in self._changes

    @property
    def weights(self) -> list[str]:
        """Parameters of the network that change."""
        return list(self._changes)

    def changes(self, name: str) -> list[Change]:
        """The changes of parameter `name`, in the order of the files."""
        return list(self._changes.get(name, ()))

    def joined(self, name: str) -> tuple[Tensor, Tensor]:
        """The changes of parameter `name` as one LoRA that adds up @ down: up [rows, R] fp32, down [R, in].

        Each slice has ranks of its own, with its scale and strength in `up`; rows without a change are 0.
        """
        changes = sorted(self._changes[name], key=lambda change: change.index)
        up = torch.zeros(changes[0].count * changes[0].shape[0], sum(change.rank for change in changes))
        first = 0
        for change in changes:
            row = change.index * change.shape[0]
            for part in change.ups:
                scaled = part.float() * (change.scale * change.strength)
                up[row : row + len(part), first : first + part.shape[1]] = scaled
                row, first = row + len(part), first + part.shape[1]
        return up, torch.cat([down for change in changes for down in change.downs])

    @torch.no_grad()
    def add(self, name: str, weight: Tensor) -> Tensor:
        """Add the changes of parameter `name` to `weight` (fp32, contiguous) in place; returns it."""
        for change in self._changes.get(name, ()):
            part = weight.flatten(1).chunk(change.count)[change.index]
            first = 0
            for up, down in zip(change.ups, change.downs, strict=True):
                rows = part[first : first + len(up)]
                rows.addmm_(up.to(weight), down.to(weight), alpha=change.scale * change.strength)
                first += len(up)
        return weight


def _flat(module: str) -> str:
    return next((module.removeprefix(prefix) for prefix in FLAT_PREFIXES if module.startswith(prefix)), "")


def _change(lora: OpenedLora, module: str, target: Target, file: int) -> Change:
    path, parts = lora.path, lora.layers[module]
    ups, down = _ups(parts), parts.get("lora_down.weight")
    if not ups or down is None or "alpha_scale" not in parts or any(t.ndim < 2 for t in (down, *ups)):
        raise CheckpointError(
            f"{path} has a broken LoRA for {module} (it holds {', '.join(sorted(parts))}); download it again"
        )
    # A convolution's matrices have the sides of its kernel too.
    ups, down = [up.flatten(1) for up in ups], down.flatten(1)
    downs = down.chunk(len(ups))
    if len(downs) != len(ups) or any(up.shape[1] != down.shape[0] for up, down in zip(ups, downs, strict=True)):
        shapes = [list(up.shape) for up in ups]
        raise CheckpointError(
            f"{path} has mismatched ranks for {module} (up {shapes}, down {list(down.shape)}); download it again"
        )
    if not all(torch.isfinite(tensor.float()).all() for tensor in parts.values()):
        raise CheckpointError(f"{path} has NaN or infinite values in {module}; download it again")
    _, index, count = target
    return Change(file, index, count, downs, tuple(ups), float(parts["alpha_scale"]), lora.strength)


def _report(path: str | Path, matched: int, missed: list[str]) -> None:
    if not missed:
        return
    total = matched + len(missed)
    examples = ", ".join(missed[:_SHOWN]) + (f" and {len(missed) - _SHOWN} more" if len(missed) > _SHOWN else "")
    if not matched:
        raise CheckpointError(
            f"{path} matches nothing in LongCat-Video: 0 of its {total} modules; it has for instance {examples}; "
            "it belongs to another model"
        )
    warnings.warn(f"{path} matches {matched} of its {total} modules; not matched: {examples}", stacklevel=3)


@torch.no_grad()
def merge_lora(model: LongCatTransformer, path: str | Path, strength: float = 1.0) -> list[str]:
    """Add a LoRA file to the network's weights, computed in fp32; returns the modules changed, as the file names them.

    Strength -1 removes a merged LoRA again, up to rounding; `MergedLoras` removes it exactly. Errors and warnings as
    `LoraStack`, before any weight changes.
    """
    stack = LoraStack([(path, strength)], {name: parameter.shape for name, parameter in model.named_parameters()})
    for name in stack.weights:
        if model.get_parameter(name).itemsize == 1:
            raise LongCatError(
                f"{path} cannot be merged into 8-bit weights ({name}); merge it before the network is quantized"
            )
    for name in stack.weights:
        weight = model.get_parameter(name)
        weight.copy_(stack.add(name, weight.float().contiguous()).to(weight.dtype))
    return stack.modules
