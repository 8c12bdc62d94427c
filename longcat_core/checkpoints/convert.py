"""Write a checkpoint of any form as one file of another form, and measure what was lost."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError, LongCatError
from ..files.places import check_place, check_suffix
from ..files.safetensors_io import stream_safetensors
from ..model.transformer import LongCatTransformer
from ..optimize.kernels.elementwise import E4M3_MAX, TINY
from ..optimize.quantization import AUDIO_LAYERS, LAYERS
from .formats import COMFYUI, OFFICIAL, Format, Table, for_network
from .load import CONFIG_KEY, Checkpoint, open_checkpoint
from .reader import Reader
from .stored import Part, match_parameters

INT8_MAX = 127
# Computed once for all steps, in 16 bits where an avatar runs in 8.
AUDIO_KEYS = "audio_attn.kv"
# How the names of a model's files end that lie beside its weights.
_BESIDE = ("config.json", ".index.json")

# Tensors by the suffix of their name after the module's.
Suffixed = dict[str, Tensor]


def as_scaled_fp8(weight: Tensor) -> Suffixed:
    """weight [out, in] as e4m3 with one scale, []."""
    scale = (weight.abs().amax().clamp(min=TINY) / E4M3_MAX).float()
    values = (weight / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return {"weight": values, "scale_weight": scale}


def as_int8(weight: Tensor) -> Suffixed:
    """weight [out, in] as int8 with a scale for each row, [out]."""
    scale = weight.abs().amax(1).clamp(min=TINY) / INT8_MAX
    return {"weight_int8": (weight / scale[:, None]).round().to(torch.int8), "weight_scale": scale.float()}


@dataclass(frozen=True)
class Target:
    """A form to write. small: whether `encode` stores a module's weight; everything else is bf16.

    markers: tensors that the whole file has besides.
    """

    form: Format
    small: Callable[[str], bool] = lambda module: False
    encode: Callable[[Tensor], Suffixed] = lambda weight: {"weight": weight.bfloat16()}
    markers: Suffixed = field(default_factory=dict)

    def stored(self, table: Table, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of everything that stores parameter `name` of the network, [rows, ..].

        table: the form's names of the network's modules.
        """
        module, _, kind = name.rpartition(".")
        for source, part in zip(table[module], tensor.chunk(len(table[module])), strict=True):
            small = kind == "weight" and self.small(module)
            for suffix, value in (self.encode(part) if small else {kind: part.bfloat16()}).items():
                yield f"{source}.{suffix}", value


def _fp8_layer(module: str) -> bool:
    # Embeddings, modulation and the final layer compute in fp32.
    return module.startswith("blocks.") and module.split(".", 2)[2] in (*LAYERS, *AUDIO_LAYERS, AUDIO_KEYS)


def _int8_layer(module: str) -> bool:
    # Every linear layer but the last, as in official files.
    return not module.endswith(("norm", "patch_embed", "final_layer.linear"))


