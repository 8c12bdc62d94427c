"""ComfyUI's IMAGE, fp32 in 0..1, and the core's uint8 frames."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..longcat_core.errors import LongCatError


def to_bytes(images: Tensor, truncated: bool = False) -> np.ndarray:
    """IMAGE [F, H, W, C] in 0..1 -> uint8 [F, H, W, 3]. truncated: levels are cut to whole numbers, not rounded."""
    levels = images[..., :3].mul(255)
    return (levels if truncated else levels.round()).clamp(0, 255).to("cpu", torch.uint8).numpy()


def to_image(frames: np.ndarray) -> Tensor:
    """uint8 [..., H, W, 3] -> IMAGE [..., H, W, 3], fp32 in 0..1."""
    return torch.from_numpy(np.ascontiguousarray(frames)).float() / 255


def check_images(name: str, images: Tensor) -> None:
    """Raise LongCatError unless `images` is an IMAGE [F, H, W, C] with frames and at least three channels."""
    if images.ndim != 4 or images.shape[-1] < 3 or not len(images):
        raise LongCatError(f"{name} is {list(images.shape)}; connect an IMAGE with three channels [frames, H, W, 3]")


def one_image(image: Tensor, otherwise: str = "") -> np.ndarray:
    """The picture that a video starts with, uint8 [1, H, W, 3], of the input `image`.

    otherwise: what else to do with several, for the LongCatError that is raised for these.
    """
    check_images("image", image)
    if len(image) > 1:
        raise LongCatError(
            f"image holds {len(image)} images, but a video starts with one; take one out of the batch "
            f"(ImageFromBatch){otherwise}"
        )
    return to_bytes(image)
