"""A model's files, checked and opened once before any weight is read, and then handed down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..checkpoints.load import Checkpoint, open_checkpoint, without_audio
from ..checkpoints.lora import Lora, OpenedLora, open_loras
from ..errors import check_type
from ..optimize.attention import check as check_attention
from .inputs import loras_of
from .paths import ModelPaths


@dataclass(frozen=True)
class OpenedModel:
    """What `open_model` found: all files exist, the LoRAs are read, the attention backend is known."""

    paths: ModelPaths
    loras: tuple[OpenedLora, ...] = ()

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The transformer's checkpoint, opened at first use.

        Raises CheckpointError as `open_checkpoint` does, and for an avatar.
        """
        return without_audio(open_checkpoint(self.paths.model))


def open_model(
    paths: ModelPaths | None = None, lora: str | Path | Sequence[Lora] | None = None, attention: str = "auto"
) -> OpenedModel:
    """Check everything about a model that needs no weights, in milliseconds.

    paths: None for the nano model. lora: a LoRA file, or files with strengths. Raises LongCatError for files that are
    missing, for a LoRA that cannot be read, and for an unknown attention backend.
    """
    paths = ModelPaths() if paths is None else paths
    check_type("paths", paths, ModelPaths, "ModelPaths.of(model)")
    loras = loras_of(lora)
    paths.check()
    check_attention(attention)
    return OpenedModel(paths, tuple(open_loras(loras)))
