"""LongCat Refine: a finished video as the latent that the second stage starts from."""

from __future__ import annotations

import logging

import comfy.model_management
from comfy_api.latest import io

from ..longcat_core.errors import LongCatError
from ..longcat_core.generate.progress import ENCODING
from ..longcat_core.generate.refine import Padding, enlarge, size_note, target_size
from ..longcat_core.generate.request import check_side
from .checks import check_ranges, check_size
from .conditioning import put_clean, require_wan_vae
from .engine import encode_video
from .images import check_images, to_bytes
from .inputs import LongCatNode
from .progress import working
from .widgets import CUSTOM, TWICE


def refined_size(given: tuple[int, int], resolution: str, width: int, height: int) -> tuple[int, int]:
    """(height, width) in pixels that a video of `given` (height, width) is refined to.

    Raises LongCatError for sides out of range.
    """
    if resolution != CUSTOM:
        height, width = target_size(*given, resolution == "720p")
    check_side("width", width)
    check_side("height", height)
    if said := size_note(given, (height, width), resolution != TWICE):
        logging.warning("LongCat: %s", said)
    return height, width


class Refine(LongCatNode):
    ID = "LongCatRefine"

    @classmethod
    def validate_inputs(cls, resolution=None, width=None, height=None) -> bool:
        check_ranges(cls.ID, {"resolution": resolution})
        check_size(width, height, resolution)
        return True

    @classmethod
    def execute(
        cls, vae, video, double_rate, resolution, width, height, fps, refined_before=None, overlap=13
    ) -> io.NodeOutput:
        require_wan_vae(vae)
        check_images("video", video)
        height, width = refined_size(tuple(video.shape[1:3]), resolution, width, height)
        factor = 2 if double_rate else 1
        count, known = factor * len(video), 0
        if refined_before is not None:
            check_images("refined_before", refined_before)
            known = factor * overlap
            if not known < count or len(refined_before) < known or refined_before.shape[1:3] != (height, width):
                raise LongCatError(
                    f"refined_before is {len(refined_before)} frames of {refined_before.shape[1]}x"
                    f"{refined_before.shape[2]} (height x width) but must be at least {known} of {height}x{width}, "
                    f"and fewer than the {count} of this piece; connect the refined frames of the previous piece, or "
                    "set overlap to the number of frames that both have"
                )
        padding = Padding.of(count, known)
        with working(ENCODING):
            samples = encode_video(vae, padding.pad(enlarge(to_bytes(video), height, width, count)))
            latent = {"samples": samples.to(comfy.model_management.intermediate_device())}
            if known:
                pixels = enlarge(to_bytes(refined_before[-known:]), height, width, known)
                latent["noise_mask"] = put_clean(latent["samples"], encode_video(vae, padding.known.pad(pixels)))
        return io.NodeOutput(latent, padding.front + known, count - known, fps * factor)


NODES = [Refine]
