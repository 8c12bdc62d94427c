"""Large pictures in overlapping tiles of 256 pixels, for when memory holds nothing larger."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Pixels of a tile's sides, and from the beginning of a tile to that of the next.
TILE, STRIDE = 256, 192
# Pixels of a latent.
FACTOR = 8


def exceeds(height: int, width: int) -> bool:
    """Whether pictures of this height and width, in pixels, are larger than a tile."""
    return height > TILE or width > TILE


def tiled(x: Tensor, run: Callable[[Tensor], Tensor], pixels_in: int, pixels_out: int) -> Tensor:
    """`run` on tiles of x [B, C, T, H, W], whose results fade into each other; on the CPU, in the results' dtype.

    pixels_in, pixels_out: pixels that a value of x and of the result stands for.
    """
    side, step = TILE // pixels_in, STRIDE // pixels_in
    out_step, overlap = STRIDE // pixels_out, (TILE - STRIDE) // pixels_out
    rows, above = [], [torch.empty(0)]
    for top in range(0, x.shape[3], step):
        row: list[Tensor] = []
        for number, left in enumerate(range(0, x.shape[4], step)):
            tile = run(x[..., top : top + side, left : left + side]).cpu()
            if top:
                _fade(above[number].transpose(3, 4), tile.transpose(3, 4), overlap)
            if left:
                _fade(row[-1], tile, overlap)
            row.append(tile)
        rows.append(torch.cat([tile[..., :out_step, :out_step] for tile in row], dim=4))
        above = row
    whole = torch.cat(rows, dim=3)
    return whole[..., : x.shape[3] * pixels_in // pixels_out, : x.shape[4] * pixels_in // pixels_out]


def _fade(before: Tensor, tile: Tensor, overlap: int) -> None:
    """Mix the right edge of `before` into the left edge of `tile`, in place."""
    overlap = min(before.shape[4], tile.shape[4], overlap)
    share = torch.arange(overlap, dtype=torch.float32) / overlap
    edge = tile[..., :overlap]
    edge.copy_(before[..., -overlap:] * (1 - share) + edge * share)
