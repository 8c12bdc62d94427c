"""Copies into memory that is far away, such as another GPU's, by few multiprocessors: the link is the limit."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

from torch import Tensor

from ..copies import copy
from ..requirement import Inputs, Requirement
from .jit import jit, tl

# Numbers of a tile, 16 KB in 16 bits.
TILE = 8192
NEEDS = Requirement(triton=True, dtypes=None, head_dims=None)


@jit
def _put_one(
    to, of, rows, inner, to_sample_stride, to_outer_stride, to_row_stride, of_sample_stride, of_outer_stride,
    of_row_stride, width, ROWS: tl.constexpr, WIDTH: tl.constexpr,
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


@jit
def _put_rows(
    to_a, of_a, rows_a, inner_a, to_sample_a, to_outer_a, to_row_a, of_sample_a, of_outer_a, of_row_a,
    to_b, of_b, rows_b, inner_b, to_sample_b, to_outer_b, to_row_b, of_sample_b, of_outer_b, of_row_b,
    to_c, of_c, rows_c, inner_c, to_sample_c, to_outer_c, to_row_c, of_sample_c, of_outer_c, of_row_c,
    width, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Three tensors by one kernel: between kernels, what computes beside would take the multiprocessors for long."""
    _put_one(
        to_a, of_a, rows_a, inner_a, to_sample_a, to_outer_a, to_row_a, of_sample_a, of_outer_a, of_row_a, width,
        ROWS, WIDTH,
    )  # fmt: skip
    _put_one(
        to_b, of_b, rows_b, inner_b, to_sample_b, to_outer_b, to_row_b, of_sample_b, of_outer_b, of_row_b, width,
        ROWS, WIDTH,
    )  # fmt: skip
    _put_one(
        to_c, of_c, rows_c, inner_c, to_sample_c, to_outer_c, to_row_c, of_sample_c, of_outer_c, of_row_c, width,
        ROWS, WIDTH,
    )  # fmt: skip


def put(pairs: Sequence[tuple[Tensor, Tensor]], programs: int) -> None:
    """to.copy_(of) for up to three pairs (to, of), both [B, T, N, H, D] of one dtype; all have the same B, H and D.

    programs: multiprocessors that the copies may take.
    """
    pairs = [pair for pair in pairs if pair[0].numel()]
    if pairs and all(map(_has_rows, chain(*pairs))) and not NEEDS.why_not(Inputs.of(pairs[0][0])):
        launch_put(pairs, programs)
    else:
        for to, of in pairs:
            copy(to, of)


def launch_put(pairs: Sequence[tuple[Tensor, Tensor]], programs: int) -> None:
    """`put` by the kernel. Heads of a token lie side by side."""
    batch, _, _, heads, dim = pairs[0][0].shape
    width = 1 << (heads * dim - 1).bit_length()
    given: list[Any] = []
    for to, of in pairs:
        given += (to, of, to.shape[1] * to.shape[2], to.shape[2], *to.stride()[:3], *of.stride()[:3])
    # No rows of tensors that are not there.
    given += (3 - len(pairs)) * [*pairs[0], 0, 1, 0, 0, 0, 0, 0, 0]
    _put_rows[(programs, batch)](*given, heads * dim, ROWS=max(1, TILE // width), WIDTH=width, num_warps=8)


def _has_rows(x: Tensor) -> bool:
    return x.stride(-1) == 1 and x.stride(-2) == x.shape[-1]
