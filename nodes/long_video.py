"""LongCat Long Video and LongCat Refine Long Video: minutes of video, kept on disk piece by piece."""

from __future__ import annotations

from typing import Any

import comfy.utils
import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image

from ..longcat_core.generate import long_video, refine
from ..longcat_core.generate.request import (
    MAX_FRAMES,
    MAX_SEED,
    MAX_SIDE,
    MAX_STEPS,
    RELEASED,
    SIDE_MULTIPLE,
    GenerateRequest,
)
from ..longcat_core.model.kv_cache import KV_MODES
from ..longcat_core.sampling.conditioning import TEMPORAL_FACTOR
from ..longcat_core.sampling.guidance import DEFAULT_NEGATIVE_PROMPT
from .conditioning import _check_images, fps_input, to_bytes, to_image
from .engine import ComfyEngine, output_folder
from .loaders import CATEGORY
from .refine import refined_size, refined_size_inputs
from .sampling import KV_CACHE_TOOLTIP, _require_longcat, guidance_input

LONG, REFINE_LONG = "LongCat Long Video", "LongCat Refine Long Video"
CONTINUATION = "base, then enhance_hf"
# Name of a mode -> schedules of the first segment and of the others.
LONG_MODES = {CONTINUATION: ("base", "enhance_hf"), "base": ("base", "base"), "distilled": ("distilled", "distilled")}
# Of a segment's picture: frames side by side, and its width in pixels. Segments that are shown at once.
STRIP, STRIP_WIDTH, STRIPS = 5, 1280, 8


def _seed_input() -> io.Input:
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=MAX_SEED,
        # Another seed at every run would never go on from what is there.
        control_after_generate=False,
        tooltip="Of the first piece; the others count on from it. With another seed, name another folder.",
    )


def _folder_input(default: str) -> io.Input:
    return io.String.Input(
        "folder",
        default=default,
        tooltip="In ComfyUI's output folder. Keeps every finished piece; the same workflow queued again, also after a "
        "crash, goes on from them.",
    )


def _strip(frames: np.ndarray) -> Image.Image:
    """Some frames of a segment side by side, as many for every segment."""
    picked = frames[np.linspace(0, len(frames) - 1, STRIP).round().astype(int)]
    image = Image.fromarray(np.concatenate(list(picked), axis=1))
    height = max(1, round(image.height * STRIP_WIDTH / image.width))
    return image.resize((STRIP_WIDTH, height), Image.Resampling.LANCZOS)


class _Gathered:
    """The frames of all segments as an IMAGE, each read once, and a picture of those that are finished on the way."""

    def __init__(self, segments: int, frames: int, height: int, width: int) -> None:
        self.bar = comfy.utils.ProgressBar(segments)
        self.images = torch.empty((frames, height, width, 3))
        self.count = 0
        self.strips: list[Image.Image] = []

    def add(self, number: int, frames: np.ndarray) -> None:
        self.images[self.count : self.count + len(frames)] = to_image(frames)
        self.count += len(frames)
        self.strips = [*self.strips[1 - STRIPS :], _strip(frames)]
        self.bar.update_absolute(number + 1, preview=("JPEG", self.picture(), None))

    def picture(self) -> Image.Image:
        """The last segments' strips below each other."""
        return Image.fromarray(np.concatenate([np.asarray(strip) for strip in self.strips]))

    def output(self, node: Any, value: Any) -> io.NodeOutput:
        shown = ui.PreviewImage(to_image(np.array(self.picture())[None]), cls=node)
        return io.NodeOutput(self.images, value, ui=shown)


class LongVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LongCatLongVideo",
            display_name=LONG,
            category=CATEGORY,
            description="Long video in segments, each begun with the end of the one before; with a prompt a segment, "
            "interactive video. Every finished segment is on disk, and a run that was cut off goes on from there.",
            inputs=[
                io.Model.Input("model", tooltip="LongCat-Video."),
                io.Clip.Input("clip", tooltip="UMT5, from LongCat Text Encoder Loader or Load CLIP of type wan."),
                io.Vae.Input("vae", tooltip="The Wan 2.1 VAE."),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    tooltip="One prompt a line, one line a segment; the last line serves all segments beyond it. "
                    "Another line later on makes that segment and those after it anew.",
                ),
                io.String.Input(
                    "negative_prompt",
                    multiline=True,
                    default=DEFAULT_NEGATIVE_PROMPT,
                    tooltip="What the video should not be; not used at guidance 1.",
                ),
                io.Int.Input(
                    "segments",
                    default=3,
                    min=0,
                    max=long_video.MAX_SEGMENTS,
                    tooltip="How many; 0: as many as there are prompts. 93 frames are 6.2 s, each further segment adds "
                    "5.3 s.",
                ),
                *(
                    io.Int.Input(
                        name,
                        default=default,
                        min=SIDE_MULTIPLE,
                        max=MAX_SIDE,
                        step=SIDE_MULTIPLE,
                        tooltip=f"Pixels, a multiple of {SIDE_MULTIPLE} (the test model: {nano}).",
                    )
                    for name, default, nano in (("width", 832, 96), ("height", 480, 64))
                ),
                io.Int.Input(
                    "length",
                    default=93,
                    min=1 + TEMPORAL_FACTOR,
                    max=MAX_FRAMES,
                    step=TEMPORAL_FACTOR,
                    tooltip="Frames of a segment: 4k+1. LongCat-Video: 93; the test model: 33.",
                ),
                io.Int.Input(
                    "overlap",
                    default=13,
                    min=1,
                    max=MAX_FRAMES - TEMPORAL_FACTOR,
                    step=TEMPORAL_FACTOR,
                    tooltip="How many of a segment's last frames the next one begins with: 4k+1; LongCat-Video was "
                    "trained with 13.",
                ),
                _seed_input(),
                io.Int.Input("steps", default=50, min=1, max=MAX_STEPS, tooltip="50, or 16 for distilled."),
                guidance_input("CFG-zero scale. 1 is without guidance, twice as fast: for distilled."),
                io.Combo.Input(
                    "mode",
                    options=list(LONG_MODES),
                    default=CONTINUATION,
                    tooltip="Schedule of the first segment and of the others. distilled: 16 steps, guidance 1, with "
                    "the cfg_step LoRA. base: for the test model.",
                ),
                io.Combo.Input(
                    "hand_off",
                    options=list(long_video.HAND_OFFS),
                    default=long_video.HAND_OFFS[0],
                    tooltip="What the next segment begins with. frames: decoded and encoded anew, as LongCat-Video's "
                    "own pipeline does. latents: as they are, which spares a loss at every join.",
                ),
                _folder_input("longcat/long-video"),
                io.Combo.Input(
                    "kv_cache", options=list(KV_MODES), default="exact", optional=True, tooltip=KV_CACHE_TOOLTIP
                ),
                io.Image.Input(
                    "begin_with",
                    optional=True,
                    tooltip="One image: the first frame. A clip: its last frames, as many as overlap says, are "
                    "continued; it is fitted to width and height.",
                ),
                fps_input("Of the files in the folder; it changes nothing else.", optional=True),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="All frames; those in common are there once."),
                io.String.Output(display_name="report", tooltip="The segments, and how colour changes at the joins."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        prompts,
        negative_prompt,
        segments,
        width,
        height,
        length,
        overlap,
        seed,
        steps,
        guidance,
        mode,
        hand_off,
        folder,
        kv_cache="exact",
        begin_with=None,
        fps=15.0,
    ) -> io.NodeOutput:
        _require_longcat(model, LONG)
        lines = [line.strip() for line in prompts.splitlines() if line.strip()]
        spread = long_video.spread_prompts(lines, segments or None)
        given = None
        if begin_with is not None:
            _check_images("begin_with", begin_with)
            given = to_bytes(begin_with)
        schedule, later = LONG_MODES[mode]
        first = GenerateRequest(
            spread[0],
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            frames=length,
            steps=steps,
            guidance_scale=guidance,
            seed=seed,
            schedule=schedule,
            num_cond_frames=overlap,
            kv_cache=kv_cache,
            fps=fps,
            given=given,
        )
        engine = ComfyEngine(LONG, model, clip, vae, [*spread, negative_prompt])
        request = long_video.LongVideoRequest(first, spread, overlap, later, hand_off, engine.settings())
        request = request.filled(RELEASED)
        kept = long_video.segment_folder(output_folder(folder))
        gathered, told = _Gathered(len(spread), request.total_frames, height, width), []
        for segment in long_video.long_video(lambda: engine, request, kept):
            told.append(segment.told(folder))
            gathered.add(segment.number, kept.frames(segment.number, segment.skip))
        return gathered.output(cls, "\n".join(told))


class RefineLongVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LongCatRefineLongVideo",
            display_name=REFINE_LONG,
            category=CATEGORY,
            description="LongCat Refine, LongCat Sampler and VAE Decode for a video of any length: piece by piece, "
            "each given the refined end of the one before, every finished piece on disk.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="LongCat-Video with the refinement LoRA, and LongCat Block-Sparse Attention for its speed.",
                ),
                io.Clip.Input("clip", tooltip="UMT5, from LongCat Text Encoder Loader or Load CLIP of type wan."),
                io.Vae.Input("vae", tooltip="The Wan 2.1 VAE."),
                io.Image.Input("video", tooltip="All frames, for instance of LongCat Long Video."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="",
                    tooltip="The video's own, or nothing: so LongCat-Video refines long videos.",
                ),
                _seed_input(),
                io.Int.Input(
                    "steps",
                    default=50,
                    min=1,
                    max=MAX_STEPS,
                    tooltip="Of the base schedule, of which 50 leaves 5 to run.",
                ),
                io.Boolean.Input(
                    "double_rate",
                    default=True,
                    tooltip="Twice as many frames as well, for twice the frame rate; off: a larger picture only.",
                ),
                *refined_size_inputs(),
                io.Int.Input(
                    "piece", default=93, min=2, max=MAX_FRAMES, tooltip="Frames of the given video in one go."
                ),
                io.Int.Input(
                    "overlap", default=13, min=1, max=MAX_FRAMES - 1, tooltip="How many of them two pieces share."
                ),
                _folder_input("longcat/refined"),
                fps_input("Frame rate of the video that comes in; only the output fps is made from it.", optional=True),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="All refined frames."),
                io.Float.Output(display_name="fps", tooltip="Frame rate of the refined video."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        video,
        prompt,
        seed,
        steps,
        double_rate,
        resolution,
        width,
        height,
        piece,
        overlap,
        folder,
        fps=15.0,
    ) -> io.NodeOutput:
        _require_longcat(model, REFINE_LONG)
        _check_images("video", video)
        height, width = refined_size(video, resolution, width, height)
        request = refine.RefineRequest(prompt, seed, double_rate, height, width, steps, piece, overlap, fps)
        engine = ComfyEngine(REFINE_LONG, model, clip, vae, [prompt])
        kept = refine.piece_folder(output_folder(folder))
        frames = to_bytes(video)
        request.check()
        factor = 2 if double_rate else 1
        count = len(refine.pieces(len(frames), piece, overlap))
        gathered = _Gathered(count, factor * len(frames), height, width)
        for number, skip, _ in refine.refine_in_folder(
            lambda: engine, RELEASED, frames, request, kept, engine.settings()
        ):
            gathered.add(number, kept.frames(number, skip))
        return gathered.output(cls, factor * fps)


NODES = [LongVideo, RefineLongVideo]
