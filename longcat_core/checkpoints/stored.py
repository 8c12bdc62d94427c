"""The tensors of a model in its opened files: their names, shapes and dtypes, and how they make up its parameters."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import CheckpointError, listed
from ..files.records import parse_record
from ..files.tensor_files import TensorFile
from .formats import BESIDE, STORED_WEIGHTS, Format, is_setting
from .packed import Packed, packed_weights
from .packings import packing_of
from .quantized import (
    FP8,
    MARKERS,
    READABLE,
    WIDE,
    check_marker,
    described_beside,
    described_in,
    dtypes_meant,
    in_words,
    refuse_packed,
    settings_of,
)

S = TypeVar("S", bound="Stored")
# Of each fault that a sentence shows, which has a name from the file.
_CHARACTERS = 150


@dataclass(frozen=True)
class Part:
    """A stored tensor that supplies rows of a parameter. scale: name of the tensor that multiplies it, or None."""

    name: str
    scale: str | None = None


@dataclass(frozen=True)
class Stored:
    """The tensors of any model in its opened files: a transformer, a text encoder or a VAE. `Reader` reads the numbers.

    where: tensor name (prefix stripped) -> file. shapes, dtypes: as stored, but GGUF's quantized tensors as fp32, and
    fp8 whose bits are stored as uint8 as fp8. packed: weights that are matrices in fp32 by these tables -> how they are
    stored, with tensors that the tables do not have. described: modules -> their descriptions, by tensors and metadata;
    quantized: those in the files' metadata. depth: blocks that the form repeats.
    """

    source: str
    form: Format
    prefix: str
    where: dict[str, Path]
    files: dict[Path, TensorFile]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    packed: dict[str, Packed]
    described: dict[str, dict[str, Any]]
    quantized: dict[str, dict[str, Any]]
    depth: int

    def names(self) -> dict[str, Path]:
        """All tensors, those beside packed weights too."""
        return self.where | dict(place for packed in self.packed.values() for place in packed.beside.values())

    def fitted(self: S, parameters: Mapping[str, Tensor]) -> S:
        """With the shapes of the network's parameters instead of those that packed weights were padded to."""
        table = dict(self.form.modules(self.depth))
        shapes: dict[str, tuple[int, ...]] = {}
        for name, parameter in parameters.items() if self.packed else ():
            module, _, kind = name.rpartition(".")
            sources = table[module]
            shape = (parameter.shape[0] // len(sources), *parameter.shape[1:])
            weights = [f"{source}.{kind}" for source in sources]
            shapes |= {w: shape for w in weights if w in self.packed and self.packed[w].fits(shape)}
        return replace(self, shapes=self.shapes | shapes)

    def parts(self, name: str) -> list[Part]:
        """The stored tensors of a parameter of the network, in the order of its rows. KeyError if one is missing."""
        module, _, kind = name.rpartition(".")
        sources = dict(self.form.modules(self.depth))[module]
        found = []
        for source in sources:
            part = stored_part(self.where, source, kind)
            if part is None:
                raise KeyError(f"{source}.{kind}")
            found.append(part)
        return found


def stored_part(names: Mapping[str, object], module: str, parameter: str) -> Part | None:
    """How a parameter of `module`, by its name in the file, is stored in tensors `names`; None if it is missing."""
    for suffix, scale in STORED_WEIGHTS if parameter == "weight" else ((parameter, None),):
        if f"{module}.{suffix}" in names and (scale is None or f"{module}.{scale}" in names):
            return Part(f"{module}.{suffix}", None if scale is None else f"{module}.{scale}")
    # Quantized without its scale, which `match_parameters` reports.
    return Part(f"{module}.weight_int8", f"{module}.weight_scale") if f"{module}.weight_int8" in names else None


def collect(
    path: Path, files: Mapping[Path, TensorFile], form: Format, prefix: str, left: Collection[str] = ()
) -> tuple[Stored, dict[str, str]]:
    """The tensors of opened files whose names begin with `prefix`, and the files' metadata.

    left: formats of quantized layers that are left to somebody else. Raises CheckpointError for a file that holds none,
    and, by its name, for a quantized format that cannot be read or is not what is stored.
    """
    where: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype] = {}
    metadata: dict[str, str] = {}
    quantized: dict[str, dict[str, Any]] = {}
    described: list[tuple[str, dict[str, Any]]] = []
    for file, opened in files.items():
        ours = {name: entry for name, entry in opened.header.items() if name.startswith(prefix)}
        if not ours:
            raise CheckpointError(f"{file} holds nothing of {path}'s model; keep one model in each folder")
        found = {name.removeprefix(prefix): entry for name, entry in ours.items()}
        # A marker may lack the prefix.
        found |= {name: opened.header[name] for name in MARKERS if name in opened.header}
        where |= dict.fromkeys(found, file)
        dtypes |= {name: dtype for name, (dtype, _) in found.items()}
        shapes |= {name: shape for name, (_, shape) in found.items()}
        metadata |= opened.metadata
        layers = {layer.removeprefix(prefix): conf for layer, conf in described_in(opened.metadata, file).items()}
        quantized |= layers
        tensors = described_beside(ours, opened.rows, str(file))
        described += [*layers.items(), *((layer.removeprefix(prefix), conf) for layer, conf in tensors)]
    check_marker((opened.header for opened in files.values()), str(path))
    # Metadata may describe the layers of other models in the file too.
    modules = {name.rpartition(".")[0] for name in where}
    described = [(layer, conf) for layer, conf in described if layer in modules]
    refuse_packed(where, str(path), {layer for layer, _ in described})
    settings = settings_of(described, str(path), left)
    formats = {layer: conf["format"] for layer, conf in settings.items() if packing_of(conf) is None}
    packed = packed_weights(settings, where, shapes, dtypes, str(path))
    for name, weight in packed.items():
        shapes[name], dtypes[name] = weight.shape, torch.float32
        bias = shapes.get(f"{name.removesuffix('weight')}bias", ())
        if len(bias) == 1 and weight.fits((bias[0], weight.shape[1])):
            # Its length is not padded.
            shapes[name] = (bias[0], weight.shape[1])
        for beside, _ in weight.beside.values():
            del where[beside], shapes[beside], dtypes[beside]
    dtypes |= dtypes_meant(dtypes, formats, str(path))
    return Stored(str(path), form, prefix, where, dict(files), shapes, dtypes, packed, settings, quantized, 0), metadata


