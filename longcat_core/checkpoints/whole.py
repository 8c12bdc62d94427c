"""Open and read a model that is loaded in one piece, a text encoder or a VAE, under any prefix and in any form."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..files.tensor_files import TensorFile
from ..files.weight_files import open_weights
from .formats import MAX_BLOCKS, Format
from .quantized import MARKERS, refuse_packed
from .reader import Reader, Watch, Weight, require_finite
from .stored import Stored, collect, match_parameters


def open_whole(
    path: Path,
    forms: Sequence[Format],
    remedy: str,
    beside: Collection[str] = (),
    files: Mapping[Path, TensorFile] | None = None,
) -> Stored:
    """Parse the headers of the model at `path`, a file or a folder: its form, the prefix of its names, its tensors.

    A file may hold other models too, under other prefixes. beside: names that are not parameters. remedy: the end of
    the sentence for another model. files: the opened files, unless they are to be found at `path`. Raises
    CheckpointError.
    """
    files = open_weights(path, remedy) if files is None else files
    names = [name for opened in files.values() for name in opened.header]
    found = list(_recognized(names, forms))
    if not found:
        refuse_packed(names, str(path))
        sample = ", ".join(names[:3]) or "no tensors"
        raise CheckpointError(f"{path} is not a {forms[0].model} (it holds {sample}); {remedy}")
    form = found[0][0]
    prefixes = sorted(prefix for other, prefix in found if other is form)
    if len(prefixes) > 1:
        raise CheckpointError(
            f"{path} holds more than one {form.model}, under '{prefixes[0]}' and '{prefixes[1]}'; keep one in the file"
        )
    stored, _ = collect(path, files, form, prefixes[0])
    where = {name: file for name, file in stored.where.items() if name not in beside}
    # A marker may lack the prefix.
    where |= {name.rpartition(".")[2]: file for file, opened in files.items() for name in opened.header if _marks(name)}
    return replace(stored, where=where, depth=_depth(form, where, str(path)))


def _marks(name: str) -> bool:
    return name.rpartition(".")[2] in MARKERS


def _recognized(names: Sequence[str], forms: Iterable[Format]) -> Iterator[tuple[Format, str]]:
    """The forms whose signature the names have, each with the prefix before it."""
    for form in forms:
        anchor = form.signature[0]
        modules = {name.rpartition(".")[0] + "." for name in names}
        prefixes = {module.removesuffix(anchor) for module in modules if module.endswith(anchor)}
        for prefix in prefixes:
            whole = not prefix or prefix.endswith(".")
            if whole and all(any(name.startswith(prefix + mark) for name in names) for mark in form.signature):
                yield form, prefix


def _depth(form: Format, names: Iterable[str], source: str) -> int:
    """How many blocks the names have. Raises CheckpointError unless they are numbered from 0 without a gap."""
    if not form.block:
        return 0
    marker = form.block_prefix.partition("{i}")[0]
    numbers = {name.removeprefix(marker).partition(".")[0] for name in names if name.startswith(marker)}
    if len(numbers) > MAX_BLOCKS:
        raise CheckpointError(f"{source} has {len(numbers)} blocks, more than any {form.model}; give another file")
    missing = sorted({str(i) for i in range(len(numbers))} - numbers, key=int)
    if missing:
        raise CheckpointError(f"{source} lacks {marker}{missing[0]}, though it has a later block; download it again")
    return len(numbers)


def read_whole(
    stored: Stored,
    parameters: Mapping[str, Tensor],
    device: torch.device | str = "cpu",
    watch: Watch | None = None,
) -> dict[str, Tensor]:
    """The numbers of these parameters, which lie on the meta device, in their dtypes on `device`; see `read_each`."""
    return dict(read_each(stored, parameters, device, watch))


def read_each(
    stored: Stored,
    parameters: Mapping[str, Tensor],
    device: torch.device | str = "cpu",
    watch: Watch | None = None,
    rows: Mapping[str, Tensor] = MappingProxyType({}),
) -> Generator[tuple[str, Tensor]]:
    """`read_whole` parameter by parameter, in the given order.

    watch: called after every piece that is read. rows: of parameters in one part, the numbers of the rows that are
    wanted, ascending. Raises CheckpointError at once for tensors that do not make up the model, and behind the last
    parameter for one with NaN or infinity.
    """
    stored = stored.fitted(parameters)
    parts, reader = match_parameters(stored, parameters), Reader(stored, device)

    def each() -> Generator[tuple[str, Tensor]]:
        extremes = {}
        with reader.ahead((part for name in parameters for part in parts[name]), watch):
            for name, parameter in parameters.items():
                shape = (len(rows[name]), *parameter.shape[1:]) if name in rows else parameter.shape
                weight = torch.empty(shape, dtype=parameter.dtype, device=device)
                if name in rows:
                    reader.some(weight, parts[name][0], rows[name])
                else:
                    reader.into(weight, parts[name])
                extremes[name] = Weight(weight).extremes()
                yield name, weight
                # The caller may have dropped it.
                del weight
        require_finite(extremes, stored.source, next(iter(parameters.values())).dtype, device)

    return each()
