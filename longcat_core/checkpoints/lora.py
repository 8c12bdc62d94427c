"""Read LoRA files of every kind and merge them into a network's weights; `adapted` applies them at run time instead.

A file names modules as one of the checkpoint forms does, or as the network does; a module may be a whole fused weight
or a part of one. In every kind, a layer is down [n*r, in], n ups [out/n, r] and a scale here: slice i of its rows
changes by scale * up_i @ down_i. Kinds differ in names (`lora_names`), and in what their alpha means:

    official    `alpha_scale` is the scale; n > 1 where the layer is fused (`lora_up.blocks.i`)
    all others  scale = alpha / r, 1 without an alpha; `lora_alpha` finds an alpha that is not in the tensors
"""

from __future__ import annotations

import math
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError, LongCatError
from ..files.fingerprints import fingerprint
from ..files.safetensors_io import SafetensorsFile, Stamp, stamp
from ..model.config import ModelConfig
from ..model.transformer import LongCatTransformer
from .lora_alpha import Scales, Stated, file_of, stated_alphas
from .lora_names import check_kind, first_names, flat, prefix_of, short, split_key, targets_by_flat_name

# A file and its strength; 1 is the file's own.
Lora = tuple[str | Path, float]
# Module of the network, index of the part of its weight, number of parts that the weight stacks.
Target = tuple[str, int, int]
# Far beyond useful values, and far below overflow.
MAX_STRENGTH = 1000.0
MAX_SCALE = 1e6


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
    a LoRA's. notes: sentences about where its alpha was found. stated: tells the scales that came from outside the
    tensors from others, "" without any. read: the stamp of the file before it was read, None if it was missing.
    """

    path: Path
    strength: float
    layers: dict[str, dict[str, Tensor]]
    unknown: tuple[str, ...]
    notes: tuple[str, ...]
    stated: str
    read: Stamp | None

    @property
    def fingerprint(self) -> str:
        """What tells this LoRA from others: `safetensors_io.fingerprint` of its file, and the alphas from elsewhere."""
        return fingerprint(self.path) + (f"@{self.stated}" if self.stated else "")

    def match(self, shapes: Mapping[str, Sequence[int]]) -> tuple[dict[str, Target], list[str]]:
        """(module of the file -> what it changes of a network with parameters `shapes`, names that match nothing).

        Raises CheckpointError for two modules that change the same rows, and for networks under several prefixes.
        """
        by_name = targets_by_flat_name(len({name.split(".")[1] for name in shapes if name.startswith("blocks.")}))
        matched: dict[str, Target] = {}
        by_target: dict[Target, str] = {}
        missed = list(self.unknown)
        # Any prefix serves a file without a name that is known, unless there are several.
        known = any(flat(module) in by_name for module in self.layers)
        prefix = "" if known else prefix_of(self.layers, by_name, self.path)
        for module in self.layers:
            target = by_name.get(flat(module.removeprefix(prefix)))
            if target is None or f"{target[0]}.weight" not in shapes:
                missed.append(module)
            elif target in by_target:
                raise CheckpointError(
                    f"{self.path} changes {short(by_target[target])} twice, also as {short(module)}; give a file with "
                    "one LoRA"
                )
            else:
                matched[module], by_target[target] = target, module
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


def lora_of(tensors: Mapping[str, Tensor], source: str, file: Path | None = None) -> OpenedLora:
    """A LoRA from tensors in memory, at strength 1. source: its name in errors, which are those of `open_loras`.

    file: where the tensors were read, whose header and PEFT config may hold the alpha; None: nowhere.
    """
    places: tuple[list[Stated], list[str]] = ([], [])
    if file is not None:
        places = stated_alphas(file, SafetensorsFile(file).metadata, _kohya_names(tensors))
    return OpenedLora(Path(source), 1.0, *_read_layers(tensors, source, *places), None)


def _open(path: str | Path, strength: float) -> OpenedLora:
    check_strength(path, strength)
    path = file_of(path)
    read = stamp_of(path)
    file = SafetensorsFile(path)
    tensors = file.tensors()
    places = stated_alphas(path, file.metadata, _kohya_names(tensors))
    return OpenedLora(path, strength, *_read_layers(tensors, path, *places), read)


def _kohya_names(keys: Iterable[str]) -> bool:
    return any(".lora_down." in key for key in keys)


def _read_layers(
    tensors: Mapping[str, Tensor], source: str | Path, stated: Sequence[Stated], notes: Sequence[str]
) -> tuple[dict[str, dict[str, Tensor]], tuple[str, ...], tuple[str, ...], str]:
    """`OpenedLora.layers`, `unknown`, `notes` and `stated`. stated: where alpha may be, beside the tensors."""
    check_kind(tensors, source)
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    unknown = []
    for key, tensor in tensors.items():
        split = split_key(key)
        if split is None:
            unknown.append(key)
            continue
        module, part = split
        if part in found[module]:
            raise CheckpointError(f"{source} changes {short(module)} twice; give a file with one LoRA")
        found[module][part] = tensor
    if not found:
        held = first_names(unknown) or "nothing"
        raise CheckpointError(f"{source} is not a LoRA (it holds {held}); give a LoRA file")
    scales = Scales(source, stated)
    for module, parts in found.items():
        alpha = parts.pop("alpha", None)
        if "alpha_scale" in parts:
            parts["alpha_scale"] = torch.tensor(_number(source, module, "alpha_scale", parts["alpha_scale"]))
        elif _ups(parts):
            # An alpha belongs to one slice and its rank.
            rank = int(max((0, *_ups(parts)[0].shape[1:2])))
            own = None if alpha is None else _number(source, module, "alpha", alpha)
            parts["alpha_scale"] = torch.tensor(scales.of(module, rank, own))
    return dict(found), tuple(unknown), (*(notes if scales.needed else ()), *scales.notes()), scales.label()


def _number(source: str | Path, module: str, name: str, tensor: Tensor) -> float:
    if tensor.numel() != 1 or tensor.dtype == torch.bool or tensor.is_complex():
        raise CheckpointError(
            f"{source} has a broken {name} for {short(module)} (it is {tensor.dtype} {list(tensor.shape)}, not one "
            "number); download it again"
        )
    value = float(tensor)
    if not math.isfinite(value):
        raise CheckpointError(f"{source} has NaN or infinite values in {short(module)} ({name}); download it again")
    return value


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

    def without_effect(self) -> str:
        """Why nothing is added; "" if something is."""
        if self.strength == 0 or self.scale == 0 or not self.rank:
            return f"its {'strength' if self.strength == 0 else 'alpha' if self.scale == 0 else 'rank'} is 0"
        pairs = zip(self.ups, self.downs, strict=True)
        some = any(bool((up != 0).any()) and bool((down != 0).any()) for up, down in pairs)
        return "" if some else "its matrices are 0, as before training"


class LoraStack:
    """LoRA files with strengths, ready to be added to the weights of one network."""

    def __init__(
        self, loras: Iterable[Lora | OpenedLora], shapes: Mapping[str, Sequence[int]], quiet: bool = False
    ) -> None:
        """shapes: of the network's parameters by name. quiet: warn of nothing.

        Everything is checked here. Raises CheckpointError for a file that matches nothing, does not fit or is broken;
        warns (UserWarning) if only some of a file's modules match, if a file changes nothing, and of where an alpha was
        found that is not in the tensors.
        """
        self._changes: dict[str, list[Change]] = defaultdict(list)
        # Modules of all files that match the network, as the files name them.
        self.modules: list[str] = []
        for file, lora in enumerate(open_loras(loras)):
            matched, missed = lora.match(shapes)
            reasons: Counter[str] = Counter()
            for module, target in matched.items():
                change = _change(lora, module, target, file)
                self._add(f"{target[0]}.weight", change, module, lora.path, shapes)
                # One layer with an effect is enough.
                if "" not in reasons:
                    reasons[change.without_effect()] += 1
            self.modules += matched
            notes = [*_report(lora.path, len(matched), missed), *lora.notes]
            if "" not in reasons:
                notes.append(f"{lora.path} changes nothing: {reasons.most_common(1)[0][0]}")
            for note in () if quiet else notes:
                warnings.warn(note, stacklevel=2)

    def _add(
        self, weight: str, change: Change, module: str, path: str | Path, shapes: Mapping[str, Sequence[int]]
    ) -> None:
        rows, columns = shapes[weight][0] // change.count, math.prod(shapes[weight][1:])
        if change.shape != (rows, columns):
            raise CheckpointError(
                f"{path} changes {short(module)} by {list(change.shape)}, the model has {[rows, columns]}; "
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


def _change(lora: OpenedLora, module: str, target: Target, file: int) -> Change:
    path, name, parts = lora.path, short(module), lora.layers[module]
    ups, down = _ups(parts), parts.get("lora_down.weight")
    sliced = [f"lora_up.blocks.{i}.weight" for i in range(len(ups))]
    whole = (len(ups) == 1 and "lora_up.weight" in parts) or all(part in parts for part in sliced)
    if not ups or not whole or down is None or "alpha_scale" not in parts or any(t.ndim < 2 for t in (down, *ups)):
        raise CheckpointError(
            f"{path} has a broken LoRA for {name} (it holds {first_names(sorted(parts))}); download it again"
        )
    if not all(tensor.is_floating_point() for tensor in (down, *ups)):
        kinds = ", ".join(dict.fromkeys(str(tensor.dtype).removeprefix("torch.") for tensor in (down, *ups)))
        raise CheckpointError(f"{path} has matrices of {kinds} for {name}; give a LoRA in floating-point numbers")
    # A convolution's matrices have the sides of its kernel too.
    ups, down = [up.flatten(1) for up in ups], down.flatten(1)
    downs = down.tensor_split(len(ups))
    if any(up.shape[1] != down.shape[0] for up, down in zip(ups, downs, strict=True)):
        shapes = [list(up.shape) for up in ups]
        raise CheckpointError(
            f"{path} has mismatched ranks for {name} (up {shapes}, down {list(down.shape)}); download it again"
        )
    if not all(torch.isfinite(tensor.float()).all() for tensor in parts.values()):
        raise CheckpointError(f"{path} has NaN or infinite values in {name}; download it again")
    scale = float(parts["alpha_scale"])
    if abs(scale) > MAX_SCALE:
        raise CheckpointError(f"{path} has an alpha for {name} by which it counts {scale:g} times; download it again")
    _, index, count = target
    return Change(file, index, count, downs, tuple(ups), scale, lora.strength)


def _report(path: str | Path, matched: int, missed: list[str]) -> list[str]:
    total = matched + len(missed)
    if not matched:
        raise CheckpointError(
            f"{path} matches nothing in LongCat-Video: 0 of its {total} modules; it has for instance "
            f"{first_names(missed)}; it belongs to another model"
        )
    return [f"{path} matches {matched} of its {total} modules; not matched: {first_names(missed)}"] if missed else []


def check_loras(loras: Sequence[Lora | OpenedLora], config: ModelConfig) -> None:
    """Raise CheckpointError, as `LoraStack` does, for LoRAs that do not fit a network of this config."""
    if loras:
        with torch.device("meta"):
            parameters = LongCatTransformer(config).named_parameters()
        LoraStack(loras, {name: parameter.shape for name, parameter in parameters}, quiet=True)


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
        merged = stack.add(name, weight.float().contiguous()).to(weight.dtype)
        # In inference mode, writes to ordinary tensors would not be counted; copies of streamed weights depend on it.
        with torch.inference_mode(weight.is_inference()):
            weight.copy_(merged)
    return stack.modules
