"""The audio and the reference frame of an avatar's conditioning, on their way through ComfyUI to the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import comfy.conds
import torch
from torch import Tensor

from ..longcat_core.errors import LongCatError
from ..longcat_core.model.audio import check_heard
from ..longcat_core.model.config import ModelConfig
from ..longcat_core.sampling.avatar import Audio, ReferenceFrame
from ..longcat_core.sampling.conditioning import latent_frames, video_frames

# Keys of a conditioning's dictionary: an `Audio`, and a `ReferenceFrame` whose latents are the VAE's.
AUDIO, REFERENCE = "longcat_audio", "longcat_reference"
# Under these names they are arguments of the model.
HEARD, SHOWN = "heard", "reference"
CONNECT = "connect positive and negative of LongCat Avatar"


class Heard(NamedTuple):
    """What the videos of one conditioning hear. frames: the latent frames of a context window; None: all."""

    audio: Audio
    frames: tuple[int, ...] | None = None

    @property
    def length(self) -> int:
        """Number of latent frames."""
        return latent_frames(self.audio.windows.shape[1]) if self.frames is None else len(self.frames)

    def same(self, other: Heard) -> bool:
        return self.audio is other.audio and self.frames == other.frames


class AudioCond(comfy.conds.CONDRegular):
    """The audio of one conditioning; of a batch of conditionings, a tuple with what each hears."""

    cond: Heard

    def process_cond(self, batch_size: int, **kwargs: Any) -> AudioCond:
        return AudioCond(self.cond)

    def can_concat(self, other: AudioCond) -> bool:
        # A map of who is where belongs to one evaluation.
        parts = self.cond, other.cond
        alike = len({(tuple(part.audio.windows.shape), part.length) for part in parts}) == 1
        return alike and all(part.audio.classes is None for part in parts)

    def concat(self, others: Sequence[AudioCond]) -> tuple[Heard, ...]:
        return self.cond, *(other.cond for other in others)

    def size(self) -> list[int]:
        """[speakers, latent frames]."""
        return [len(self.cond.audio.windows), self.cond.length]


@dataclass(frozen=True, eq=False)
class ReferenceCond:
    """A reference frame. given: as the conditioning has it; cond: with the model's normalized latents."""

    given: ReferenceFrame
    cond: ReferenceFrame

    def process_cond(self, batch_size: int, **kwargs: Any) -> ReferenceCond:
        return self

    def can_concat(self, other: ReferenceCond) -> bool:
        return self.given is other.given

    def concat(self, others: Sequence[ReferenceCond]) -> ReferenceFrame:
        return self.cond

    def size(self) -> list[int]:
        return list(self.cond.latents.shape)


def check_audio(config: ModelConfig, values: dict[str, Any], given: int) -> None:
    """Raise LongCatError unless the values of a conditioning suit each other and a network of this config.

    given: conditioning frames that the latent has.
    """
    audio, reference, noise = values.get(AUDIO), values.get(REFERENCE), values.get("noise")
    if config.audio is None:
        if audio is not None or reference is not None:
            raise LongCatError("LongCat-Video does not hear audio; load LongCat-Video-Avatar for LongCat Avatar")
        return
    if audio is None:
        raise LongCatError(f"a conditioning has no audio, which LongCat-Video-Avatar needs; {CONNECT}")
    check_heard(config.audio, audio.windows, audio.classes)
    if noise is None:
        return
    if audio.windows.shape[1] != video_frames(noise.shape[2]):
        raise LongCatError(
            f"the audio is of {audio.windows.shape[1]} frames and the latent of {video_frames(noise.shape[2])}; take "
            "both from one LongCat Avatar"
        )
    if reference is not None and reference.latents.shape[-2:] != noise.shape[-2:]:
        height, width = (8 * side for side in reference.latents.shape[-2:])
        raise LongCatError(
            f"the reference frame is of {height}x{width} pixels (height x width) and the latent of "
            f"{8 * noise.shape[3]}x{8 * noise.shape[4]}; give both the size of the video"
        )
    if audio.classes is None:
        if len(audio.windows) not in (1, noise.shape[0]):
            raise LongCatError(f"{len(audio.windows)} voices without masks; {MASKS}")
        return
    tokens = noise.shape[3] * noise.shape[4] // (config.patch_size[1] * config.patch_size[2])
    if len(audio.classes) != tokens:
        raise LongCatError("the masks are of another size than the latent; take both from one LongCat Avatar")
    if noise.shape[0] > 1:
        raise LongCatError("several people speak in one video at a time; set the batch to 1")
    if not given and reference is None:
        raise LongCatError("masks say where people are in the first frame, and none is given; give an image")


MASKS = "several voices need a mask for each person, so connect masks to LongCat Avatar"


def audio_of(conds: Any, what: str) -> Audio:
    """The audio of a CONDITIONING. Raises LongCatError if one of its parts has none."""
    found = [values.get(AUDIO) for _, values in conds]
    if not found or any(audio is None for audio in found):
        raise LongCatError(f"{what} has no audio, which LongCat-Video-Avatar needs; {CONNECT}")
    return found[0]


def strongest_guidance(positive: Any, guidance: float) -> float:
    """The scale by which to tell whether there is guidance: of the text, or with an avatar's audio the larger one."""
    heard = [values[AUDIO].guidance_scale for _, values in positive if values.get(AUDIO) is not None]
    return max([1.0, guidance, *heard]) if heard else guidance


def with_values(conds: Any, **values: Any) -> list[list[Any]]:
    """A CONDITIONING with these values in all of its parts."""
    return [[cond, {**others, **values}] for cond, others in conds]


def silent(audio: Audio) -> Audio:
    """What guidance hears where it goes away from silence: windows of zeros, which the network takes for no sound."""
    return replace(audio, windows=torch.zeros_like(audio.windows))


def in_window(cond: AudioCond, window: Any) -> AudioCond:
    """The audio of the latent frames of a context window."""
    frames = window.get_tensor(torch.arange(cond.cond.length), dim=0)
    return AudioCond(cond.cond._replace(frames=tuple(frames.tolist())))


def reference_cond(given: ReferenceFrame, latents: Tensor) -> ReferenceCond:
    """latents: those of the frame, normalized."""
    return ReferenceCond(given, replace(given, latents=latents))
