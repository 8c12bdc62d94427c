"""Tensors as int8 with a scale for each token and head, in one run of memory, as ranks exchange them. Lossy.

Within a row of a head the largest value is about three times the deviation, so int8's even grid loses a quarter of what
e4m3's would.

A row of head_dim values takes head_dim + 4 bytes. In PyTorch on any device, and by Triton kernels that read every value
once, wherever it lies in a fused projection, and write it once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..requirement import HALF, Inputs, Requirement
from .elementwise import TINY
from .jit import jit, tl, triton

# The largest value of a row, and rows of a program.
MOST, ROWS = 127.0, 32
NEEDS = Requirement(triton=True, dtypes=HALF, head_dims=None, backward=False)


@jit
def _pack_rows(
    x, scales, values, words, rows, heads, sample_stride, piece_stride, token_stride, head_stride, dim,
    ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Each row's largest value becomes 127."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    sample, piece = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, DIM)[None, :]
    mask = (row < rows)[:, None] & (channel < dim)
    at = sample * sample_stride + piece * piece_stride + (row // heads) * token_stride + (row % heads) * head_stride
    value = tl.load(x + at[:, None] + channel, mask=mask, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(value), axis=1), 1e-12) / 127.0
    begin = (sample * tl.num_programs(1) + piece) * words
    tl.store(scales + begin + row, scale, mask=row < rows)
    # Rounding may lift the quotient of the largest.
    value = tl.minimum(tl.maximum(tl.floor(value / scale[:, None] + 0.5), -127.0), 127.0)
    to = values + 4 * (begin + rows) + row[:, None] * dim + channel
    tl.store(to, value.to(values.dtype.element_ty), mask=mask)


@jit
def _unpack_rows(scales, values, out, words, rows, dim, ROWS: tl.constexpr, DIM: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    piece = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, DIM)[None, :]
    mask = (row < rows)[:, None] & (channel < dim)
    begin = piece * words
    value = tl.load(values + 4 * (begin + rows) + row[:, None] * dim + channel, mask=mask, other=0.0).to(tl.float32)
    value *= tl.load(scales + begin + row, mask=row < rows, other=0.0)[:, None]
    to = out + (piece * rows + row[:, None]) * dim + channel
    tl.store(to, value.to(out.dtype.element_ty), mask=mask)


class Packed(NamedTuple):
    """x [B, P, N, heads, head_dim] as P pieces a sample, each in one run of memory.

    words: fp32 [B, P, M], contiguous: the scales [N, heads] of a piece, and behind them its int8 values
    [N, heads, head_dim], padded to whole words.
    """

    words: Tensor
    tokens: int
    heads: int
    head_dim: int

    @property
    def scales(self) -> Tensor:
        """fp32 [B, P, N, heads], a view."""
        return self.words[..., : self.tokens * self.heads].unflatten(-1, (self.tokens, self.heads))

    @property
    def values(self) -> Tensor:
        """int8 [B, P, N, heads, head_dim], a view."""
        rows = self.tokens * self.heads
        values = self.words.view(torch.int8)[..., 4 * rows :][..., : rows * self.head_dim]
        return values.unflatten(-1, (self.tokens, self.heads, self.head_dim))


def empty(x: Tensor) -> Packed:
    """Memory for x [B, P, N, heads, head_dim]."""
    batch, pieces, tokens, heads, dim = x.shape
    words = tokens * heads + -(-tokens * heads * dim // 4)
    return Packed(x.new_empty((batch, pieces, words), dtype=torch.float32), tokens, heads, dim)


def pack(x: Tensor) -> Packed:
    """x [B, P, N, heads, head_dim], whose strides may be any."""
    found = empty(x)
    if not NEEDS.why_not(Inputs.of(x)):
        launch_pack(x, found)
        return found
    fill(x, found)
    return found


def fill(x: Tensor, out: Packed) -> None:
    """`pack` in PyTorch, into `out`."""
    x = x.float()
    scales = x.abs().amax(-1).clamp(min=TINY) / MOST
    out.scales.copy_(scales)
    out.values.copy_((x / scales[..., None] + 0.5).floor().clamp(-MOST, MOST))


def unpack(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The tensor again, contiguous and in `dtype`."""
    if not NEEDS.why_not(Inputs(packed.words.device, dtype, packed.head_dim, False)):
        return launch_unpack(packed, dtype)
    return (packed.values.float() * packed.scales[..., None]).to(dtype)


def launch_pack(x: Tensor, out: Packed) -> None:
    """`pack` by the kernel. x: in 16 bits."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, pieces, tokens, heads, dim = x.shape
    rows = tokens * heads
    _pack_rows[(triton.cdiv(rows, ROWS), pieces, batch)](
        *(x, out.words, out.words.view(torch.int8), out.words.shape[-1], rows, heads, *x.stride()[:4], dim),
        ROWS=ROWS,
        DIM=1 << (dim - 1).bit_length(),
    )


def launch_unpack(packed: Packed, dtype: torch.dtype) -> Tensor:
    """`unpack` by the kernel, to 16 bits."""
    words, tokens, heads, dim = packed
    batch, pieces, size = words.shape
    out = words.new_empty((batch, pieces, tokens, heads, dim), dtype=dtype)
    rows = tokens * heads
    _unpack_rows[(triton.cdiv(rows, ROWS), pieces * batch)](
        *(words, words.view(torch.int8), out, size, rows, dim),
        ROWS=ROWS,
        DIM=1 << (dim - 1).bit_length(),
    )
    return out
