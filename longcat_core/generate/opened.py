"""A model's files, checked and opened once before any weight is read, and then handed down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from ..checkpoints.audio_encoders import AudioEncoderFiles, open_audio_encoder
from ..checkpoints.load import Checkpoint, open_checkpoint, with_audio, without_audio
from ..checkpoints.lora import Lora, OpenedLora, open_loras
from ..errors import LongCatError, check_type
from ..optimize.attention import check as check_attention
from .audio import empty_audio_encoder
from .inputs import loras_of
from .paths import ModelPaths
from .request import Defaults


@dataclass(frozen=True)
class OpenedModel:
    """What `open_model` found: all files exist, the LoRAs are read, the attention backend is known."""

    paths: ModelPaths
    loras: tuple[OpenedLora, ...] = ()

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The transformer's checkpoint, opened at first use.

        Raises CheckpointError as `open_checkpoint` does, and for an avatar where no audio encoder is named, and for
        LongCat-Video where one is.
        """
        checkpoint = open_checkpoint(self.paths.model)
        return without_audio(checkpoint) if self.paths.audio_encoder is None else with_audio(checkpoint)

    @cached_property
    def audio_encoder(self) -> AudioEncoderFiles:
        """An avatar's audio encoder, opened at first use. Raises LongCatError if it is not that of its version."""
        if self.paths.audio_encoder is None:
            raise LongCatError("the model has no audio encoder; name it with ModelPaths.of_avatar")
        opened = open_audio_encoder(self.paths.audio_encoder)
        empty_audio_encoder(opened).check(self.checkpoint.config.audio)
        return opened

    @property
    def defaults(self) -> Defaults:
        """What the model was trained for, and what it hears."""
        return replace(self.paths.defaults, audio=self.checkpoint.config.audio)


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
