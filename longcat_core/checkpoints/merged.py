"""LoRAs merged into a loaded network, exchanged without loading it again."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..model.transformer import LongCatTransformer
from ..optimize.kernels.elementwise import quantise_rows
from ..optimize.quantization import Fp8Linear
from .load import Checkpoint, Reader
from .lora import Lora, LoraStack, OpenedLora, changed_weights


class MergedLoras:
    """The LoRAs merged into a network whose weights came from `checkpoint`.

    Weights that change are read from the checkpoint again, so a LoRA that is taken out leaves no rounding error behind.
    """

    def __init__(
        self, model: LongCatTransformer, checkpoint: Checkpoint, loras: Iterable[Lora | OpenedLora] = ()
    ) -> None:
        """loras: those that are in the network already."""
        self.model, self.checkpoint = model, checkpoint
        self._changed = changed_weights(loras, self._shapes())

    def _shapes(self) -> dict[str, torch.Size]:
        # 8-bit layers keep the shapes of their weights.
        return {name: parameter.shape for name, parameter in self.model.named_parameters()}

    @torch.no_grad()
    def set(self, loras: Iterable[Lora | OpenedLora] = ()) -> list[str]:
        """Have these LoRAs in the network, and no others; returns the parameters that were written.

        8-bit layers are quantized again from the merged weight. Everything is checked before any weight changes. Raises
        CheckpointError as `LoraStack`, and where the checkpoint's files are missing.
        """
        stack, reader = LoraStack(loras, self._shapes()), Reader(self.checkpoint)
        names = list(dict.fromkeys((*self._changed, *stack.weights)))
        for name in names:
            # Touches every file now, so that a missing one is not found halfway.
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
        self._changed = stack.weights
        return names
