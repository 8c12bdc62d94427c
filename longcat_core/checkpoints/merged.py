"""LoRAs in a loaded network, exchanged without loading it anew."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch

from ..model.transformer import LongCatTransformer
from ..optimize.kernels.elementwise import quantise_rows
from ..optimize.quantization import Fp8Linear
from .load import Checkpoint, Reader
from .lora import Lora, LoraStack


class MergedLoras:
    """The LoRAs of a network whose weights came from `checkpoint`.

    Weights that change are read from the checkpoint again, so what was merged leaves no trace: not even of rounding.
    """

    def __init__(self, model: LongCatTransformer, checkpoint: Checkpoint, loras: Iterable[Lora] = ()) -> None:
        """loras: those that are in the network already."""
        self.model, self.checkpoint, self._loras = model, checkpoint, tuple(loras)

    def _read(self, loras: Iterable[Lora]) -> LoraStack:
        # 8-bit layers keep the shapes of their weights.
        return LoraStack(loras, {name: parameter.shape for name, parameter in self.model.named_parameters()})

    @torch.no_grad()
    def set(self, loras: Iterable[Lora] = ()) -> list[str]:
        """Have these LoRAs in the network, and no others; returns the parameters that were written.

        8-bit layers are quantised anew from the merged weight. Everything is checked before any weight changes; raises
        CheckpointError as `LoraStack`, and where the checkpoint's files are gone.
        """
        loras = tuple(loras)
        stack, reader = self._read(loras), Reader(self.checkpoint)
        with warnings.catch_warnings():
            # What does not match was said when they were merged.
            warnings.simplefilter("ignore")
            before = self._read(self._loras)
        names = list(dict.fromkeys((*before.weights, *stack.weights)))
        for name in names:
            # Asks for every file, so that none is missed halfway.
            for part in self.checkpoint.parts(name):
                reader.rows(part.name, 0, 1)
        for name in names:
            parameter, parts = self.model.get_parameter(name), self.checkpoint.parts(name)
            layer = self.model.get_submodule(name.rpartition(".")[0])
            eight_bit = isinstance(layer, Fp8Linear)
            kept = reader.e4m3(parts, parameter.device) if eight_bit and name not in stack else None
            if kept is None:
                dtype = layer.dtype if eight_bit else parameter.dtype
                wide = torch.float32 if name in stack else dtype
                weight = reader.into(torch.empty(parameter.shape, dtype=wide, device=parameter.device), parts)
                weight = stack.add(name, weight).to(dtype) if name in stack else weight
                kept = quantise_rows(weight) if eight_bit else (weight, None)
            parameter.copy_(kept[0])
            if eight_bit:
                layer.weight_scale.copy_(kept[1])
        self._loras = loras
        return names
