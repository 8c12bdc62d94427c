"""LoRAs applied as the network runs, beside weights that stay as loaded; the alternative to `merged`."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from ..files.safetensors_io import Stamp
from ..model.transformer import LongCatTransformer
from ..optimize.adapters import NAMES, Adapted, adapt, rank_of, release
from .lora import Lora, LoraStack, OpenedLora, check_strength, stamp_of
from .lora_alpha import file_of

# Ranks are rounded up to a multiple of this, so that a new LoRA reuses the previous one's buffers and compiled graphs.
STEP = 16


class _Ranks(NamedTuple):
    """Ranks first..last of a layer's adapter hold file number `file`, times `scale` and the file's strength."""

    file: int
    first: int
    last: int
    scale: float


class RuntimeLoras:
    """The LoRAs of a network, on any of its layers, applied at run time; used like `MergedLoras`.

    Blocks share one compiled graph, so a kind of layer has adapters in all blocks or in none, with buffers for the
    same number of ranks. Buffers grow until all LoRAs are removed, so LoRAs that fit them compile nothing.
    """

    def __init__(self, model: LongCatTransformer, loras: Iterable[Lora | OpenedLora] = ()) -> None:
        self.model = model
        self._files: list[tuple[Path, Stamp | None]] = []
        self._strengths: tuple[float, ...] = ()
        self._ranks: dict[str, list[_Ranks]] = {}
        # Kind of layer -> ranks that fit its adapters' buffers.
        self._room: dict[str, int] = {}
        self.set(loras)

    @torch.no_grad()
    def set(self, loras: Iterable[Lora | OpenedLora] = ()) -> list[str]:
        """Apply these LoRAs and no others; returns the weights whose effect changed.

        The same files with other strengths are not read again; only their scales are written. Without LoRAs the layers
        are as before the first. Everything is checked first; errors and warnings as `LoraStack`.
        """
        loras = list(loras)
        files, strengths = [_file(lora) for lora in loras], tuple(_strength(lora) for lora in loras)
        if loras and len(files) == len(self._files) and all(map(_same, files, self._files)):
            for (path, _), strength in zip(files, strengths, strict=True):
                check_strength(path, strength)
            pairs = zip(strengths, self._strengths, strict=True)
            moved = {file for file, (now, then) in enumerate(pairs) if now != then}
            self._strengths = strengths
            self._write_scales()
            return [f"{name}.weight" for name, ranks in self._ranks.items() if any(r.file in moved for r in ranks)]
        stack = LoraStack(loras, {n: p.shape for n, p in self.model.named_parameters() if not n.endswith(NAMES)})
        changed = list(dict.fromkeys([*(f"{name}.weight" for name in self._ranks), *stack.weights]))
        # No files until all are written, so that a call that fails halfway does not count.
        self._files, self._strengths = [], strengths
        self._make_room(stack)
        self._ranks = {weight.removesuffix(".weight"): self._write(weight, stack) for weight in stack.weights}
        self._write_scales()
        self._files = files
        return changed

    def _make_room(self, stack: LoraStack) -> None:
        """Adapt every layer of each kind that the stack changes, and empty all adapters."""
        kinds: dict[str, list[str]] = defaultdict(list)
        for name, module in self.model.named_modules():
            if isinstance(getattr(module, "weight", None), nn.Parameter):
                kinds[_kind(name)].append(name)
        room = dict(self._room)
        for weight in stack.weights:
            kind = _kind(weight.removesuffix(".weight"))
            rank = sum(change.rank for change in stack.changes(weight))
            room[kind] = max(room.get(kind, 0), math.ceil(rank / STEP) * STEP)
        self._room = room if stack.weights else {}
        for kind, rank in room.items():
            for name in kinds[kind]:
                layer = self.model.get_submodule(name)
                if stack.weights:
                    # The layer's weights may be in CPU memory; its LoRAs stay on the device.
                    adapt(layer, rank, device=self.model.patch_embed.weight.device)
                else:
                    release(layer)

    def _write(self, weight: str, stack: LoraStack) -> list[_Ranks]:
        """Fill the adapter of one layer; every slice of every change has its own ranks."""
        layer = self.model.get_submodule(weight.removesuffix(".weight"))
        assert isinstance(layer, Adapted), f"{weight} has no adapter to write to"
        ranks, first = [], 0
        for change in stack.changes(weight):
            start = first
            row = len(layer.lora_up) // change.count * change.index
            for up, down in zip(change.ups, change.downs, strict=True):
                last = first + len(down)
                layer.lora_down[first:last] = down.to(layer.lora_down)
                layer.lora_up[row : row + len(up), first:last] = up.to(layer.lora_up)
                first, row = last, row + len(up)
            ranks.append(_Ranks(change.file, start, first, change.scale))
        return ranks

    def _write_scales(self) -> None:
        """Write the scales of every adapter in place, which tells cached text keys that they are stale."""
        for name, module in self.model.named_modules():
            if isinstance(module, Adapted):
                scales = torch.zeros(rank_of(module))
                for ranks in self._ranks.get(name, ()):
                    scales[ranks.first : ranks.last] = ranks.scale * self._strengths[ranks.file]
                module.lora_scale.copy_(scales)


def _kind(name: str) -> str:
    """A layer's name without the number of its block."""
    return name.split(".", 2)[2] if name.startswith("blocks.") else name


def _file(lora: Lora | OpenedLora) -> tuple[Path, Stamp | None]:
    """A LoRA's file and its stamp, taken when the file was read, else now."""
    if isinstance(lora, OpenedLora):
        return lora.path, lora.read
    path = file_of(lora[0]) if Path(lora[0]).is_dir() else Path(lora[0])
    return path, stamp_of(path)


def _strength(lora: Lora | OpenedLora) -> float:
    return lora.strength if isinstance(lora, OpenedLora) else float(lora[1])


def _same(now: tuple[Path, Stamp | None], then: tuple[Path, Stamp | None]) -> bool:
    # The adapters still hold what was read from a file that is gone.
    return now[0] == then[0] and now[1] in (None, then[1])
