"""LongCat Refine: a finished video as the latent that the second stage starts from."""

from __future__ import annotations

from typing import Any

import comfy.model_management
from comfy_api.latest import io
from torch import Tensor

from ..longcat_core.errors import LongCatError
from ..longcat_core.generate.refine import Padding, enlarge, target_size
from ..longcat_core.generate.request import check_side
from .conditioning import CUSTOM, _check_images, fps_input, put_given, require_wan_vae, resolution_inputs, to_bytes
from .engine import encode_video
from .loaders import CATEGORY

TWICE = "twice the size"


def refined_size_inputs() -> list[Any]:
    return resolution_inputs(
        ["720p", TWICE],
        "720p: the size LongCat-Video refines to that comes nearest in shape. twice the size: for the test model.",
        1280,
        704,
    )


def refined_size(video: Tensor, resolution: str, width: int, height: int) -> tuple[int, int]:
    """(height, width) in pixels that `video`, an IMAGE, is refined to. Raises LongCatError for sides that cannot be."""
    if resolution != CUSTOM:
        height, width = target_size(*video.shape[1:3], resolution == "720p")
    check_side("width", width)
    check_side("height", height)
    return height, width


class Refine(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LongCatRefine",
            display_name="LongCat Refine",
            category=CATEGORY,
            description="A finished video, enlarged and doubled in frame rate, as the latent for LongCat Sampler in "
            "mode refine, with the refinement LoRA on the model.",
            inputs=[
                io.Vae.Input("vae", tooltip="The Wan 2.1 VAE."),
                io.Image.Input(
                    "video", tooltip="The video's frames: of VAE Decode, or Get Video Components. At most 93 at a time."
                ),
                io.Boolean.Input(
                    "double_rate",
                    default=True,
                    tooltip="Twice as many frames as well, for twice the frame rate; off: a larger picture only.",
                ),
                *refined_size_inputs(),
                fps_input("Frame rate of the video that comes in; only the output fps is made from it."),
                io.Image.Input(
                    "refined_before",
                    optional=True,
                    tooltip="For a long video piece by piece: the refined frames of the piece before; their last ones "
                    "stand for the first ones of this piece.",
                ),
                io.Int.Input(
                    "overlap",
                    default=13,
                    min=1,
                    max=92,
                    optional=True,
                    tooltip="With refined_before: how many of this piece's first frames were in the piece before.",
                ),
            ],
            outputs=[
                io.Latent.Output(tooltip="For LongCat Sampler in mode refine, guidance 1."),
                io.Int.Output(display_name="skip", tooltip="Frames to leave out at the front of the decoded video."),
                io.Int.Output(display_name="length", tooltip="New frames after those; what follows is padding."),
                io.Float.Output(display_name="fps", tooltip="Frame rate of the refined video."),
            ],
        )

    @classmethod
    def execute(
        cls, vae, video, double_rate, resolution, width, height, fps, refined_before=None, overlap=13
    ) -> io.NodeOutput:
        require_wan_vae(vae)
        _check_images("video", video)
        height, width = refined_size(video, resolution, width, height)
        factor = 2 if double_rate else 1
        count, given = factor * len(video), 0
        if refined_before is not None:
            _check_images("refined_before", refined_before)
            given = factor * overlap
            if not given < count or len(refined_before) < given or refined_before.shape[1:3] != (height, width):
                raise LongCatError(
                    f"refined_before is {len(refined_before)} frames of {refined_before.shape[1]}x"
                    f"{refined_before.shape[2]} (height x width), wanted are at least {given} of {height}x{width}, and "
                    f"fewer than the {count} of this piece; connect the refined frames of the piece before, or set "
                    "overlap to the frames that both have"
                )
        padding = Padding.of(count, given)
        samples = encode_video(vae, padding.pad(enlarge(to_bytes(video), height, width, count)))
        samples = samples.to(comfy.model_management.intermediate_device())
        latent = {"samples": samples}
        if given:
            known = enlarge(to_bytes(refined_before[-given:]), height, width, given)
            known = encode_video(vae, padding.known.pad(known))
            latent["noise_mask"] = put_given(samples, known)
        return io.NodeOutput(latent, padding.front + given, count - given, fps * factor)


NODES = [Refine]
