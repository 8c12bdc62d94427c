"""LongCat Audio Encoder Loader and LongCat Encode Audio: what people say, as LongCat-Video-Avatar hears it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.model_management
from comfy_api.latest import io

from ..longcat_core.errors import LongCatError
from ..longcat_core.files.media import Sound
from ..longcat_core.generate.audio import (
    AudioEncoder,
    Embeddings,
    Voices,
    audio_encoder_of,
    combine,
    embed_voices,
    load_audio_encoder,
    seconds_of,
    segments_for,
)
from .checks import check_length, check_ranges
from .inputs import LongCatNode
from .loaders import find
from .progress import working
from .sounds import UNCONNECTED, sound_of

HEARING, LOADING = "listening", "loading the audio encoder"
# Mode of `combine` for each order of two sounds.
ORDERS = {"together": "para", "in turn": "add"}
# Key of our voices in an AUDIO_ENCODER_OUTPUT.
VOICES = "longcat_voices"


class LoadedEncoder:
    """An AUDIO_ENCODER that LongCat Encode Audio takes."""

    def __init__(self, encoder: AudioEncoder) -> None:
        self.encoder = encoder

    def encode_audio(self, *args: Any, **kwargs: Any) -> None:
        """What the stock AudioEncoderEncode calls. Raises LongCatError."""
        raise LongCatError("AudioEncoderEncode got LongCat's audio encoder; connect LongCat Encode Audio instead")


@dataclass(frozen=True, eq=False)
class Spoken:
    """What LongCat Encode Audio gives: the embeddings of all speakers, and their sound for the video."""

    embeddings: Embeddings
    track: Sound


def encoder_of(audio_encoder: Any) -> AudioEncoder:
    """The core's audio encoder of an AUDIO_ENCODER, ours or the stock loader's. Raises LongCatError for others."""
    if isinstance(audio_encoder, LoadedEncoder):
        return audio_encoder.encoder
    if not hasattr(audio_encoder, "get_sd"):
        raise LongCatError("audio_encoder is from another loader; connect LongCat Audio Encoder Loader")
    return audio_encoder_of(audio_encoder.get_sd())


@contextmanager
def on_device(encoder: AudioEncoder) -> Iterator[AudioEncoder]:
    """The encoder on the device where ComfyUI runs text encoders, with room made for it."""
    device, home = comfy.model_management.text_encoder_device(), encoder.device
    comfy.model_management.free_memory(2 * encoder.nbytes, device)
    try:
        yield encoder.to(device)
    finally:
        encoder.to(home)


def combined(audio: Mapping[str, Any] | None, audio_2: Mapping[str, Any] | None, order: str) -> Voices:
    """What one or two people say. Raises what `combine` raises."""
    second = [] if audio_2 is UNCONNECTED else [sound_of("audio_2", audio_2)]
    return combine([sound_of("audio", audio), *second], ORDERS[order])


def spoken(voices: Any) -> Spoken:
    """What LongCat Encode Audio gave. Raises LongCatError for another node's output."""
    found = voices.get(VOICES) if isinstance(voices, Mapping) else None
    if not isinstance(found, Spoken):
        raise LongCatError("voices is not from LongCat Encode Audio, whose output LongCat Avatar takes; connect it")
    return found


class AudioEncoderLoader(LongCatNode):
    ID = "LongCatAudioEncoderLoader"

    @classmethod
    def execute(cls, audio_encoder_name: str) -> io.NodeOutput:
        path = find("audio_encoders", audio_encoder_name)
        with working(LOADING):
            return io.NodeOutput(LoadedEncoder(load_audio_encoder(path)))


class EncodeAudio(LongCatNode):
    ID = "LongCatEncodeAudio"

    @classmethod
    def validate_inputs(cls, order=None, length=None, overlap=None) -> bool:
        check_ranges(cls.ID, {"order": order})
        check_length(length, overlap)
        return True

    @classmethod
    def execute(
        cls, audio_encoder, audio, audio_2=UNCONNECTED, order="together", others=False, seed=0, length=93, overlap=13
    ) -> io.NodeOutput:
        if audio_2 is UNCONNECTED and others:
            raise LongCatError("others is on, but only one person speaks; connect audio_2 or turn it off")
        voices = combined(audio, audio_2, order)
        for note in voices.notes:
            logging.warning("LongCat: %s", note)
        encoder = encoder_of(audio_encoder)
        segments = segments_for(voices.seconds, encoder.fps, length, overlap)
        seconds = seconds_of(segments, encoder.fps, length, overlap)
        with working(HEARING), on_device(encoder):
            embeddings = embed_voices(encoder, voices, seconds, others=others, seed=seed)
        found = {VOICES: Spoken(embeddings, voices.track), "audio_samples": len(voices.speakers[0])}
        return io.NodeOutput(found, segments, float(encoder.fps))


NODES = [AudioEncoderLoader, EncodeAudio]
