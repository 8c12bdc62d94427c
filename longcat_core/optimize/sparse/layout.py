"""The order of tokens for sparse attention, in which 64 consecutive tokens always are neighbors.

Tokens are only permuted: T frames of S tokens stay T rows of S tokens, without padding, so that a sparse pass has the
shapes and the compiled graphs of a dense one. Conditioning frames keep their order; the noise frames behind them, which
share one timestep, are ordered among themselves. Where some noise frames do not see a reference frame, they are ordered
apart, so that every attention has its queries side by side.

The order runs through lanes: a lane is a few frames by a few rows, over all columns, and is walked column by column.
Lanes follow each other in a snake, so that one begins beside the end of the last. Where frames and rows do not divide
evenly, lanes differ by one frame or row, and their 64 tokens reach over fewer or more columns. Lanes of 8 frames by 2
rows cut a grid of 24x30x52 tokens into boxes of 8x2x4.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor

from ...model.attention import Groups
from ...model.kv_cache import Reference
from ...model.ops import Rope
from ...model.transformer import FrameLayout, ReferenceLayout
from ..operators import AttendFrames
from .settings import BLOCK

Shape = tuple[int, int, int]
# How much wider boxes may be that divide a grid than the best ones that do not.
_WIDER = 2.0


def _bands(size: int, side: int) -> list[int]:
    """Lengths close to `side`, and to each other, into which an axis is cut."""
    count = max(1, round(size / side))
    return [size * (i + 1) // count - size * i // count for i in range(count)]


def lane_order(grid: Shape, box: Shape) -> Tensor:
    """[N] int64: the token, in (frames, rows, columns) order, at each place. box: frames, rows, columns; see above."""
    places, right, down = [], True, True
    index = torch.arange(math.prod(grid)).view(grid)
    for band in index.split(_bands(grid[0], box[0]), dim=0):
        lanes = band.split(_bands(grid[1], box[1]), dim=1)
        for lane in lanes if down else reversed(lanes):
            # Column by column, in one direction or the other.
            walked = lane.permute(2, 1, 0)
            places.append((walked if right else walked.flip(0)).flatten())
            right = not right
        down = not down
    return torch.cat(places)


def _spread(grid: Shape, box: Shape) -> float:
    """How far tokens lie from the center of their block, squared: the mean over the lanes of a grid."""
    found = 0.0
    for frames, rows in product(_bands(grid[0], box[0]), _bands(grid[1], box[1])):
        sides = frames, rows, BLOCK / (frames * rows)
        found += frames * rows * sum(side**2 - 1 for side in sides) / 12
    return found / (grid[0] * grid[1])


@lru_cache(maxsize=32)
def choose_box(grid: Shape) -> Shape:
    """Frames, rows and columns of the boxes of 64 tokens for a grid: those that hold it together best.

    Boxes that divide the grid come first unless they are much wider than others.
    """
    powers = [1 << i for i in range(BLOCK.bit_length())]
    boxes = [(a, b, BLOCK // (a * b)) for a, b in product(powers, powers) if a * b <= BLOCK]
    wide = {box: _spread(grid, box) for box in boxes}
    best = min(wide, key=wide.__getitem__)
    exact = [box for box in boxes if not any(n % side for n, side in zip(grid, box, strict=True))]
    nearest = min(exact, key=wide.__getitem__, default=best)
    return nearest if wide[nearest] <= _WIDER * wide[best] else best


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # an order made while sampling serves other passes too
def sparse_order(grid: Shape, cond_frames: int, device: Any, apart: tuple[int, int] = (0, 0)) -> tuple[Tensor, Tensor]:
    """The token at each place and the place of each token, [N] int64 each.

    grid: frames, rows and columns of tokens, of which the first `cond_frames` are conditioning frames. apart: noise
    frames (first, past the last), counted from the first noise frame, that are ordered by themselves.
    """
    order = torch.arange(math.prod(grid))
    for first, past in pairwise((cond_frames, *(cond_frames + frame for frame in apart if any(apart)), grid[0])):
        if first < past:
            noise, begin = (past - first, *grid[1:]), first * grid[1] * grid[2]
            order[begin : begin + math.prod(noise)] = begin + lane_order(noise, choose_box(noise))
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    return order.to(device), places.to(device)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def sparse_rope_table(
    head_dim: int, grid: Shape, cond_frames: int, start: int, device: Any, reference: Reference | None = None
) -> Rope:
    """The RoPE tables of a grid in this order: cosines and sines, each [N, head_dim/2] fp32; see `SparseLayout`."""
    layout = SparseLayout(grid, cond_frames, device, start, reference)
    cos, sin = layout.plain.rope(head_dim, grid, start, torch.device(device))
    return cos[layout.order], sin[layout.order]


class SparseLayout(FrameLayout):
    """Tokens in the order of sparse attention; a row of tokens is as long as a frame, but not one.

    All noise frames must share one timestep, as they do in every task; an `Execution` runs others dense.
    """

    def __init__(
        self, grid: Shape, cond_frames: int, device: Any, start: int = 0, reference: Reference | None = None
    ) -> None:
        """grid: frames, rows and columns of tokens, of which the first `cond_frames` are conditioning frames; start:
        number of cached frames in front of it. reference: of the first clean frame, if that is a reference frame."""
        self.grid, self.cond_frames, self.reference = grid, cond_frames, reference
        self.plain = FrameLayout() if reference is None else ReferenceLayout(reference)
        self.hidden = self.plain.groups(cond_frames, start, grid[0]).hidden
        self.order, self.places = sparse_order(grid, cond_frames, device, self.hidden)

    def arrange(self, tokens: Tensor) -> Tensor:
        return tokens.flatten(1, 2).index_select(1, self.order).view(tokens.shape)

    def restore(self, tokens: Tensor) -> Tensor:
        return self.restore_rows(tokens.flatten(1, 2)).view(tokens.shape)

    def restore_rows(self, rows: Tensor) -> Tensor:
        return rows.index_select(1, self.places)

    def rope(self, head_dim: int, grid: tuple[int, ...], start: int, device: torch.device) -> Rope:
        return sparse_rope_table(head_dim, self.grid, self.cond_frames, start, device, self.reference)

    def groups(self, num_cond: int, start: int, frames: int) -> Groups:
        return self.plain.groups(num_cond, start, frames)

    def by_frames(self, attend: AttendFrames) -> AttendFrames:
        """`attend`, for queries of all noise frames in this order."""
        clean = self.cond_frames * self.grid[1] * self.grid[2]
        places, order = self.places[clean:] - clean, self.order[clean:] - clean

        def arranged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q.index_select(1, places), k, v).index_select(1, order)

        return arranged
