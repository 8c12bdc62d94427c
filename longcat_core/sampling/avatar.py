"""What a segment of a talking person takes besides the text: audio windows, masks of several people, a reference."""

from __future__ import annotations

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
    """Masks [K, height, width] in pixels of the video -> which of a frame's tokens belong to each, [S, K] bool.

    Raises LongCatError for a mask without a token.
    """
    grid = F.interpolate(masks[None].float(), (rows, columns), mode="nearest")[0] > 0
    for i, mask in enumerate(grid):
        if not mask.any():
            raise LongCatError(f"mask {i + 1} of {len(grid)} covers no token; give one that covers its person")
    return grid.flatten(1).t()
