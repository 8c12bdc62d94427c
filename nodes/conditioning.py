"""LongCat Image to Video and LongCat Video Continuation: conditioning frames as a LATENT with a noise mask."""

from __future__ import annotations

import comfy.ldm.wan.vae
import comfy.model_management
import comfy.sd
import numpy as np
import torch
from comfy_api.latest import io
from torch import Tensor

from ..longcat_core.errors import LongCatError
from ..longcat_core.files.media import resize_and_crop
from ..longcat_core.generate.options import FPS
from ..longcat_core.generate.progress import ENCODING
from ..longcat_core.sampling.buckets import nearest_bucket
from ..longcat_core.sampling.conditioning import latent_frames, latent_shape
from .checks import check_length, check_ranges, check_size
from .comfy_vae import encoded
from .images import one_image, to_image
from .inputs import LongCatNode
from .progress import working
from .video import end_of_clip
from .widgets import CUSTOM


def require_wan_vae(vae: comfy.sd.VAE) -> None:
    """Raise LongCatError unless `vae` is the Wan 2.1 VAE, whose latents the model takes."""
    if not isinstance(vae.first_stage_model, comfy.ldm.wan.vae.WanVAE):
        raise LongCatError(
            f"the VAE is of class {type(vae.first_stage_model).__name__}; connect the Wan 2.1 VAE (Load VAE: "
            "wan_2.1_vae, or longcat_nano_vae for LongCat-nano)"
        )


def put_clean(samples: Tensor, clean: Tensor) -> Tensor:
    """Put conditioning latents [1 or B, C, n, h, w] at the front of samples [B, C, T, h, w], in place.

    Returns the noise_mask [1, 1, T, h, w] that keeps them.
    """
    count = clean.shape[2]
    samples[:, :, :count] = clean.to(samples)
    mask = torch.ones((1, 1, *samples.shape[2:]), device=samples.device)
    mask[:, :, :count] = 0
    return mask


def conditioned_latent(
    vae: comfy.sd.VAE, frames: np.ndarray, resolution: str, width: int, height: int, length: int, batch_size: int
) -> dict[str, Tensor]:
    """An empty video latent that begins with uint8 frames [F, H, W, 3], which its noise_mask keeps.

    Raises LongCatError for a length or a size that is out of range.
    """
    require_wan_vae(vae)
    check_length(length, len(frames))
    if resolution != CUSTOM:
        height, width = nearest_bucket(*frames.shape[1:3], resolution)
    check_size(width, height)
    with working(ENCODING):
        clean = encoded(vae, to_image(resize_and_crop(frames, height, width)))
    shape = latent_shape(length, height, width)
    samples = torch.zeros((batch_size, *shape), device=comfy.model_management.intermediate_device())
    return {"samples": samples, "noise_mask": put_clean(samples, clean)}


class ImageToVideo(LongCatNode):
    ID = "LongCatImageToVideo"

    @classmethod
    def validate_inputs(cls, resolution=None, width=None, height=None, length=None) -> bool:
        check_ranges(cls.ID, {"resolution": resolution})
        check_size(width, height, resolution)
        check_length(length, 1)
        return True

    @classmethod
    def execute(cls, vae, image, resolution, width, height, length, batch_size=1) -> io.NodeOutput:
        start = one_image(image, ", or connect the frames of a clip to LongCat Video Continuation")
        return io.NodeOutput(conditioned_latent(vae, start, resolution, width, height, length, batch_size))


class VideoContinuation(LongCatNode):
    ID = "LongCatVideoContinuation"

    @classmethod
    def validate_inputs(cls, cond_frames=None, resolution=None, width=None, height=None, length=None) -> bool:
        check_ranges(cls.ID, {"resolution": resolution, "cond_frames": cond_frames})
        check_size(width, height, resolution)
        check_length(length, cond_frames)
        return True

    @classmethod
    def execute(
        cls, vae, video, cond_frames, resolution, width, height, length, batch_size=1, fps=FPS
    ) -> io.NodeOutput:
        latent_frames(cond_frames, "cond_frames")
        frames = end_of_clip("video", video, fps, FPS, cond_frames)
        return io.NodeOutput(conditioned_latent(vae, frames, resolution, width, height, length, batch_size))


NODES = [ImageToVideo, VideoContinuation]
