"""What a file says about its quantized tensors, held against what it stores, before any shape is compared."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..files.records import parse_record
from ..files.safetensors_io import Header
from .packings import PACKINGS

QUANT_METADATA = "_quantization_metadata"
DESCRIPTION = ".comfy_quant"
# Formats of a description whose numbers are stored one by one, and their dtypes; `PACKINGS` are the others.
QUANT_FORMATS = {
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "int8_tensorwise": torch.int8,
}
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# Numbers that mean themselves.
WIDE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
READABLE = f"give a file in bf16, GGUF, {', '.join(QUANT_FORMATS)} or a form of comfy-kitchen"
# Tensors whose dtype is that of all weights with a `scale_weight`; ComfyUI takes fp32 for e4m3.
MARKERS = ("scaled_fp8",)
_MARKED = {torch.float32: torch.float8_e4m3fn} | {dtype: dtype for dtype in FP8}
# A description is a short JSON text.
_MAX_DESCRIPTION = 1 << 16

# Formats that cannot be read, or not without a description: suffixes of tensors beside each other, after the name of
# their module, all of which the format has. A format comes before those that have fewer of the same suffixes.
PACKED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("bitsandbytes nf4", ("weight.quant_state.bitsandbytes__nf4",)),
    ("bitsandbytes fp4", ("weight.quant_state.bitsandbytes__fp4",)),
    ("bitsandbytes 4-bit", ("weight.absmax",)),
    ("bitsandbytes int8", ("SCB",)),
    ("svdquant (nunchaku)", ("qweight", "wscales")),
    ("svdquant (nunchaku)", ("qweight", "smooth_factor")),
    ("GPTQ", ("qweight", "g_idx")),
    ("AWQ", ("qweight", "qzeros")),
    ("AWQ or GPTQ", ("qweight",)),
    ("compressed-tensors nvfp4", ("weight_packed", "weight_global_scale")),
    ("compressed-tensors", ("weight_packed",)),
    ("torchao", ("_weight_qdata",)),
    ("torchao", ("weight:qdata",)),
    ("quanto", ("weight._data",)),
    ("HQQ", ("W_q",)),
    ("nvfp4", ("weight_scale_2",)),
    ("mxfp4", ("weight_blocks",)),
    ("fp8 with scales of blocks", ("weight_scale_inv",)),
    ("asym_w4a8_int8", ("weight_s_rel",)),
    ("EXL2", ("q_weight",)),
    ("EXL3", ("trellis",)),
    ("AQLM", ("codebooks",)),
    ("MLX", ("weight", "scales", "biases")),
    ("EETQ", ("weight", "weight_scales")),
    ("numbers with a separate `scale`, as SDNQ's or fp8 of an unknown writer", ("weight", "scale")),
)


@dataclass(frozen=True)
class _Metadata:
    """`_quantization_metadata`. layers: module -> its description."""

    layers: dict[str, dict[str, Any]] = field(default_factory=dict)


def described_in(metadata: Mapping[str, str], file: Path) -> dict[str, dict[str, Any]]:
    """Module -> description, by a file's metadata. Raises CheckpointError for metadata of another kind."""
    text = metadata.get(QUANT_METADATA) or "{}"
    what = f"readable as {QUANT_METADATA}"
    return parse_record(text, _Metadata, f"metadata of {file}", what, error=CheckpointError).layers


