"""ComfyUI's AUDIO and the core's sounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..longcat_core.errors import LongCatError
from ..longcat_core.files.media import Sound

# In place of the AUDIO of an input that nothing is connected to; None comes from a video without sound.
UNCONNECTED: Mapping[str, Any] = {}


def sound_of(name: str, audio: Mapping[str, Any] | None) -> Sound:
    """An AUDIO. name: of the input. Raises LongCatError for that of a mute video, which is None, for a batch of sounds
    and for samples that are not finite."""
    if audio is None:
        raise LongCatError(f"{name} is from a video without sound; connect a sound")
    waveform = audio["waveform"]
    if len(waveform) != 1:
        raise LongCatError(f"{name} holds {len(waveform)} sounds; connect one at a time")
    if not waveform.isfinite().all():
        raise LongCatError(f"{name} has samples that are not finite; connect another sound")
    return Sound(waveform[0], audio["sample_rate"])


def audio_of(sound: Sound) -> dict[str, Any]:
    """A Sound as AUDIO."""
    return {"waveform": sound.samples[None], "sample_rate": sound.rate}


def part_of(sound: Sound, start: float, seconds: float) -> Sound:
    """`seconds` of a sound from `start` on, with silence where it has ended."""
    rest = sound.samples[:, round(start * sound.rate) :]
    return Sound(rest if rest.shape[1] else sound.samples[:, :1] * 0, sound.rate).cut(seconds)