TARGETS = {
    "bf16": Target(OFFICIAL),
    # Two numbers in the marker ask ComfyUI for products in 16 bits, so that only weights are quantized.
    "comfyui-fp8": Target(
        COMFYUI, _fp8_layer, as_scaled_fp8, {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    ),
    "int8": Target(OFFICIAL, _int8_layer, as_int8),
}


@dataclass(frozen=True)
class LayerError:
    """The conversion error of a tensor.

    relative: norm of the difference over the source's norm. largest: largest difference over the source's largest
    number. kind: the module's name without its block.
    """

    name: str
    kind: str
    relative: float
    largest: float


def convert(
    source: str | Path, destination: str | Path, to: str, progress: Callable[[int, int], None] = lambda done, of: None
) -> list[LayerError]:
    """Write the checkpoint `source` to the file `destination` in the form `to`, one of TARGETS; returns the errors.

    One parameter at a time is held. Before the file takes its name, it is read back like any checkpoint, compared
    number by number with what was written, and measured against the source. progress: called with (done, total) after
    every parameter that is written or read back. Raises LongCatError for bad input, and leaves `destination` as it was.
    """
    target, destination = TARGETS[to], Path(destination)
    checkpoint = open_checkpoint(source)
    target = replace(target, form=for_network(target.form, checkpoint.config.audio is not None))
    table = dict(target.form.modules(checkpoint.config.depth))
    with torch.device("meta"):
        model = LongCatTransformer(checkpoint.config)
        parameters = dict(model.named_parameters())
    parts = match_parameters(checkpoint, parameters)
    with torch.no_grad():
        stored = [pair for name, parameter in parameters.items() for pair in target.stored(table, name, parameter)]
    header = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in (*target.markers.items(), *stored)}
    reader = Reader(checkpoint)
    size = sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in header.values())
    check_destination(destination, checkpoint, size)
    errors: list[LayerError] = []
    done, of = 0, 2 * len(parameters)

    def step() -> None:
        nonlocal done
        done += 1
        progress(done, of)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield from target.markers.items()
        for name, parameter in parameters.items():
            whole = _wide(reader, parts[name], parameter)
            if not torch.stack(whole.aminmax()).isfinite().all():
                raise CheckpointError(f"{source} has NaN or infinite values in {name}; download it again")
            yield from target.stored(table, name, whole)
            step()

    def check(written: Path) -> None:
        again = open_checkpoint(written)
        if again.config != checkpoint.config or again.form != target.form:
            raise CheckpointError(f"{destination} reads back as another model; nothing was written")
        found, other = match_parameters(again, parameters), Reader(again)
        for name, parameter in parameters.items():
            whole = _wide(reader, parts[name], parameter)
            for key, tensor in target.stored(table, name, whole):
                if not torch.equal(_bytes(tensor), _bytes(other.rows(key))):
                    raise CheckpointError(
                        f"{destination} reads back with another {key} than was written; the disk or memory is faulty"
                    )
            errors.extend(_errors(name, found[name], whole, _wide(other, found[name], parameter)))
            step()

    metadata = {"format": "pt", CONFIG_KEY: json.dumps(checkpoint.config.to_dict())}
    stream_safetensors(destination, header, tensors(), metadata, check)
    return errors


def _wide(reader: Reader, parts: list[Part], parameter: Tensor) -> Tensor:
    return reader.into(torch.empty(parameter.shape, dtype=torch.float32), parts)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _errors(name: str, parts: list[Part], wanted: Tensor, found: Tensor) -> Iterator[LayerError]:
    kind = name.split(".", 2)[2] if name.startswith("blocks.") else name
    for part, one, other in zip(parts, wanted.chunk(len(parts)), found.chunk(len(parts)), strict=True):
        off = other.sub_(one)
        relative = off.norm() / one.norm().clamp(min=TINY)
        largest = _largest(off) / _largest(one).clamp(min=TINY)
        yield LayerError(part.name, kind, float(relative), float(largest))


def _largest(tensor: Tensor) -> Tensor:
    # In one pass, without a copy.
    return torch.stack(tensor.aminmax()).abs().max()


def check_destination(destination: Path, checkpoint: Checkpoint, size: int) -> None:
    """Raise LongCatError unless `size` bytes can be written to `destination` without damage to the checkpoint."""
    check_suffix(destination, (".safetensors",))
    check_apart(destination, Path(checkpoint.source))
    for file in checkpoint.files:
        if Path(checkpoint.source).is_dir() and file.resolve().parent == destination.resolve().parent:
            raise LongCatError(f"{destination} would lie among the source's own files; choose another folder")
    check_place(destination, size)


def check_report(report: Path, source: Path, destination: Path) -> None:
    """Raise LongCatError unless a report can be written to `report` without damage to the source or the destination."""
    check_suffix(report, (".json",), "report")
    check_place(report)
    check_apart(report, source)
    # A link need not lead anywhere yet.
    if report.resolve() == destination.resolve():
        raise LongCatError(f"report {report} leads to {destination}, the output; give another name to --report")


def check_apart(path: Path, source: Path) -> None:
    """Raise LongCatError if `path` is a file of the checkpoint `source`, by any of its names, or a link to one.

    A folder's are all files in it; a file's are also the configs beside it.
    """
    if not path.exists():
        return
    if source.is_dir():
        files = [file for file in source.rglob("*") if file.is_file()]
    else:
        beside = source.parent.glob("*.json") if source.parent.is_dir() else ()
        files = [source, *(file for file in beside if file.name.endswith(_BESIDE))]
    for file in files:
        if file.exists() and os.path.samefile(file, path):
            which = "the source itself" if file == source else f"{file.name} in the source's folder"
            raise LongCatError(f"{path} is {which}; give another name")
