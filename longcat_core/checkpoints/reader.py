"""Read the numbers of stored tensors: row by row, dequantized, with LoRAs added, and checked to be finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..files.read_ahead import THREADS, ReadAhead
from ..optimize.kernels.elementwise import quantize_rows
from ..optimize.streaming import pinned
from .formats import times_scale
from .lora import LoraStack
from .quantized import WIDE, in_words
from .stored import Part, Stored

# Numbers that are converted at a time, which a loader holds besides the network and one stored tensor; more on their
# way to a GPU, where each piece costs turns of Python's threads, which take milliseconds while another one imports.
PIECE, PIECE_CUDA = 1 << 22, 1 << 24
# Pieces that are prefetched.
AHEAD = THREADS + 3

# Two numbers, the smallest and the largest.
Extremes = Sequence[Tensor]


class Weight(NamedTuple):
    """A parameter as the network holds it. scale: [rows, 1] fp32, which multiplies the values of 8-bit layers. stored:
    whether these were in the file."""

    values: Tensor
    scale: Tensor | None = None
    stored: bool = False

    def extremes(self) -> Extremes:
        """Smallest and largest value, or scale, on the weight's device; NaN where any number is."""
        if self.scale is None:
            return self.values.aminmax()
        if not self.stored:
            # Rows with a number that is not finite got such a scale.
            return self.scale.aminmax()
        # e4m3 has no infinity, and one NaN of each sign.
        bad = (self.values.view(torch.uint8) & 0x7F == 0x7F).any()
        return self.scale.masked_fill(bad, torch.nan).aminmax()


# Called with the bytes that are read and those of all; what it raises ends the reading.
Watch = Callable[[int, int], None]


