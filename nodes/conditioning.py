"""LongCat Image to Video and LongCat Video Continuation: given frames as a conditioned LATENT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.ldm.wan.vae
import comfy.model_management
import comfy.sd
import numpy as np
import torch
from comfy_api.latest import io
from torch import Tensor

from ..longcat_core.errors import LongCatError
from ..longcat_core.files.media import resize_and_crop
from ..longcat_core.generate.request import MAX_FPS, MAX_FRAMES, MAX_SIDE, SIDE_MULTIPLE, check_frames, check_side
from ..longcat_core.sampling.buckets import BUCKETS, nearest_bucket
from ..longcat_core.sampling.conditioning import TEMPORAL_FACTOR, last_frames, latent_frames, latent_shape
from .loaders import CATEGORY

CUSTOM = "custom"


def resolution_inputs(
    options: Sequence[str], tooltip: str, width: int, height: int, nano: Sequence[int] = ()
) -> list[Any]:
    """The inputs resolution, width and height. The first option is the default; `custom` is added. nano: the width and
    height that suit the test model."""
    sides = {"width": width, "height": height}
    told = {name: f" (the test model: {side})" for name, side in zip(sides, nano, strict=False)}
    return [
        io.Combo.Input(
            "resolution",
            options=[*options, CUSTOM],
            default=options[0],
            tooltip=f"{tooltip} custom: width and height below.",
        ),
        *(
            io.Int.Input(
                name,
                default=default,
                min=SIDE_MULTIPLE,
                max=MAX_SIDE,
                step=SIDE_MULTIPLE,
                tooltip=f"Pixels, a multiple of {SIDE_MULTIPLE}; only for resolution custom{told.get(name, '')}.",
            )
            for name, default in sides.items()
        ),
    ]


def fps_input(tooltip: str, optional: bool = False) -> io.Input:
    return io.Float.Input(
        "fps", default=15.0, min=1.0, max=MAX_FPS, step=0.5, round=0.01, optional=optional, tooltip=tooltip
    )


def _size_inputs() -> list[Any]:
    return [
        *resolution_inputs(
            list(BUCKETS),
            "480p or 720p: the size LongCat-Video was trained at that comes nearest in shape; what overhangs is cut "
            "off evenly.",
            832,
            480,
            (96, 64),
        ),
        io.Int.Input(
            "length",
            default=93,
            min=1 + TEMPORAL_FACTOR,
            max=MAX_FRAMES,
            step=TEMPORAL_FACTOR,
            tooltip="Frames of the whole video, given ones included: 4k+1. LongCat-Video: 93; the test model: 33.",
        ),
        io.Int.Input(
            "batch_size", default=1, min=1, max=64, optional=True, tooltip="Videos at once, each from its own noise."
        ),
    ]


def require_wan_vae(vae: comfy.sd.VAE) -> None:
    """Raises LongCatError for a VAE that makes other latents."""
    if not isinstance(vae.first_stage_model, comfy.ldm.wan.vae.WanVAE):
        raise LongCatError(
            f"the VAE is of class {type(vae.first_stage_model).__name__}; connect the Wan 2.1 VAE (Load VAE: "
            "wan_2.1_vae, or longcat_nano_vae for the test model)"
        )


def to_bytes(images: Tensor) -> np.ndarray:
    """IMAGE [F, H, W, C] in 0..1 -> uint8 [F, H, W, 3]."""
    return images[..., :3].mul(255).round().clamp(0, 255).to("cpu", torch.uint8).numpy()


def to_image(frames: np.ndarray) -> Tensor:
    """uint8 [F, H, W, 3] -> IMAGE, fp32 in 0..1."""
    return torch.from_numpy(np.ascontiguousarray(frames)).float() / 255


def put_given(samples: Tensor, given: Tensor) -> Tensor:
    """Put latents [1 or B, C, n, h, w] at the front of samples [B, C, T, h, w]; the noise_mask that marks them."""
    count = given.shape[2]
    samples[:, :, :count] = given.to(samples)
    mask = torch.ones((1, 1, *samples.shape[2:]), device=samples.device)
    mask[:, :, :count] = 0
    return mask


def conditioned_latent(
    vae: comfy.sd.VAE, frames: Tensor, resolution: str, width: int, height: int, length: int, batch_size: int
) -> dict[str, Tensor]:
    """frames [F, H, W, 3] in 0..1 at the front of an empty video latent, marked as given in its noise_mask."""
    require_wan_vae(vae)
    check_frames(length, "length")
    if length <= len(frames):
        raise LongCatError(
            f"length {length} leaves nothing to generate after {len(frames)} given frames; "
            f"ask for at least {len(frames) + TEMPORAL_FACTOR}"
        )
    if resolution != CUSTOM:
        height, width = nearest_bucket(*frames.shape[1:3], resolution)
    check_side("width", width)
    check_side("height", height)
    given = vae.encode(to_image(resize_and_crop(to_bytes(frames), height, width)))
    shape = latent_shape(length, height, width)
    samples = torch.zeros((batch_size, *shape), device=comfy.model_management.intermediate_device())
    return {"samples": samples, "noise_mask": put_given(samples, given)}


def _check_images(name: str, images: Tensor) -> None:
    if images.ndim != 4 or images.shape[-1] < 3 or not len(images):
        raise LongCatError(f"{name} is {list(images.shape)}; connect an IMAGE of three colours [frames, H, W, 3]")


class ImageToVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LongCatImageToVideo",
            display_name="LongCat Image to Video",
            category=CATEGORY,
            description="A latent whose first frame is the image, for LongCat Sampler and for stock samplers.",
            inputs=[
                io.Vae.Input("vae", tooltip="The Wan 2.1 VAE."),
                io.Image.Input("image", tooltip="The first frame. Of several images the first is taken."),
                *_size_inputs(),
            ],
            outputs=[io.Latent.Output(tooltip="With a noise_mask that marks the given frame.")],
        )

    @classmethod
    def execute(cls, vae, image, resolution, width, height, length, batch_size=1) -> io.NodeOutput:
        _check_images("image", image)
        return io.NodeOutput(conditioned_latent(vae, image[:1], resolution, width, height, length, batch_size))


class VideoContinuation(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LongCatVideoContinuation",
            display_name="LongCat Video Continuation",
            category=CATEGORY,
            description="A latent that begins with the last frames of a clip, for LongCat Sampler (mode enhance_hf "
            "suits it) and for stock samplers.",
            inputs=[
                io.Vae.Input("vae", tooltip="The Wan 2.1 VAE."),
                io.Image.Input(
                    "video", tooltip="The clip's frames (Get Video Components); its last ones are continued."
                ),
                io.Int.Input(
                    "cond_frames",
                    default=13,
                    min=1,
                    max=MAX_FRAMES - TEMPORAL_FACTOR,
                    step=TEMPORAL_FACTOR,
                    tooltip="How many of the clip's last frames are given: 4k+1; LongCat-Video was trained with 13.",
                ),
                *_size_inputs(),
            ],
            outputs=[io.Latent.Output(tooltip="With a noise_mask that marks the given frames.")],
        )

    @classmethod
    def execute(cls, vae, video, cond_frames, resolution, width, height, length, batch_size=1) -> io.NodeOutput:
        _check_images("video", video)
        latent_frames(cond_frames, "cond_frames")
        frames = last_frames(video, cond_frames)
        return io.NodeOutput(conditioned_latent(vae, frames, resolution, width, height, length, batch_size))


NODES = [ImageToVideo, VideoContinuation]
