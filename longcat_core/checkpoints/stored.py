"""The tensors of a model in its opened files: their names, shapes and dtypes, and how they make up its parameters."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..files.tensor_files import TensorFile
from .formats import BESIDE, MARKERS, STORED_WEIGHTS, Format

QUANT_METADATA = "_quantization_metadata"
_SHOWN = 5


@dataclass(frozen=True)
class Part:
    """A stored tensor that supplies rows of a parameter. scale: name of the tensor that multiplies it, or None."""

    name: str
    scale: str | None = None


@dataclass(frozen=True)
class Stored:
    """The tensors of any model in its opened files: a transformer, a text encoder or a VAE. `Reader` reads the numbers.

    where: tensor name (prefix stripped) -> file. shapes, dtypes: as stored, GGUF's quantized tensors as fp32.
    quantized: modules that the file's metadata describes -> their format. depth: blocks that the form repeats.
    """

    source: str
    form: Format
    prefix: str
    where: dict[str, Path]
    files: dict[Path, TensorFile]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    quantized: dict[str, dict]
    depth: int

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


def collect(path: Path, files: Mapping[Path, TensorFile], form: Format, prefix: str) -> tuple[Stored, dict[str, str]]:
    """The tensors of opened files whose names begin with `prefix`, and the files' metadata.

    Raises CheckpointError for a file that holds none, and for metadata that cannot be read.
    """
    where: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype] = {}
    metadata: dict[str, str] = {}
    quantized: dict[str, dict] = {}
    for file, opened in files.items():
        found = {name.removeprefix(prefix): entry for name, entry in opened.header.items() if name.startswith(prefix)}
        if not found:
            raise CheckpointError(f"{file} holds nothing of {path}'s model; keep one model in each folder")
        where |= dict.fromkeys(found, file)
        dtypes |= {name: dtype for name, (dtype, _) in found.items()}
        shapes |= {name: shape for name, (_, shape) in found.items()}
        metadata |= opened.metadata
        layers = dict(json_metadata(opened.metadata, QUANT_METADATA, file).get("layers") or {})
        quantized |= {str(layer).removeprefix(prefix): conf for layer, conf in layers.items() if isinstance(conf, dict)}
    return Stored(str(path), form, prefix, where, dict(files), shapes, dtypes, quantized, 0), metadata


def match_parameters(
    checkpoint: Stored, parameters: Mapping[str, Tensor], allow_unknown: bool = False
) -> dict[str, list[Part]]:
    """Parameter of the network -> the stored tensors that make it up, found by headers alone.

    Raises CheckpointError for tensors that are missing, of a wrong shape, quantized without a scale, or unknown unless
    `allow_unknown`.
    """
    table = dict(checkpoint.form.modules(checkpoint.depth))
    stored, used = checkpoint.where, set()
    # In a file with scales, an 8-bit weight without one is incomplete.
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
            elif not dtype.is_floating_point or (scaled and dtype.itemsize == 1 and len(shape) == 2):
                missing.append(f"{source}.{'scale_weight' if dtype.is_floating_point else 'weight_scale'}")
    extra = [] if allow_unknown else sorted(set(stored) - used - set(MARKERS))
    for problem, names, remedy in (
        ("lacks", missing, "download it again"),
        ("does not fit", wrong, "check that its config.json belongs to it"),
        ("holds unknown tensors", extra, f"check that it is a {checkpoint.form.model}"),
    ):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            raise CheckpointError(f"{checkpoint.source} {problem}: {'; '.join(names[:_SHOWN])}{more}; {remedy}")
    return found


def json_metadata(metadata: dict[str, str], key: str, path: Path) -> dict:
    try:
        return dict(json.loads(metadata.get(key) or "{}"))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} has unreadable {key} metadata ({error}); download it again") from error
