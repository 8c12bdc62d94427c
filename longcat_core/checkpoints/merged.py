"""Exchange the LoRAs that are merged into a network, without loading it again."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..model.transformer import LongCatTransformer
from ..optimize.quantization import Fp8Linear
from .load import Checkpoint
from .lora import Lora, LoraStack, OpenedLora, changed_weights
from .reader import Reader


class MergedLoras:
    """The LoRAs merged into a network whose weights came from `checkpoint`.

    Weights that change are read from the checkpoint again, so removing a LoRA leaves no rounding error behind.
    """

    def __init__(
        self, model: LongCatTransformer, checkpoint: Checkpoint, loras: Iterable[Lora | OpenedLora] = ()
    ) -> None:
        """loras: those that are merged already."""
        self.model, self.checkpoint = model, checkpoint
        self._changed = changed_weights(loras, self._shapes())

    def _shapes(self) -> dict[str, torch.Size]:
        # 8-bit layers keep the shapes of their weights.
        return {name: parameter.shape for name, parameter in self.model.named_parameters()}

    @torch.no_grad()
    def set(self, loras: Iterable[Lora | OpenedLora] = ()) -> list[str]:
        """Merge these LoRAs and no others into the network; returns the parameters that were written.

        8-bit layers are quantized again from the merged weight. Everything is checked before any weight changes. Raises
        CheckpointError as `LoraStack`, and if the checkpoint's files are missing.
        """
        stack, reader = LoraStack(loras, self._shapes()), Reader(self.checkpoint)
        names = list(dict.fromkeys((*self._changed, *stack.weights)))
        for name in names:
            # A missing file is found here, before any weight changes.
            for part in self.checkpoint.parts(name):
                reader.rows(part.name, 0, 1)
        for name in names:
            parameter, layer = self.model.get_parameter(name), self.model.get_submodule(name.rpartition(".")[0])
            scale = layer.weight_scale if isinstance(layer, Fp8Linear) else None
            dtype = layer.dtype if isinstance(layer, Fp8Linear) else parameter.dtype
            parts = self.checkpoint.parts(name)
            weight = reader.weight(name, parts, stack, dtype, parameter.device, eight_bit=scale is not None)
            # As in `merge_lora`.
            with torch.inference_mode(parameter.is_inference()):
                parameter.copy_(weight.values)
                if scale is not None and weight.scale is not None:
                    scale.copy_(weight.scale)
        self._changed = stack.weights
        return names
