"""Copies into memory that is far away, such as another GPU's, by few multiprocessors: the link is the limit."""

from __future__ import annotations

from torch import Tensor

from ..copies import copy
from ..requirement import Inputs, Requirement
from .jit import jit, tl

# Numbers of a tile, 16 KB in 16 bits.
TILE = 8192
NEEDS = Requirement(triton=True, dtypes=None, head_dims=None)


@jit
def _put_rows(
    to, of, rows, inner, width, to_sample_stride, to_outer_stride, to_row_stride, of_sample_stride, of_outer_stride,
    of_row_stride, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Every program copies tiles of a sample, `ROWS` of its `rows` each."""
    sample = tl.program_id(1).to(tl.int64)
    to += sample * to_sample_stride
    of += sample * of_sample_stride
    channel = tl.arange(0, WIDTH)[None, :]
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (channel < width)
        outer, at = (row // inner).to(tl.int64), (row % inner).to(tl.int64)
        value = tl.load(of + (outer * of_outer_stride + at * of_row_stride)[:, None] + channel, mask=mask)
        tl.store(to + (outer * to_outer_stride + at * to_row_stride)[:, None] + channel, value, mask=mask)


def put(to: Tensor, of: Tensor, programs: int) -> None:
    """to.copy_(of), both [B, T, N, H, D] of the same dtype. programs: multiprocessors that the copy may take."""
    if not to.numel():
        return
    if all(map(_has_rows, (to, of))) and not NEEDS.why_not(Inputs.of(to)):
        launch_put(to, of, programs)
    else:
        copy(to, of)


def launch_put(to: Tensor, of: Tensor, programs: int) -> None:
    """`put` by the kernel. to, of: heads of a token lie side by side."""
    batch, frames, tokens, heads, dim = to.shape
    width = 1 << (heads * dim - 1).bit_length()
    _put_rows[(programs, batch)](
        *(to, of, frames * tokens, tokens, heads * dim, *to.stride()[:3], *of.stride()[:3]),
        ROWS=max(1, TILE // width),
        WIDTH=width,
        num_warps=8,
    )


def _has_rows(x: Tensor) -> bool:
    return x.stride(-1) == 1 and x.stride(-2) == x.shape[-1]