def described_beside(
    header: Header, read: Callable[[str], Tensor], source: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(module, description) of every tensor `comfy_quant`. Raises CheckpointError for one that is not JSON."""
    for name, (dtype, shape) in header.items():
        if not name.endswith(DESCRIPTION):
            continue
        if dtype != torch.uint8 or len(shape) != 1 or shape[0] > _MAX_DESCRIPTION:
            raise CheckpointError(f"{source} has an unreadable {name} ({dtype}, {list(shape)}); download it again")
        text = read(name).numpy().tobytes()
        yield (
            name.removesuffix(DESCRIPTION),
            parse_record(text, dict[str, Any], f"{name} of {source}", "a readable description", error=CheckpointError),
        )


def settings_of(
    described: Sequence[tuple[str, dict[str, Any]]], source: str, left: Collection[str] = ()
) -> dict[str, dict[str, Any]]:
    """Module -> its description, whose format is one of `QUANT_FORMATS` or `PACKINGS`; what writers nest in "params"
    is beside it. left: formats that are left to somebody else, whose modules are not among them.

    Raises CheckpointError, by its name, for any other format, and for a module with two.
    """
    found: dict[str, dict[str, Any]] = {}
    for layer, description in described:
        nested = description.get("params")
        settings = (nested if isinstance(nested, dict) else {}) | description
        # The only format in which ComfyUI-INT8-Fast writes does not have a name.
        kind = settings.setdefault("format", "int8_tensorwise" if "per_row" in settings else None)
        if not isinstance(kind, str):
            raise CheckpointError(f"{source} describes {layer} without a format; download it again")
        if kind not in (*QUANT_FORMATS, *PACKINGS):
            if kind not in left:
                raise CheckpointError(f"{source} stores {layer} as {kind}, which is not supported; {READABLE}")
            continue
        other = found.setdefault(layer, settings)
        if other["format"] != kind:
            raise CheckpointError(f"{source} describes {layer} as {other['format']} and as {kind}; download it again")
        # Writers' metadata may leave out what the tensor says.
        found[layer] = other | settings
    return found


def refuse_packed(names: Collection[str], source: str, described: Collection[str] = ()) -> None:
    """Raise CheckpointError, by its name, for a format of `PACKED`.

    described: modules with a description, which counts instead.
    """
    there = set(names)
    for kind, suffixes in PACKED:
        ending = f".{suffixes[0]}"
        for name in names:
            module = name.removesuffix(ending)
            if module == name or module in described:
                continue
            if all(f"{module}.{suffix}" in there for suffix in suffixes):
                raise CheckpointError(f"{source} stores {module} as {kind}, which is not supported; {READABLE}")


def dtypes_meant(dtypes: Mapping[str, torch.dtype], formats: Mapping[str, str], source: str) -> dict[str, torch.dtype]:
    """The dtypes that the bits of stored tensors have, where it is another than the file's own: fp8 stored as uint8.

    formats: module -> format of `QUANT_FORMATS`. Raises CheckpointError where a description, a marker or a name says
    one thing and the dtype of the tensor another.
    """
    marker = next((dtypes[name] for name in MARKERS if name in dtypes), None)
    meant = {}
    for name, have in dtypes.items():
        module, _, kind = name.rpartition(".")
        if kind == "weight_int8":
            want, word = torch.int8, "int8"
        elif kind == "weight" and module in formats:
            want, word = QUANT_FORMATS[formats[module]], formats[module]
        elif kind == "weight" and marker in _MARKED and f"{module}.scale_weight" in dtypes and have not in WIDE:
            # A marker of fp32 does not say which fp8.
            want = have if marker == torch.float32 and have in FP8 else _MARKED[marker]
            word = f"{in_words(want)} by its marker"
        else:
            continue
        if have == torch.uint8 and want in FP8:
            meant[name] = want
        elif have != want:
            raise CheckpointError(f"{source} describes {name} as {word} but stores {in_words(have)}; download it again")
    return meant


def check_marker(headers: Iterable[Header], source: str) -> None:
    """Raise CheckpointError for a marker of fp8 in files without a matrix of 8 bits, whoever's model it is."""
    entries = [(name, entry) for header in headers for name, entry in header.items()]
    marker = next((name for name, _ in entries if name.rpartition(".")[2] in MARKERS), None)
    if marker is not None and not any(dtype in (*FP8, torch.uint8) and len(shape) > 1 for _, (dtype, shape) in entries):
        raise CheckpointError(f"{source} has the marker '{marker}' but stores no matrix in fp8; download it again")


def in_words(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
