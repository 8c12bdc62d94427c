"""LongCat Sample Clip and LongCat Sample Speech: what a first try starts from, where the input folder holds nothing."""

from __future__ import annotations

from fractions import Fraction

import torch
from comfy_api.latest import InputImpl, Types, io, ui

from ..longcat_core.files.media import Sound
from ..longcat_core.generate.audio.speech import RATE
from ..longcat_core.generate.options import FPS
from ..longcat_core.nano.avatar.measure import FRESH, frames_of, picture
from ..longcat_core.nano.avatar.sounds import FPS as SPOKEN_FPS
from ..longcat_core.nano.avatar.sounds import voice
from ..longcat_core.nano.world import render_clip
from .images import to_image
from .inputs import LongCatNode
from .sounds import audio_of
from .widgets import SAMPLES, SPEAKING

SIZE = {"frames": 33, "height": 64, "width": 96}
SEED = 1
# How many segments of nano's length the sounds take.
SEGMENTS = 3


class SampleClip(LongCatNode):
    ID = "LongCatSampleClip"

    @classmethod
    def execute(cls, scene: str) -> io.NodeOutput:
        frames = to_image(render_clip(SAMPLES[scene], **SIZE, seed=SEED))
        video = InputImpl.VideoFromComponents(Types.VideoComponents(images=frames, frame_rate=Fraction(FPS)))
        return io.NodeOutput(frames[:1], frames, float(FPS), video, ui=ui.PreviewImage(frames[:1], cls=cls))


class SampleSpeech(LongCatNode):
    ID = "LongCatSampleSpeech"

    @classmethod
    def execute(cls, scene: str) -> io.NodeOutput:
        image = to_image(picture(SPEAKING[scene], SEED))
        waves = (torch.from_numpy(voice(FRESH + i, frames_of(SEGMENTS) / SPOKEN_FPS)).float() for i in range(2))
        sounds = [audio_of(Sound(wave[None], RATE)) for wave in waves]
        return io.NodeOutput(image, *sounds, ui=ui.PreviewImage(image, cls=cls))


NODES = [SampleClip, SampleSpeech]
