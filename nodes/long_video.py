"""LongCat Long Video and LongCat Refine Long Video: minutes of video, saved piece by piece."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
from comfy_api.latest import io, ui
from PIL import Image

from ..longcat_core.files.media import Sound
from ..longcat_core.files.regular import lines_of
from ..longcat_core.generate import long_video, refine
from ..longcat_core.generate.footage import Footage
from ..longcat_core.generate.options import FPS, LOSSY_CHANGES
from ..longcat_core.generate.progress import sampled, segments_of
from ..longcat_core.generate.request import RELEASED, GenerateRequest
from ..longcat_core.generate.segment_folder import SegmentFolder
from ..longcat_core.generate.speeds import EXACT
from ..longcat_core.sampling.conditioning import TEMPORAL_FACTOR, latent_frames, latent_shape
from .checks import check_ranges, check_size
from .engine import ComfyEngine
from .folders import FolderNode, check_folder, output_folder, written_out
from .images import to_image
from .models import distilled_notes, require_soundless, until_notes
from .progress import NodeProgress
from .refine import refined_size
from .sampling import latent_tokens
from .speed import with_speed
from .video import Reel, ReelImages, ReelVideo, check_fits, end_of_clip, footage_of, sound_in
from .widgets import CUSTOM, LONG_MODES

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

    def __init__(self, shown: NodeProgress, fps: float, total: int | None = None, sound: Sound | None = None) -> None:
        """total: frames of the video, if it ends before its last segment. sound: of the video."""
        self.shown, self.fps, self.total, self.sound = shown, fps, total, sound
        self.parts: list[Footage] = []
        self.files: list[Path] = []
        self.strips: list[Image.Image] = []

    def add(self, kept: SegmentFolder, number: int, skip: int, reused: bool) -> None:
        """Append the frames of segment `number` without the first `skip`. reused: it was there already."""
        self.shown.task.finish(reused=reused)
        self.parts.append(kept.footage([(number, skip)], self.fps))
        self.files.append(kept.file(number))
        self.strips = [*self.strips[1 - STRIPS :], make_strip(kept.frames(number, skip))]
        self.shown.show(("JPEG", self.picture(), None))

    def picture(self) -> Image.Image:
        """The strips of the last segments, one below the other."""
        return Image.fromarray(np.concatenate([np.asarray(strip) for strip in self.strips]))

    def output(self, node: type, value: str | float) -> io.NodeOutput:
        """All frames as IMAGE, `value`, and the frames as VIDEO, with the strips shown on the node."""
        preview = ui.PreviewImage(to_image(np.array(self.picture())[None]), cls=node)
        reel = Reel(self.parts, 0, self.total)
        return io.NodeOutput(ReelImages(reel), value, ReelVideo(reel, self.fps, self.sound), ui=preview)


def say(sentence: str) -> None:
    """Print what a folder says about its takes."""
    logging.info("LongCat: %s", sentence)


class LongVideo(FolderNode):
    ID = "LongCatLongVideo"

    @classmethod
    def validate_inputs(
        cls, prompts=None, negative_prompt=None, segments=None, width=None, height=None, length=None, overlap=None,
        seed=None, steps=None, guidance=None, mode=None, folder=None, fps=None,
    ) -> bool:  # fmt: skip
        # What is connected is not known yet; its place is taken by something that fits.
        overlap = 1 if overlap is None else overlap
        known = {
            "prompts": "x" if prompts is None else prompts,
            "negative_prompt": negative_prompt or "",
            "segments": segments or 0,
            "width": 64 if width is None else width,
            "height": 64 if height is None else height,
            "length": overlap + TEMPORAL_FACTOR if length is None else length,
            "overlap": overlap,
            "seed": seed or 0,
            "steps": 1 if steps is None else steps,
            "guidance": 1.0 if guidance is None else guidance,
            "mode": "base" if mode is None else mode,
            "fps": FPS if fps is None else fps,
        }
        check_ranges(cls.ID, {name: known[name] for name in ("segments", "mode")})
        request = request_of(**known)
        first = request.first
        check_folder(folder, 2 * first.frames * first.height * first.width, long_video.segment_folder)
        return True

    @classmethod
    def execute(
        cls, model, clip, vae, prompts, negative_prompt, segments, width, height, length, overlap, seed, steps,
        guidance, mode, hand_off, folder, kv_cache="exact", begin_with=None, fps=FPS,
        begin_fps=FPS, lossy_change=LOSSY_CHANGES[0], guidance_until=1.0, speed=EXACT,
    ) -> io.NodeOutput:  # fmt: skip
        require_soundless(model, LONG)
        given = None
        if begin_with is not None:
            begun = footage_of("begin_with", begin_with)
            if begun.frames == 1:
                given = np.stack([*begun.read()])
            else:
                given = end_of_clip("begin_with", begin_with, begin_fps, fps, overlap)
        request = request_of(
            prompts, negative_prompt, segments, width, height, length, overlap, seed, steps, guidance, mode, fps,
            hand_off, kv_cache, given, guidance_until,
        )  # fmt: skip
        first = request.first
        shape = latent_shape(first.frames, height, width)
        notes = [*distilled_notes(model, mode, guidance), *until_notes(guidance, guidance_until)]
        model, until, found = with_speed(
            model, speed, mode=first.schedule, guidance=guidance, guidance_until=guidance_until,
            tokens=latent_tokens((1, *shape), latent_frames(first.cond_frames) if first.cond_frames else 0),
        )  # fmt: skip
        request = replace(request, first=replace(first, guidance_until=until))
        check_fits(cls.hidden, 0, request.total_frames, height, width)
        folder = written_out(folder, cls.hidden, width, height)
        kept = long_video.segment_folder(output_folder(folder), lossy_change, say)
        engine = ComfyEngine(LONG, model, clip, vae, [*request.prompts, negative_prompt])
        request = replace(request, model=engine.settings(), lossy=engine.lossy())
        notes, report = [*notes, *found], []
        for note in notes:
            logging.warning("LongCat: %s", note)
        with NodeProgress(segments_of(request), what="segment") as shown:
            gathered = Gathered(shown, fps)
            for segment in long_video.long_video(lambda: engine, request, kept):
                report.append(segment.summary(folder))
                gathered.add(kept, segment.number, segment.skip, segment.reused)
        cls.remember(gathered.files)
        return gathered.output(cls, "\n".join([*notes, *filter(None, [kept.said]), *report]))


def request_of(
    prompts: str, negative_prompt: str, segments: int, width: int, height: int, length: int, overlap: int, seed: int,
    steps: int, guidance: float, mode: str, fps: float, hand_off: str = "frames", kv_cache: str = "exact",
    given: np.ndarray | None = None, guidance_until: float = 1.0,
) -> long_video.LongVideoRequest:  # fmt: skip
    """The filled request of LongCat Long Video. Raises LongCatError for values that do not fit."""
    spread = long_video.spread_prompts(lines_of(prompts), segments or None)
    schedule, later_schedule = LONG_MODES[mode]
    first = GenerateRequest(
        spread[0], negative_prompt=negative_prompt, height=height, width=width, frames=length, steps=steps,
        guidance_scale=guidance, seed=seed, schedule=schedule, num_cond_frames=overlap, kv_cache=kv_cache, fps=fps,
        given=given, guidance_until=guidance_until,
    )  # fmt: skip
    return long_video.LongVideoRequest(first, spread, overlap, later_schedule, hand_off).filled(RELEASED)


class RefineLongVideo(FolderNode):
    ID = "LongCatRefineLongVideo"

    @classmethod
    def validate_inputs(
        cls, prompt=None, seed=None, steps=None, double_rate=None, resolution=None, width=None, height=None,
        piece=None, overlap=None, folder=None, fps=None,
    ) -> bool:  # fmt: skip
        check_ranges(cls.ID, {"resolution": resolution})
        check_size(width, height, resolution)
        overlap = 1 if overlap is None else overlap
        piece = overlap + 1 if piece is None else piece
        refine.RefineRequest(
            prompt or "", seed or 0, overlap=overlap, piece=piece, steps=50 if steps is None else steps,
            fps=FPS if fps is None else fps,
        ).check()  # fmt: skip
        frames = piece if double_rate is False else 2 * piece
        size = (width or 0) * (height or 0) if resolution == CUSTOM else 0
        check_folder(folder, 2 * frames * size, refine.piece_folder)
        return True

    @classmethod
    def execute(
        cls, model, clip, vae, video, prompt, seed, steps, double_rate, resolution, width, height, piece, overlap,
        folder, fps=FPS, lossy_change=LOSSY_CHANGES[0],
    ) -> io.NodeOutput:  # fmt: skip
        require_soundless(model, REFINE_LONG)
        given = footage_of("video", video)
        fps = given.fps or fps
        height, width = refined_size((given.height, given.width), resolution, width, height)
        request = refine.RefineRequest(prompt, seed, double_rate, height, width, steps, piece, overlap, fps)
        request.check()
        factor = request.factor
        check_fits(cls.hidden, 0, factor * given.frames, height, width)
        kept = refine.piece_folder(output_folder(written_out(folder, cls.hidden, width, height)), lossy_change, say)
        engine = ComfyEngine(REFINE_LONG, model, clip, vae, [prompt])
        pieces = [sampled("refine", steps)] * len(request.pieces(given))
        with NodeProgress(pieces, what="piece") as shown:
            gathered = Gathered(shown, factor * fps, sound=sound_in(video, given.frames / fps))
            done = refine.refine_in_folder(
                lambda: engine, RELEASED, given, request, kept, engine.settings(), lossy=engine.lossy()
            )
            for number, skip, reused in done:
                gathered.add(kept, number, skip, reused)
        cls.remember(gathered.files)
        return gathered.output(cls, factor * fps)


NODES = [LongVideo, RefineLongVideo]
