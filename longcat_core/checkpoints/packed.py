"""Find the packed matrices of a file by their descriptions, and hold them against the tensors beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .packings import ALIASES, PACKINGS, Packing, Settings, Shape, Unpack, packing_of
from .quantized import READABLE, in_words


@dataclass(frozen=True)
class Packed:
    """A matrix in the tensors of a file. stored, dtype: of its weight. shape: of the matrix, padded as stored. beside:
    suffix -> name of a tensor beside it, and the file that has it."""

    kind: str
    stored: Shape
    dtype: torch.dtype
    shape: Shape
    beside: dict[str, tuple[str, Path]]
    settings: dict[str, Any]

    @property
    def packing(self) -> Packing:
        return PACKINGS[self.kind]

    def fits(self, shape: Shape) -> bool:
        """Whether the matrix is one of this shape, padded."""
        pad = self.packing.multiple
        return tuple(ceil(side / pad) * pad for side in shape) == self.shape

    def unpack(self, read: Callable[[str, Path], Tensor], device: torch.device | str) -> Unpack:
        """The function that multiplies out rows on `device`. read: a tensor by its name and file."""
        tensors = {}
        for suffix, (name, file) in self.beside.items():
            tensors[suffix] = read(name, file).to(device)
            if suffix in self.packing.positive:
                scale = tensors[suffix].float()
                if (scale.isfinite() & (scale <= 0)).any():
                    raise CheckpointError(f"{file} has a scale of 0 or less in {name}; download it again")
        return self.packing.open(self.shape, self.settings, tensors)


def packed_weights(
    described: Mapping[str, Settings],
    where: Mapping[str, Path],
    shapes: Mapping[str, Shape],
    dtypes: Mapping[str, torch.dtype],
    source: str,
) -> dict[str, Packed]:
    """Name of a weight -> how it is packed, for all described layers whose `packing_of` is known.

    Raises CheckpointError for settings that cannot be read, by their name, and for tensors that do not fit them.
    """
    found = {}
    for layer, settings in described.items():
        name, kind = f"{layer}.weight", packing_of(settings)
        if kind is None or name not in where:
            continue
        packing, stored = PACKINGS[kind], f"{source} stores {layer} as {settings['format']}"
        refused = packing.refused(settings)
        if refused is not None:
            raise CheckpointError(f"{stored} with {refused}, which is not supported; {READABLE}")
        beside = {}
        for alias in (*packing.beside, *ALIASES):
            suffix = ALIASES.get(alias, alias)
            if suffix in packing.beside and f"{layer}.{alias}" in where:
                beside[suffix] = f"{layer}.{alias}"
        missing = [suffix for suffix in packing.beside if suffix not in (*beside, *packing.optional)]
        if missing:
            raise CheckpointError(f"{stored} but lacks {layer}.{missing[0]}; download it again")
        read = {"weight": packing.dtypes, **packing.beside}
        for suffix, at in {"weight": name, **beside}.items():
            if dtypes[at] not in read[suffix]:
                raise CheckpointError(f"{stored} but {at} as {in_words(dtypes[at])}; download it again")
        shape = _measured(layer, kind, settings, shapes, beside, source)
        files = {suffix: (at, where[at]) for suffix, at in beside.items()}
        found[name] = Packed(kind, shapes[name], dtypes[name], shape, files, dict(settings))
    return found


def _measured(
    layer: str, kind: str, settings: Settings, shapes: Mapping[str, Shape], beside: Mapping[str, str], source: str
) -> Shape:
    """The matrix's shape, padded. Raises CheckpointError if a tensor does not have the shape that the others need."""
    packing, stored = PACKINGS[kind], shapes[f"{layer}.weight"]
    wrong = "weight"
    try:
        if len(stored) not in (2, 4 if kind == "svdquant_w4a4" else 2):
            raise ValueError(wrong)
        shape, wanted = packing.measure(stored, settings, {suffix: shapes[at] for suffix, at in beside.items()})
        if shape[1] % packing.block(settings):
            raise ValueError(wrong)
        for suffix, at in beside.items():
            if _squeezed(shapes[at]) != _squeezed(wanted[suffix]):
                raise ValueError(suffix)
    except ValueError as error:
        wrong = str(error)
        at = beside.get(wrong, f"{layer}.{wrong}")
        raise CheckpointError(
            f"{source} stores {layer} as {settings['format']}, which {at} of shape {list(shapes[at])} does not fit; "
            "download it again"
        ) from None
    return shape


def _squeezed(shape: Shape) -> Shape:
    return tuple(side for side in shape if side != 1)
