"""LongCat Long Video and LongCat Refine Long Video: minutes of video, saved piece by piece."""

from __future__ import annotations

import comfy.utils
import numpy as np
from comfy_api.latest import io, ui
from PIL import Image

from ..longcat_core.files.regular import lines_of
from ..longcat_core.generate import long_video, refine
from ..longcat_core.generate.footage import Footage
from ..longcat_core.generate.options import FPS
from ..longcat_core.generate.request import RELEASED, GenerateRequest
from ..longcat_core.generate.segments import SegmentFolder
from .declarations import LONG_MODES, NEW_TAKE
from .engine import ComfyEngine, output_folder
from .images import to_image
from .inputs import LongCatNode
from .models import require_longcat
from .refine import refined_size
from .video import Reel, ReelImages, ReelVideo, check_fits, end_of_clip, footage_of

# What a node knows of the prompt that it runs in.
RUNNING = (io.Hidden.unique_id, io.Hidden.dynprompt, io.Hidden.extra_pnginfo)
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
    """Collects where the frames of the segments lie, and shows strips of the finished ones meanwhile."""

    def __init__(self, segments: int) -> None:
        self.bar = comfy.utils.ProgressBar(segments)
        self.parts: list[Footage] = []
        self.strips: list[Image.Image] = []

    def add(self, number: int, part: Footage, frames: np.ndarray) -> None:
        """Append segment `number`: its new frames on the disk, and the same as uint8 [F, H, W, 3]."""
        self.parts.append(part)
        self.strips = [*self.strips[1 - STRIPS :], make_strip(frames)]
        self.bar.update_absolute(number + 1, preview=("JPEG", self.picture(), None))

    def picture(self) -> Image.Image:
        """The strips of the last segments, one below the other."""
        return Image.fromarray(np.concatenate([np.asarray(strip) for strip in self.strips]))

    def output(self, node: type, value: str | float, fps: float) -> io.NodeOutput:
        """All frames as IMAGE, `value`, and the frames as VIDEO, with the strips shown on the node."""
        preview = ui.PreviewImage(to_image(np.array(self.picture())[None]), cls=node)
        reel = Reel(self.parts)
        return io.NodeOutput(ReelImages(reel), value, ReelVideo(reel, fps), ui=preview)


def _part(kept: SegmentFolder, number: int, skip: int, frames: np.ndarray) -> Footage:
    return Footage(len(frames), *frames.shape[1:3], lambda: kept.frames(number, skip))


class LongVideo(LongCatNode):
    ID = "LongCatLongVideo"
    HIDDEN = RUNNING

    @classmethod
    def execute(
        cls, model, clip, vae, prompts, negative_prompt, segments, width, height, length, overlap, seed, steps,
        guidance, mode, hand_off, folder, kv_cache="exact", begin_with=None, fps=FPS,
        begin_fps=FPS, lossy_change=NEW_TAKE,
    ) -> io.NodeOutput:  # fmt: skip
        require_longcat(model, LONG)
        spread = long_video.spread_prompts(lines_of(prompts), segments or None)
        given = None
        if begin_with is not None:
            begun = footage_of("begin_with", begin_with)
            if begun.frames == 1:
                given = np.stack([*begun.read()])
            else:
                given = end_of_clip("begin_with", begin_with, begin_fps, fps, overlap)
        schedule, later_schedule = LONG_MODES[mode]
        first = GenerateRequest(
            spread[0], negative_prompt=negative_prompt, height=height, width=width, frames=length, steps=steps,
            guidance_scale=guidance, seed=seed, schedule=schedule, num_cond_frames=overlap, kv_cache=kv_cache, fps=fps,
            given=given,
        )  # fmt: skip
        engine = ComfyEngine(LONG, model, clip, vae, [*spread, negative_prompt])
        request = long_video.LongVideoRequest(first, spread, overlap, later_schedule, hand_off, engine.settings())
        request = request.filled(RELEASED)
        check_fits(cls.hidden, 0, request.total_frames, height, width)
        kept = long_video.segment_folder(output_folder(folder))
        gathered, report = Gathered(len(spread)), []
        for segment in long_video.long_video(lambda: engine, request, kept):
            report.append(segment.summary(folder))
            frames = kept.frames(segment.number, segment.skip)
            gathered.add(segment.number, _part(kept, segment.number, segment.skip, frames), frames)
        return gathered.output(cls, "\n".join(report), fps)


class RefineLongVideo(LongCatNode):
    ID = "LongCatRefineLongVideo"
    HIDDEN = RUNNING

    @classmethod
    def execute(
        cls, model, clip, vae, video, prompt, seed, steps, double_rate, resolution, width, height, piece, overlap,
        folder, fps=FPS, lossy_change=NEW_TAKE,
    ) -> io.NodeOutput:  # fmt: skip
        require_longcat(model, REFINE_LONG)
        given = footage_of("video", video)
        fps = given.fps or fps
        height, width = refined_size((given.height, given.width), resolution, width, height)
        request = refine.RefineRequest(prompt, seed, double_rate, height, width, steps, piece, overlap, fps)
        request.check()
        engine = ComfyEngine(REFINE_LONG, model, clip, vae, [prompt])
        kept = refine.piece_folder(output_folder(folder))
        settings, factor = engine.settings(), request.factor
        check_fits(cls.hidden, 0, factor * given.frames, height, width)
        gathered = Gathered(len(request.pieces(given)))
        for number, skip, _ in refine.refine_in_folder(lambda: engine, RELEASED, given, request, kept, settings):
            frames = kept.frames(number, skip)
            gathered.add(number, _part(kept, number, skip, frames), frames)
        return gathered.output(cls, factor * fps, factor * fps)


NODES = [LongVideo, RefineLongVideo]