class Reader:
    """Reads the numbers of a checkpoint, mostly for `device`. Raises CheckpointError if its files can no longer
    be read."""

    def __init__(self, checkpoint: Stored, device: torch.device | str = "cpu") -> None:
        self.checkpoint = checkpoint
        self._device = torch.device(device)
        self._piece = PIECE_CUDA if self._device.type == "cuda" else PIECE
        self._ahead: ReadAhead | None = None
        self._watch: Callable[[int], None] = lambda count: None

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of a stored tensor on the CPU, in its dtype."""
        if self._ahead is not None and (found := self._ahead.take((name, start, stop))) is not None:
            self._watch(found.nbytes)
            return found
        return self._read(name, start, stop)

    @contextmanager
    def ahead(
        self, parts: Iterable[Part], watch: Watch | None = None, places: Mapping[str, Tensor] | None = None
    ) -> Iterator[None]:
        """Inside the `with` block, threads prefetch the `pieces` of these parts, which must be read in this order. A
        piece is valid until the next one is read, or for copies to a GPU that have begun by then. watch: called after
        every piece. places: CPU memory [rows, ..] in the stored dtype that a part is read to, by its name; from a file
        it gets there without a copy."""
        cuts = [(part, cut, self._bytes(part, *cut)) for part in parts for cut in self._cuts(part)]
        done, total, places = 0, sum(size for *_, size in cuts), places or {}

        def count(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            if watch is not None:
                watch(done, total)

        def job(part: Part, cut: tuple[int, int]) -> Callable[[Tensor], Tensor]:
            if part.name not in places:
                return lambda buffer: self._read(part.name, *cut, buffer)
            place = places[part.name][slice(*cut)].view(torch.uint8).flatten()
            return lambda buffer: self._read(part.name, *cut, place)

        jobs = (((part.name, *cut), job(part, cut)) for part, cut, _ in cuts)
        largest = max((size for part, _, size in cuts if part.name not in places), default=0)
        number, size = min(AHEAD, len(cuts)), min(4 * self._piece, largest)
        if self._device.type == "cuda":
            self._ahead = ReadAhead(jobs, [pinned(size) for _ in range(number)], self._sent)
        else:
            self._ahead = ReadAhead(jobs, [torch.empty(size, dtype=torch.uint8) for _ in range(number)])
        self._watch = count
        try:
            yield
        finally:
            self._ahead.close()
            self._ahead, self._watch = None, lambda count: None

    def _sent(self) -> Callable[[], object]:
        """What waits until the GPU has everything that was queued for it until now."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event.synchronize

    def _bytes(self, part: Part, start: int, stop: int) -> int:
        """Of rows as they are read."""
        packed, name = self.checkpoint.packed.get(part.name), part.name
        shape = self.checkpoint.shapes[name] if packed is None else packed.stored
        dtype = self.checkpoint.dtypes[name] if packed is None else packed.dtype
        return (stop - start) * math.prod(shape[1:]) * dtype.itemsize

    def _cuts(self, part: Part) -> Iterator[tuple[int, int]]:
        """(first row, row after the last) of each piece of a stored tensor."""
        shape, packed = self.checkpoint.shapes[part.name], self.checkpoint.packed.get(part.name)
        rows = packed.stored[0] if packed is not None else shape[0] if shape else 1
        count = max(1, self._piece * rows // max(1, math.prod(shape)))
        return ((start, min(start + count, rows)) for start in range(0, rows, count))

    def _read(self, name: str, start: int, stop: int | None, buffer: Tensor | None = None) -> Tensor:
        """Rows in the dtype that their bits have, which the file may store as bytes; of packed weights, as stored."""
        file = self.checkpoint.files[self.checkpoint.where[name]]
        rows = file.rows(self.checkpoint.prefix + name, start, stop, buffer)
        return rows if name in self.checkpoint.packed else rows.view(self.checkpoint.dtypes[name])

    def pieces(self, part: Part, device: torch.device | str = "cpu") -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) of each piece of a part, as stored, or dequantized to fp32 on `device`.

        Copies to a GPU are queued, not waited for: they are from pinned memory, or small.
        """
        if part.name in self.checkpoint.packed:
            yield from self._unpacked(part, device)
            return
        scale = self.scale(part)
        scale = None if scale is None else scale.to(device, non_blocking=True)
        for start, stop in self._cuts(part):
            rows = self.rows(part.name, start, stop)
            if part.scale is not None and scale is not None:
                factor = scale if scale.numel() == 1 else scale[start:stop]
                rows = times_scale(part.name, rows.to(device, non_blocking=True), {part.scale: factor})
            yield start, rows

    def _unpacked(self, part: Part, device: torch.device | str) -> Iterator[tuple[int, Tensor]]:
        packed, (rows, columns) = self.checkpoint.packed[part.name], self.checkpoint.shapes[part.name]
        files, prefix = self.checkpoint.files, self.checkpoint.prefix
        unpack = packed.unpack(lambda name, file: files[file].rows(prefix + name), device)
        # Several rows may be stored as one.
        ratio = packed.shape[0] // packed.stored[0]
        for start, stop in self._cuts(part):
            first, last = start * ratio, stop * ratio
            found = unpack(self.rows(part.name, start, stop).to(device, non_blocking=True), slice(first, last))
            if first < rows:
                yield first, found[: rows - first, :columns]

    def scale(self, part: Part) -> Tensor | None:
        """The scale of a part, fp32, one number or [rows]; None for plain numbers.

        Raises CheckpointError for a scale of 0 or less, and for one that multiplies numbers that were not quantized;
        `require_finite` finds the others that are wrong.
        """
        if part.scale is None:
            return None
        scale = self.rows(part.scale).float().flatten()
        if (scale.isfinite() & (scale <= 0)).any():
            raise CheckpointError(
                f"{self.checkpoint.source} has a scale of 0 or less in {part.scale}; download it again"
            )
        # ComfyUI saves a scale of 1 for every layer, the 16-bit ones too.
        if (dtype := self.checkpoint.dtypes[part.name]) in WIDE and (scale.isfinite() & (scale != 1)).any():
            raise CheckpointError(
                f"{self.checkpoint.source} has a scale in {part.scale} but stores {part.name} as {in_words(dtype)}; "
                "download it again"
            )
        return scale

    def into(self, target: Tensor, parts: list[Part]) -> Tensor:
        """Fill a parameter [rows, ..] with its parts, in the target's dtype and on its device; returns `target`."""
        first = 0
        for part in parts:
            for start, rows in self.pieces(part, target.device):
                # A copy that does not wait also converts on the GPU, not on the CPU.
                target[first + start : first + start + len(rows)].copy_(rows, non_blocking=True)
                # Release them before the next rows are read.
                del rows
            first += self.checkpoint.shapes[part.name][0]
        return target

    def some(self, target: Tensor, part: Part, rows: Tensor) -> None:
        """Fill a target [n, ..] with n rows of a part, by their ascending numbers [n] int64 on the CPU."""
        for start, piece in self.pieces(part, target.device):
            first, last = torch.searchsorted(rows, torch.tensor([start, start + len(piece)])).tolist()
            if first < last:
                found = piece.to(target.device, target.dtype, non_blocking=True)
                target[first:last] = found[(rows[first:last] - start).to(target.device)]

    def e4m3(self, parts: list[Part], device: torch.device | str) -> tuple[Tensor, Tensor] | None:
        """The stored numbers [rows, columns] of a parameter and its scales [rows, 1] fp32, if all of it is e4m3."""
        if any(self.checkpoint.dtypes[part.name] != torch.float8_e4m3fn for part in parts):
            return None
        scales = []
        for part in parts:
            scale = self.scale(part)
            scale = torch.ones(1) if scale is None else scale
            scales.append(scale.expand(self.checkpoint.shapes[part.name][0]))
        values = torch.empty(self._shape(parts), dtype=torch.float8_e4m3fn, device=device)
        self.into(values, [Part(part.name) for part in parts])
        return values, torch.cat(scales)[:, None].to(device, non_blocking=True)

    def _shape(self, parts: list[Part]) -> tuple[int, ...]:
        shapes = [self.checkpoint.shapes[part.name] for part in parts]
        return sum(shape[0] for shape in shapes), *shapes[0][1:]

    def weight(
        self,
        name: str,
        parts: list[Part],
        stack: LoraStack,
        dtype: torch.dtype,
        device: torch.device | str,
        eight_bit: bool,
    ) -> Weight:
        """Parameter `name` of the network with the LoRAs of `stack`, in `dtype`, or quantized for an 8-bit layer.

        Weights stored as e4m3 keep their numbers and scales in an 8-bit layer unless a LoRA changes them.
        """
        changed = name in stack
        if eight_bit and not changed and (stored := self.e4m3(parts, device)) is not None:
            return Weight(*stored, stored=True)
        # fp32 where a LoRA is added, so that the sum is rounded, not its terms.
        target = torch.empty(self._shape(parts), dtype=torch.float32 if changed else dtype, device=device)
        self.into(target, parts)
        if changed:
            target = stack.add(name, target).to(dtype)
        return Weight(*quantize_rows(target)) if eight_bit else Weight(target)


def require_finite(
    extremes: dict[str, Extremes], source: str, dtype: torch.dtype | None, device: torch.device | str
) -> None:
    """Raise CheckpointError for the first parameter with a non-finite extreme; this waits for the device once."""
    numbers = [number.to(device, torch.float32, non_blocking=True) for both in extremes.values() for number in both]
    finite = torch.stack(numbers).view(-1, 2).isfinite().all(1).tolist()
    for name, fine in zip(extremes, finite, strict=True):
        if not fine:
            remedy = "load it as bfloat16 or float32" if dtype == torch.float16 else "download it again"
            raise CheckpointError(f"{source} has NaN or infinite values in {name}; {remedy}")
