"""LongCat Long Video and LongCat Refine Long Video: minutes of video, saved piece by piece."""

from __future__ import annotations

import comfy.utils
import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image

from ..longcat_core.files.regular import lines_of
from ..longcat_core.generate import long_video, refine
from ..longcat_core.generate.footage import Footage
from ..longcat_core.generate.options import FPS
from ..longcat_core.generate.request import RELEASED, GenerateRequest
from .conditioning import check_images, end_of_clip, to_bytes, to_image
from .declarations import LONG_MODES
from .engine import ComfyEngine, output_folder
from .inputs import LongCatNode
from .models import require_longcat
from .refine import refined_size

LONG, REFINE_LONG = "LongCat Long Video", "LongCat Refine Long Video"
# Frames side by side in a segment's strip, the strip's width in pixels, and the number of strips shown at once.
STRIP, STRIP_WIDTH, STRIPS = 5, 1280, 8


def make_strip(frames: np.ndarray) -> Image.Image:
    """STRIP evenly spaced frames of a segment side by side."""
    picked = frames[np.linspace(0, len(frames) - 1, STRIP).round().astype(int)]
    image = Image.fromarray(np.concatenate(list(picked), axis=1))
    height = max(1, round(image.height * STRIP_WIDTH / image.width))
    return image.resize((STRIP_WIDTH, height), Image.Resampling.LANCZOS)


class Gathered:
    """Collects the frames of all segments as an IMAGE, and shows strips of the finished segments meanwhile."""

    def __init__(self, segments: int, frames: int, height: int, width: int) -> None:
        self.bar = comfy.utils.ProgressBar(segments)
        self.images = torch.empty((frames, height, width, 3))
        self.count = 0
        self.strips: list[Image.Image] = []

    def add(self, number: int, frames: np.ndarray) -> None:
        """Append the new frames of segment `number`, uint8 [F, H, W, 3]."""
        self.images[self.count : self.count + len(frames)] = to_image(frames)
        self.count += len(frames)
        self.strips = [*self.strips[1 - STRIPS :], make_strip(frames)]
        self.bar.update_absolute(number + 1, preview=("JPEG", self.picture(), None))

    def picture(self) -> Image.Image:
        """The strips of the last segments, one below the other."""
        return Image.fromarray(np.concatenate([np.asarray(strip) for strip in self.strips]))

    def output(self, node: type, value: str | float) -> io.NodeOutput:
        """All frames and `value`, with the strips shown on the node."""
        preview = ui.PreviewImage(to_image(np.array(self.picture())[None]), cls=node)
        return io.NodeOutput(self.images, value, ui=preview)


class LongVideo(LongCatNode):
    ID = "LongCatLongVideo"

    @classmethod
    def execute(
        cls, model, clip, vae, prompts, negative_prompt, segments, width, height, length, overlap, seed, steps,
        guidance, mode, hand_off, folder, kv_cache="exact", begin_with=None, fps=FPS,
        begin_fps=FPS,
    ) -> io.NodeOutput:  # fmt: skip
        require_longcat(model, LONG)
        spread = long_video.spread_prompts(lines_of(prompts), segments or None)
        given = None
        if begin_with is not None:
            check_images("begin_with", begin_with)
            if len(begin_with) > 1:
                begin_with = end_of_clip("begin_with", begin_with, begin_fps, fps, overlap)
            given = to_bytes(begin_with)
        schedule, later_schedule = LONG_MODES[mode]
        first = GenerateRequest(
            spread[0], negative_prompt=negative_prompt, height=height, width=width, frames=length, steps=steps,
            guidance_scale=guidance, seed=seed, schedule=schedule, num_cond_frames=overlap, kv_cache=kv_cache, fps=fps,
            given=given,
        )  # fmt: skip
        engine = ComfyEngine(LONG, model, clip, vae, [*spread, negative_prompt])
        request = long_video.LongVideoRequest(first, spread, overlap, later_schedule, hand_off, engine.settings())
        request = request.filled(RELEASED)
        kept = long_video.segment_folder(output_folder(folder))
        gathered, report = Gathered(len(spread), request.total_frames, height, width), []
        for segment in long_video.long_video(lambda: engine, request, kept):
            report.append(segment.summary(folder))
            gathered.add(segment.number, kept.frames(segment.number, segment.skip))
        return gathered.output(cls, "\n".join(report))


class RefineLongVideo(LongCatNode):
    ID = "LongCatRefineLongVideo"

    @classmethod
    def execute(
        cls, model, clip, vae, video, prompt, seed, steps, double_rate, resolution, width, height, piece, overlap,
        folder, fps=FPS,
    ) -> io.NodeOutput:  # fmt: skip
        require_longcat(model, REFINE_LONG)
        check_images("video", video)
        height, width = refined_size(video, resolution, width, height)
        request = refine.RefineRequest(prompt, seed, double_rate, height, width, steps, piece, overlap, fps)
        request.check()
        engine = ComfyEngine(REFINE_LONG, model, clip, vae, [prompt])
        kept = refine.piece_folder(output_folder(folder))
        # Converted piece by piece: a second copy of a long video may not fit into memory.
        frames = Footage(len(video), *video.shape[1:3], lambda: (to_bytes(frame[None])[0] for frame in video))
        settings, factor = engine.settings(), request.factor
        gathered = Gathered(len(request.pieces(frames)), factor * len(video), height, width)
        for number, skip, _ in refine.refine_in_folder(lambda: engine, RELEASED, frames, request, kept, settings):
            gathered.add(number, kept.frames(number, skip))
        return gathered.output(cls, factor * fps)


NODES = [LongVideo, RefineLongVideo]
