"""Which key blocks a query block attends to: means of blocks of tokens, and the best key blocks of each query block.

Blocks are consecutive tokens from the first one on, whole ones for keys; the last query block may be short. See
`optimize.sparse.plain` for what sparse attention computes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .block_sparse import largest
from .elementwise import whole_tokens
from .jit import jit, tl, triton

# Tokens of a key block, and of the parts in which a block is read.
BLOCK = 64
# Columns of `Chosen.mask` are a multiple of this, so that no tile of the tail reads beyond a row.
MASK_COLUMNS = 128


class Chosen(NamedTuple):
    """The key blocks of every query block.

    indices: [B, heads, query blocks, w] int32, the sink and then the chosen blocks, ascending; entries past a count are
    arbitrary. counts: [B, heads, query blocks] int32. mask: [B, heads, query blocks, m] uint8, 1 for the blocks in the
    list and for columns that are not blocks, otherwise 0. per_head: how many blocks each head lists.
    """

    indices: Tensor
    counts: Tensor
    mask: Tensor
    per_head: tuple[int, ...]


@jit
def _sparse_mean(
    x, out, tokens, sample_stride, stride,
    TOKENS: tl.constexpr, PART: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Mean of one block of TOKENS tokens of a head, the last of which may be short."""
    # Heads side by side, so that programs that run together read whole tokens.
    head, block, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    heads, blocks = tl.num_programs(0), tl.num_programs(1)
    channel = tl.arange(0, DIM)
    x += sample * sample_stride + head * DIM
    total = tl.zeros((DIM,), tl.float32)
    for part in tl.static_range(0, TOKENS, PART):
        at = (block * TOKENS + part + tl.arange(0, PART)).to(tl.int64)[:, None]
        value = tl.load(x + at * stride + channel[None, :], mask=at < tokens, other=0.0)
        total += tl.sum(value.to(tl.float32), axis=0)
    count = tl.minimum(tokens - block * TOKENS, TOKENS)
    at = ((sample * heads + head) * blocks + block) * DIM + channel
    tl.store(out + at, (total / count).to(out.dtype.element_ty))


@jit
def _sparse_choose(
    scores, keep, indices, counts, mask, rows, blocks, sink, width, mask_width,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """The sink and the keep[head] largest other scores of a row; of equal ones the first.

    Scores are 16-bit floats read as int16. rows: of a head.
    """
    pair, heads = tl.program_id(1), tl.num_programs(1)
    row = (tl.program_id(2).to(tl.int64) * heads + pair) * rows + tl.program_id(0)
    column = tl.arange(0, WIDTH)
    inside = column < blocks
    bits = tl.load(scores + row * blocks + column, mask=inside, other=0)
    most = tl.load(keep + pair)
    chosen, place = largest(bits, inside & (column >= sink), most)
    chosen |= column < sink
    place = tl.where(column < sink, column, sink + place)
    tl.store(indices + row * width + place, column, mask=chosen)
    tl.store(counts + row, sink + most)
    left = (chosen | (column >= blocks)).to(tl.uint8)
    tl.store(mask + row * mask_width + column, left, mask=column < mask_width)


def block_means(x: Tensor, tokens: int, whole: bool = False) -> Tensor:
    """Means of blocks of `tokens` tokens: x [B, N, heads, head_dim] -> [B, heads, blocks, head_dim], same dtype.

    The mean of a short last block is that of its own tokens; whole: without such a block. fp32 inside. tokens: a
    multiple of 64.
    """
    x = whole_tokens(x)
    batch, count, heads, dim = x.shape
    blocks = count // tokens if whole else triton.cdiv(count, tokens)
    out = x.new_empty((batch, heads, blocks, dim))
    grid = heads, blocks, batch
    _sparse_mean[grid](x, out, count, x.stride(0), x.stride(1), TOKENS=tokens, PART=BLOCK, DIM=dim, num_warps=4)
    return out


def block_scores(q: Tensor, k: Tensor) -> Tensor:
    """Products of means: q [B, heads, nq, D], k [B, heads, nk, D] -> [B, heads, nq, nk], rounded to their dtype."""
    if q.is_cuda:
        return q @ k.transpose(-1, -2)
    return (q.float() @ k.float().transpose(-1, -2)).to(q.dtype)


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """The numbers as int32 [n] on a device, copied there once."""
    return torch.tensor(numbers, dtype=torch.int32, device=device)


def choose_blocks(scores: Tensor, keep: tuple[int, ...], sink: int) -> Chosen:
    """The first `sink` key blocks and the keep[head] best others of each query block: scores [B, heads, nq, nk] in 16
    bits; of equal scores the first wins. At most nk - sink blocks can be kept.
    """
    batch, heads, rows, blocks = scores.shape
    keep = tuple(min(n, blocks - sink) for n in keep)
    width = sink + max(keep)
    mask_width = triton.cdiv(blocks, MASK_COLUMNS) * MASK_COLUMNS
    columns = triton.next_power_of_2(mask_width)
    indices = torch.empty((batch, heads, rows, width), dtype=torch.int32, device=scores.device)
    counts = torch.empty((batch, heads, rows), dtype=torch.int32, device=scores.device)
    mask = torch.empty((batch, heads, rows, mask_width), dtype=torch.uint8, device=scores.device)
    _sparse_choose[(rows, heads, batch)](
        *(scores.contiguous().view(torch.int16), on_device(keep, scores.device), indices, counts, mask),
        *(rows, blocks, sink, width, mask_width),
        WIDTH=columns,
        num_warps=min(16, max(1, columns // 1024)),
    )
    return Chosen(indices, counts, mask, tuple(sink + n for n in keep))
