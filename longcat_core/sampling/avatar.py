"""What a segment of a talking person takes besides the text: audio windows, masks of several people, a reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import LongCatError
from ..model.kv_cache import Reference

# Audio embeddings on each side of a video frame that its window holds.
AROUND = 2


@dataclass(frozen=True)
class Audio:
    """The audio of one segment.

    windows: [B or 1, F, window, groups, channels] fp32, of its F video frames, or of several speakers in one video;
    then classes [S, K] bool says which tokens of the first frame belong to whom (`class_tokens`).
    guidance_scale: how far sampling goes from silence to this audio; 1: no guidance.
    """

    windows: Tensor
    classes: Tensor | None = None
    guidance_scale: float = 4.0


@dataclass(frozen=True)
class ReferenceFrame:
    """A clean frame in front of a continuation, which shows who it is about. latents: [B or 1, C, 1, H, W]."""

    latents: Tensor
    at: Reference


def audio_windows(embeddings: Tensor, start: int, frames: int, stride: int) -> Tensor:
    """Windows [1, frames, 5, groups, channels] of a segment, from embeddings [N, groups, channels] of the whole audio.

    start: embedding of the segment's first video frame; stride: embeddings for each video frame, 2 in version 1.0 and 1
    in version 1.5. Before the first and behind the last embedding these are repeated.
    """
    if len(embeddings) == 0:
        raise LongCatError("the audio has no embeddings; give longer audio")
    at = start + stride * torch.arange(frames)[:, None] + torch.arange(-AROUND, AROUND + 1)
    return embeddings[at.clamp(0, len(embeddings) - 1)][None]


# Where the first and the second person are unless somebody says so, as (top, left, bottom, right) shares of an image.
LEFT, RIGHT = (0.1, 0.05, 0.9, 0.45), (0.1, 0.55, 0.9, 0.95)
Box = tuple[float, float, float, float]


def box_mask(box: Box, height: int, width: int, name: str = "the box") -> Tensor:
    """A mask [height, width] fp32, 1 inside a box of (top, left, bottom, right) shares of an image, 0..1.

    name: of the box, for the LongCatError that is raised for one without a pixel of the image.
    """
    top, left, bottom, right = box
    # Shares such as 0.55 are a little less than that in floating point.
    rows, columns = (
        slice(*(int(share * side + 1e-6) for share in shares))
        for shares, side in (((top, bottom), height), ((left, right), width))
    )
    mask = torch.zeros(height, width)
    if min(box) < 0 or max(box) > 1 or not mask[rows, columns].numel():
        raise LongCatError(
            f"{name} reaches from {left:.0%} to {right:.0%} of the width and from {top:.0%} to {bottom:.0%} of the "
            "height; give a box that covers its person"
        )
    mask[rows, columns] = 1
    return mask


def with_background(people: Sequence[Tensor]) -> Tensor:
    """Masks [h, w] of two people and any further ones -> [K, h, w] in the order of `Audio.classes`: the background,
    which is neither of the first two, comes third."""
    first, second, *others = ((mask > 0).float() for mask in people)
    background = 1 - torch.maximum(first, second)
    return torch.stack((first, second, background, *others))


def fit_masks(masks: Tensor, height: int, width: int) -> Tensor:
    """Masks [K, h, w] fp32 in pixels of the image -> [K, height, width] in pixels of the video.

    They are resized and cropped as the image is: to cover the video, around its center.
    """
    rows, columns = masks.shape[1:]
    if width / height > columns / rows:
        size = int(rows * width / columns), width
    else:
        size = height, int(columns * height / rows)
    # Rounding must not leave less than the video's size.
    size = max(size[0], height), max(size[1], width)
    resized = F.interpolate(masks[None], size, mode="bilinear", align_corners=False)[0]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return resized[:, top : top + height, left : left + width]


def class_tokens(masks: Tensor, rows: int, columns: int) -> Tensor:
    """Masks [K, height, width] in pixels of the video, in the order of `Audio.classes` -> which of a frame's tokens
    belong to each, [S, K] bool.

    Raises LongCatError for a mask without a token.
    """
    grid = F.interpolate(masks[None].float(), (rows, columns), mode="nearest")[0] > 0
    for i, mask in enumerate(grid):
        if not mask.any():
            who, remedy = f"the box or mask of person {i + (i < 2)}", "a larger one"
            if i == 2:
                who, remedy = "what the boxes or masks leave as background", "smaller ones"
            raise LongCatError(f"{who} covers no token of the video, 16x16 pixels of it; give {remedy}")
    return grid.flatten(1).t()
