"""LongCat Sample Clip: a picture and a clip for a first try, where ComfyUI's input folder holds none."""

from __future__ import annotations

from fractions import Fraction

from comfy_api.latest import InputImpl, Types, io, ui

from ..longcat_core.generate.options import FPS
from ..longcat_core.nano.world import render_clip
from .images import to_image
from .inputs import LongCatNode
from .widgets import SAMPLES

SIZE = {"frames": 33, "height": 64, "width": 96}


class SampleClip(LongCatNode):
    ID = "LongCatSampleClip"

    @classmethod
    def execute(cls, scene: str) -> io.NodeOutput:
        frames = to_image(render_clip(SAMPLES[scene], **SIZE, seed=1))
        video = InputImpl.VideoFromComponents(Types.VideoComponents(images=frames, frame_rate=Fraction(FPS)))
        return io.NodeOutput(frames[:1], frames, float(FPS), video, ui=ui.PreviewImage(frames[:1], cls=cls))


NODES = [SampleClip]
