"""What the exact part of sparse attention left out: other key blocks as one key and value each, and the last keys.

One kernel goes over the means of key blocks as flash attention goes over keys. It starts from the exact part's output
and log-sum-exp as if these were its own running state, so the merge costs no pass over memory of its own. A mean stands
for 64 keys: its logit is raised by ln 64, which is 6 in the powers of two that the kernel counts in. Blocks in the list
of a query block are masked. The keys behind the last whole block are taken one by one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .elementwise import whole_tokens
from .jit import jit, tl, triton

if triton is not None:
    from triton.tools.tensor_descriptor import TensorDescriptor


class TailTiles(NamedTuple):
    """rows, columns: of a tile of queries and of means. tma: means are fetched by the tensor memory accelerator."""

    rows: int
    columns: int
    warps: int
    stages: int
    tma: bool

    def shared_bytes(self, dim: int) -> int:
        """Shared memory for the query tile and the tiles of means in flight, in 16 bits."""
        return 2 * dim * (self.rows + 2 * self.stages * self.columns)


def choose_tail_tiles(capability: tuple[int, int]) -> TailTiles:
    """Tiles for a compute capability."""
    if capability[0] in (9, 10):
        # The fastest of twelve on an H100: 2.37 ms for [2, 37440, 32, 128] over 585 means; 128 rows take 2.5 to 3.5.
        return TailTiles(64, 64, 4, 3, True)
    return TailTiles(64, 64, 4, 2, False)


@jit
def _sparse_tail(
    q, means_k, means_v, mask, rest_k, rest_v, exact, sums, out, tokens, blocks, rests, heads, mask_width,
    q_sample, q_stride, exact_sample, exact_head, exact_stride, rest_k_sample, rest_k_stride, rest_v_sample,
    rest_v_stride, scale,
    Q_BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DIM: tl.constexpr, TAIL: tl.constexpr,
    REST: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One tile of queries. scale: softmax scale times log2(e)."""
    tile, pair = tl.program_id(0), tl.program_id(1)
    sample, head = (pair // heads).to(tl.int64), pair % heads
    row = tile * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, DIM)[None, :]
    there = row[:, None] < tokens
    q += sample * q_sample + head * DIM
    query = tl.load(q + row.to(tl.int64)[:, None] * q_stride + channel, mask=there, other=0.0)
    exact += sample * exact_sample + head * exact_head
    acc = tl.load(exact + row.to(tl.int64)[:, None] * exact_stride + channel, mask=there, other=0.0).to(tl.float32)
    top = tl.load(sums + pair.to(tl.int64) * tokens + row, mask=row < tokens, other=0.0) * 1.4426950408889634
    weight = tl.full((ROWS,), 1.0, tl.float32)
    if TAIL:
        base = pair * blocks
        first = tile * ROWS // Q_BLOCK
        q_blocks = tl.cdiv(tokens, Q_BLOCK)
        mask += (pair * q_blocks + first).to(tl.int64) * mask_width
        for start in range(0, blocks, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            if TMA:
                key = means_k.load([base + start, 0])
                value = means_v.load([base + start, 0])
            else:
                at = (base + column).to(tl.int64)[:, None] * DIM + channel
                key = tl.load(means_k + at, mask=column[:, None] < blocks, other=0.0)
                value = tl.load(means_v + at, mask=column[:, None] < blocks, other=0.0)
            score = tl.dot(query, tl.trans(key))
            listed = tl.load(mask + column)[None, :]
            if ROWS > Q_BLOCK:
                # Two query blocks share the tile; the last one may not exist.
                second = tl.load(mask + mask_width + column, mask=(first + 1 < q_blocks) & (column >= 0), other=1)
                listed = tl.where(tl.arange(0, ROWS)[:, None] < Q_BLOCK, listed, second[None, :])
            score = tl.where(listed == 0, score, float("-inf"))
            new = tl.maximum(top, tl.max(score, 1) * scale + 6.0)
            shrink = tl.exp2(top - new)
            p = tl.exp2(score * scale + (6.0 - new)[:, None])
            weight = weight * shrink + tl.sum(p, 1)
            acc = tl.dot(p.to(value.dtype), value, acc * shrink[:, None])
            top = new
    if REST:
        column = tl.arange(0, 64)
        inside = column[:, None] < rests
        rest_k += sample * rest_k_sample + head * DIM
        rest_v += sample * rest_v_sample + head * DIM
        key = tl.load(rest_k + column[:, None] * rest_k_stride + channel, mask=inside, other=0.0)
        value = tl.load(rest_v + column[:, None] * rest_v_stride + channel, mask=inside, other=0.0)
        score = tl.where(column[None, :] < rests, tl.dot(query, tl.trans(key)), float("-inf"))
        new = tl.maximum(top, tl.max(score, 1) * scale)
        shrink = tl.exp2(top - new)
        p = tl.exp2(score * scale - new[:, None])
        weight = weight * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(value.dtype), value, acc * shrink[:, None])
    at = ((sample * tokens + row) * heads + head)[:, None] * DIM + channel
    tl.store(out + at, (acc / weight[:, None]).to(out.dtype.element_ty), mask=there)


def add_tail(
    q: Tensor,
    exact: Tensor,
    sums: Tensor,
    means: tuple[Tensor, Tensor] | None,
    mask: Tensor,
    rest: tuple[Tensor, Tensor],
    query_block: int,
    tiles: TailTiles | None = None,
) -> Tensor:
    """The whole of sparse attention from its exact part -> [B, Nq, heads, head_dim], in place of `exact` where that is
    contiguous.

    q [B, Nq, heads, head_dim] in 16 bits. exact: the exact part's output, as q but with any strides, and sums [B,
    heads, Nq] fp32 its log-sum-exp. means: keys and values [B, heads, blocks, head_dim] of the blocks, or None: left
    out. mask: `Chosen.mask`. rest: keys and values [B, n, heads, head_dim] behind the last block, n < 64, perhaps 0.
    """
    q, rest_k, rest_v = whole_tokens(q), *map(whole_tokens, rest)
    batch, tokens, heads, dim = q.shape
    if tiles is None:
        tiles = choose_tail_tiles(torch.cuda.get_device_capability(q.device) if q.is_cuda else (0, 0))
    exact = exact if exact.stride(3) == 1 else exact.contiguous()
    out = exact if exact.is_contiguous() else torch.empty(q.shape, dtype=q.dtype, device=q.device)
    means_k, means_v = means if means is not None else (q, q)
    blocks = means_k.shape[2] if means is not None else 0
    read = (means_k, means_v)
    tma = tiles.tma and means is not None
    if tma:
        shape = [batch * heads * blocks, dim]
        read = tuple(TensorDescriptor(x.contiguous(), shape, [dim, 1], [tiles.columns, dim]) for x in read)
    _sparse_tail[(triton.cdiv(tokens, tiles.rows), batch * heads)](
        *(q, *read, mask, rest_k, rest_v, exact, sums.contiguous(), out),
        *(tokens, blocks, rest_k.shape[1], heads, mask.shape[-1], q.stride(0), q.stride(1)),
        *(exact.stride(0), exact.stride(2), exact.stride(1)),
        *(rest_k.stride(0), rest_k.stride(1), rest_v.stride(0), rest_v.stride(1), dim**-0.5 * math.log2(math.e)),
        Q_BLOCK=query_block,
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        DIM=dim,
        TAIL=means is not None,
        REST=rest_k.shape[1] > 0,
        TMA=tma,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return out