def match_parameters(
    checkpoint: Stored, parameters: Mapping[str, Tensor], allow_unknown: bool = False
) -> dict[str, list[Part]]:
    """Parameter of the network -> the stored tensors that make it up, found by headers alone.

    Raises CheckpointError for tensors that are missing, of a wrong shape, quantized without a scale, or unknown unless
    `allow_unknown`.
    """
    table = dict(checkpoint.form.modules(checkpoint.depth))
    stored, used = checkpoint.where, set()
    unreadable: list[str] = []
    # In a file with scales, an 8-bit weight without one is incomplete, of a convolution too.
    scaled = any(name in MARKERS or name.endswith((".scale_weight", ".weight_scale")) for name in stored)
    found: dict[str, list[Part]] = {}
    missing, wrong = [], []
    for name, parameter in parameters.items():
        module, _, kind = name.rpartition(".")
        found[name] = []
        for source in table[module]:
            part = stored_part(stored, source, kind)
            if part is None:
                missing.append(f"{source}.{kind}")
                continue
            found[name].append(part)
            used |= {part.name, *(f"{source}.{suffix}" for suffix in BESIDE if kind == "weight")}
            shape, dtype = checkpoint.shapes[part.name], checkpoint.dtypes[part.name]
            want = (parameter.shape[0] // len(table[module]), *parameter.shape[1:])
            scale_shape = () if part.scale not in stored else checkpoint.shapes[part.scale]
            scale_dtype = None if part.scale not in stored else checkpoint.dtypes[part.scale]
            if dtype not in (*WIDE, *FP8, torch.int8):
                unreadable.append(f"{part.name} as {in_words(dtype)}")
            elif scale_dtype not in (None, *WIDE):
                unreadable.append(f"{part.scale} as {in_words(scale_dtype)}")
            elif len(scale_shape) > 1 and scale_shape[1] > 1:
                unreadable.append(f"{part.name} with a scale for each block, as in mxfp8 and nvfp4")
            if shape != want:
                wrong.append(f"{part.name} has shape {list(shape)}, the network wants {list(want)}")
            if part.scale is not None:
                used.add(part.scale)
                if part.scale not in stored:
                    missing.append(part.scale)
                elif math.prod(scales := checkpoint.shapes[part.scale]) not in (1, want[0]):
                    wrong.append(
                        f"{part.scale} has shape {list(scales)}, the network wants one number, or one for each row"
                    )
            elif not dtype.is_floating_point or (
                scaled and dtype.itemsize == 1 and len(shape) > 1 and kind == "weight"
            ):
                missing.append(f"{source}.{'scale_weight' if dtype.is_floating_point else 'weight_scale'}")
    extra = [] if allow_unknown else sorted(set(stored) - used - set(MARKERS))
    extra = [name for name in extra if not is_setting(name, checkpoint.dtypes[name], checkpoint.shapes[name])]
    for problem, names, remedy in (
        ("stores what cannot be read", unreadable, READABLE),
        ("lacks", missing, "download it again"),
        ("does not fit", wrong, "check that its config.json belongs to it"),
        ("holds unknown tensors", extra, f"check that it is a {checkpoint.form.model}"),
    ):
        if names:
            shown = listed(names, characters=_CHARACTERS, separator="; ")
            raise CheckpointError(f"{checkpoint.source} {problem}: {shown}; {remedy}")
    return found


def json_metadata(metadata: Mapping[str, str], key: str, path: str | Path) -> dict[str, Any]:
    """An object that a file's metadata holds as JSON; {} without it. Raises CheckpointError for anything else."""
    text = metadata.get(key) or "{}"
    return parse_record(
        text, dict[str, Any], f"{path} has unreadable {key} metadata: it", "a JSON object", error=CheckpointError
    )
