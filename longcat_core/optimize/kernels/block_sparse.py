"""Kernels of block-sparse attention: means of chunks, the best key chunks of each query chunk, attention over them.

Tokens lie chunk after chunk (`optimize.block_sparse` lays them out), real tokens before padding in each; `sizes` counts
the real ones of every key chunk. `optimize.block_sparse` has the same in plain PyTorch, which is the definition.

A query tile reads the keys that it attends to from the L2 cache, once per tile: 64 rows do 64 FLOP per byte, 128 rows
128. At about 5.5 TB/s of an H100's L2 cache no kernel can exceed some 350 TFLOP/s with query chunks of 64 tokens; with
chunks of 128 it can, also over key chunks of 64.

FlashAttention-4 (4.0.0b36) takes lists of key blocks as well. On compute capability 9.0 its query tile of 128 rows
becomes 64 if 128 does not divide the sparse block, and its key tile is the sparse block itself, a multiple of 16 up to
128, so chunks of 64 and of 128 tokens both work. On 10.x two query tiles of 128 go together, so sparse blocks are
multiples of 256 rows; on 8.x and 12.x it has no block sparsity. It has no mask except one that is compiled in, so grids
that chunks do not divide are refused.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..operators import operator
from ..requirement import Requirement
from . import sparse_fp8
from .jit import jit, tl, triton

if triton is not None:
    from triton.tools.tensor_descriptor import TensorDescriptor

# Rows of scores that one program ranks in registers.
MAX_CHUNKS = 1 << 15
# Shared memory of a program on consumer cards (compute capability 8.6, 8.9, 12.0).
CONSUMER_SHARED_BYTES = 101_376


class Tiles(NamedTuple):
    """How the attention kernel runs.

    rows, columns: of a query tile and of a key tile. stages: Triton's; since the lists are loaded ahead as well,
    (stages + 1) // 2 key tiles are in memory at a time, at least two. tma: key tiles are fetched by the tensor memory
    accelerator (9.0 and newer).
    """

    rows: int
    columns: int
    warps: int
    stages: int
    tma: bool

    def shared_bytes(self, dim: int) -> int:
        """Shared memory for the query tile and the key and value tiles in flight, in 16 bits."""
        buffers = max(2, (self.stages + 1) // 2)
        return 2 * dim * (self.rows + 2 * buffers * self.columns)


def _divisor(tokens: int, most: int) -> int:
    """The largest power of two that divides `tokens`, at most `most`."""
    return min(tokens & -tokens, most)


def choose_tiles(capability: tuple[int, int], q_chunk: int, k_chunk: int) -> Tiles:
    """Tiles for chunks of these numbers of tokens; all except those of 9.0 and 10.x fit consumer cards."""
    rows, columns = _divisor(q_chunk, 128), _divisor(k_chunk, 64)
    warps = 8 if rows == 128 else 4
    if capability[0] in (9, 10):
        # Measured on an H100: three or four key tiles in flight are worth more than a second program per processor.
        return Tiles(rows, columns, warps, 5 if rows == 128 else 7, True)
    return Tiles(rows, columns, warps, 2, False)


NEEDS = {
    "triton": Requirement(triton=True, head_dims=(64, 128), backward=False),
    "fa4": Requirement(
        *((9, 0), "flash_attn.cute.block_sparsity", "BlockSparseTensorsTorch.block_size"),
        exactly=True,
        triton=True,
        head_dims=(64, 128),
        backward=False,
    ),
    "cudnn-fp8": sparse_fp8.NEEDS,
}


def refuses(kernel: str, q_chunk: int, k_chunk: int, padded: bool) -> str:
    """Why a kernel does not take query and key chunks of these numbers of tokens, or "".

    padded: whether some slots are padding.
    """
    if kernel == "triton":
        least = min(_divisor(q_chunk, 128), _divisor(k_chunk, 128))
        return "" if least >= 16 else f"chunks of {q_chunk} and {k_chunk} tokens are not multiples of 16"
    if padded:
        return "the chunks do not divide the grid, and it has no mask"
    if kernel == "cudnn-fp8":
        return "" if q_chunk == k_chunk == 64 else f"it takes chunks of 64 tokens, not {q_chunk} and {k_chunk}"
    if q_chunk % 64 or k_chunk % 16 or k_chunk > 128:
        return f"its query chunks are multiples of 64 tokens, its key chunks of 16 up to 128, not {q_chunk}, {k_chunk}"
    return ""


# --- kernels ---------------------------------------------------------------------------------------------------------


@jit
def _pool(x, sizes, out, tokens, heads, chunks, stride, CHUNK: tl.constexpr, PART: tl.constexpr, DIM: tl.constexpr):
    """Mean of the real tokens of one chunk, which consists of parts of PART slots with `sizes` real ones each."""
    # Heads side by side, so that programs that run together read whole tokens.
    head, chunk, sample = tl.program_id(0) % heads, tl.program_id(0) // heads, tl.program_id(1)
    channel = tl.arange(0, DIM)[None, :]
    total = tl.zeros((1, DIM), dtype=tl.float32)
    count = 0
    for part in range(CHUNK // PART):
        size = tl.load(sizes + chunk * (CHUNK // PART) + part)
        count += size
        first = sample.to(tl.int64) * tokens + chunk * CHUNK + part * PART
        for start in range(0, PART, 16):
            slot = start + tl.arange(0, 16)[:, None]
            at = (first + slot) * stride + head * DIM + channel
            value = tl.load(x + at, mask=slot < size, other=0.0).to(tl.float32)
            total += tl.sum(value, axis=0, keep_dims=True)
    at = ((sample * heads + head).to(tl.int64) * chunks + chunk) * DIM + channel
    tl.store(out + at, (total / tl.maximum(count, 1)).to(out.dtype.element_ty))


@jit
def _paired(x):
    """Each two neighbors of x, 16 bits in 32, in one word, the first in its low half."""
    low, high = tl.split(tl.reshape(x, (x.shape[0] // 2, 2)))
    return low | (high << 16)


@jit
def _parted(x):
    """The reverse for the lowest bit of each half."""
    return tl.reshape(tl.join(x & 1, (x >> 16) & 1), (2 * x.shape[0],)) > 0


@jit
def largest(bits, inside, keep):
    """Which entries of a row are the `keep` largest of those `inside`, of equal ones the first, and their places.

    bits: 16-bit floats read as int16. Places, from 0, are in the order of the row. The kernel is bound by arithmetic on
    whole numbers, so a word holds two entries: a comparison subtracts, and leaves its result in the half's first bit.
    """
    there = _paired(tl.where(inside, 0xFFFF, 0).to(tl.uint32))
    rank = _paired(bits.to(tl.uint16, bitcast=True).to(tl.uint32))
    # In the order of the floats: 0 for the least, 65535 for the greatest, and -0 as 0.
    rank &= ((rank & 0x7FFF7FFF) + 0x7FFF7FFF) | 0x7FFF7FFF
    rank = (rank ^ (((rank >> 15) & 0x10001) * 0xFFFF | 0x80008000)) & there
    # The greatest number that at least `keep` scores reach, bit by bit. With the first bit known, 15 are left.
    upper = (rank >> 15) & 0x10001
    count = tl.sum(upper, axis=0)
    positive = (count & 0xFFFF) + (count >> 16) >= keep
    rank = tl.where(positive, rank & (upper * 0x7FFF), rank | (upper * 0x7FFF)) | 0x80008000
    there = tl.where(positive, upper, there & 0x10001)
    least = tl.zeros((), tl.uint32)
    for step in range(15):
        more = least + (16384 >> step)
        count = tl.sum(((rank - more * 0x10001) >> 15) & 0x10001, axis=0)
        least = tl.where((count & 0xFFFF) + (count >> 16) >= keep, more, least)
    above = ((rank - (least + 1) * 0x10001) >> 15) & there
    equal = (((rank - least * 0x10001) >> 15) & there) - above
    # How many of both kinds lie before each entry, in the halves of one word.
    both = ((above + (above >> 16)) & 3) + (equal << 16) + (equal & 0x30000)
    before = tl.cumsum(both, axis=0) - both
    room = keep - (tl.sum(both, axis=0) & 0xFFFF)
    before = tl.join(before, before + ((above & 1) | (equal << 16)))
    before = tl.reshape(before, bits.shape)
    ties = before >> 16
    chosen = _parted(above) | (_parted(equal) & (ties < room))
    return chosen, (before & 0xFFFF) + tl.minimum(ties, room)


@jit
def _top_k(scores, sizes, out, chunks, keep, PADDED: tl.constexpr, WIDTH: tl.constexpr):
    """The `keep` largest of a row of 16-bit floats read as int16, of equal ones the first, in ascending order."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < chunks
    bits = tl.load(scores + row * chunks + column, mask=inside, other=0)
    if PADDED:
        inside = inside & (tl.load(sizes + column, mask=inside, other=0) > 0)
    chosen, place = largest(bits, inside, keep)
    tl.store(out + row * keep + place, column, mask=chosen)


@jit
def _load_tile(x, row, column, stride, ROWS: tl.constexpr, DIM: tl.constexpr, TMA: tl.constexpr):
    if TMA:
        tile = x.load([row, column])
    else:
        rows = (row + tl.arange(0, ROWS)).to(tl.int64)
        tile = tl.load(x + rows[:, None] * stride + column + tl.arange(0, DIM)[None, :])
    return tile


@jit
def _attend(
    q, k, v, out, sums, indices, counts, sizes, q_tokens, k_tokens, heads, width, q_stride, k_stride, v_stride, scale,
    Q_CHUNK: tl.constexpr, K_CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DIM: tl.constexpr,
    PADDED: tl.constexpr, TMA: tl.constexpr, SUMS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """One query tile over the key chunks in its list. scale: softmax scale times log2(e).

    SUMS: the log-sum-exp is stored too. RAGGED: the last query chunk is short.
    """
    tile = tl.program_id(0)
    sample = tl.program_id(1) // heads
    column = (tl.program_id(1) % heads) * DIM
    token = tile * ROWS + tl.arange(0, ROWS)
    rows = sample.to(tl.int64) * q_tokens + token
    at = rows[:, None] * q_stride + column + tl.arange(0, DIM)[None, :]
    if RAGGED:
        query = tl.load(q + at, mask=token[:, None] < q_tokens, other=0.0)
    else:
        query = tl.load(q + at)
    entry = tl.program_id(1) * tl.cdiv(q_tokens, Q_CHUNK) + tile // (Q_CHUNK // ROWS)
    indices += entry.to(tl.int64) * width
    TILES: tl.constexpr = K_CHUNK // COLUMNS
    total = tl.load(counts + entry) * TILES
    base = sample * k_tokens

    top = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    weight = tl.zeros((ROWS,), dtype=tl.float32)
    acc = tl.zeros((ROWS, DIM), dtype=tl.float32)
    for i in range(total):
        chunk = tl.load(indices + i // TILES)
        inner = (i % TILES) * COLUMNS
        row = base + chunk * K_CHUNK + inner
        score = tl.dot(query, tl.trans(_load_tile(k, row, column, k_stride, COLUMNS, DIM, TMA)))
        if PADDED:
            left = tl.load(sizes + chunk) - inner
            score = tl.where(tl.arange(0, COLUMNS)[None, :] < left, score, float("-inf"))
        new = tl.maximum(top, tl.max(score, 1))
        shrink = tl.exp2((top - new) * scale)
        p = tl.exp2(score * scale - (new * scale)[:, None])
        weight = weight * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        value = _load_tile(v, row, column, v_stride, COLUMNS, DIM, TMA)
        acc = tl.dot(p.to(value.dtype), value, acc)
        top = new
    at = rows[:, None] * (heads * DIM) + column + tl.arange(0, DIM)[None, :]
    result = (acc / weight[:, None]).to(out.dtype.element_ty)
    if RAGGED:
        tl.store(out + at, result, mask=token[:, None] < q_tokens)
    else:
        tl.store(out + at, result)
    if SUMS:
        found = (top * scale + tl.log2(weight)) * 0.6931471805599453
        tl.store(sums + tl.program_id(1).to(tl.int64) * q_tokens + token, found, mask=token < q_tokens)


def _matrix(x: Tensor) -> Tensor:
    """x [B, N, heads, head_dim] with all tokens as rows of one matrix; a slice of a projection is not copied."""
    dense = x.stride()[2:] == (x.shape[3], 1) and (x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1))
    # Loads and the tensor memory accelerator work on 16 bytes.
    aligned = x.stride(1) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
    return x if dense and aligned else x.contiguous()


def _descriptor(x: Tensor, rows: int) -> Any:
    batch, tokens, heads, dim = x.shape
    return TensorDescriptor(x, [batch * tokens, heads * dim], [x.stride(1), 1], [rows, dim])


def launch_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    sizes: Tensor,
    q_chunk: int,
    padded: bool,
    tiles: Tiles,
    sums: Tensor | None = None,
    k_chunk: int = 0,
) -> Tensor:
    """`attend_chunks` with these tiles, outside of graphs.

    sums: takes the log-sum-exp [B, heads, Nq] in fp32. k_chunk: slots of a key chunk; if it is given, the last query
    chunk may be short, and so may the last key chunk, which no list may name.
    """
    q, k, v = _matrix(q), _matrix(k), _matrix(v)
    batch, q_tokens, heads, dim = q.shape
    k_tokens, k_chunk = k.shape[1], k_chunk or k.shape[1] // len(sizes)
    out = q.new_empty(q.shape)
    read = (_descriptor(k, tiles.columns), _descriptor(v, tiles.columns)) if tiles.tma else (k, v)
    _attend[(triton.cdiv(q_tokens, tiles.rows), batch * heads)](
        *(q, *read, out, sums, indices, counts, sizes, q_tokens, k_tokens, heads, indices.shape[-1]),
        *(q.stride(1), k.stride(1), v.stride(1), dim**-0.5 * math.log2(math.e)),
        Q_CHUNK=q_chunk,
        K_CHUNK=k_chunk,
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        DIM=dim,
        PADDED=padded,
        TMA=tiles.tma,
        SUMS=sums is not None,
        RAGGED=q_tokens % q_chunk > 0,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return out


def _fake_pool(x: Tensor, sizes: Tensor, chunk: int) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1] // chunk, x.shape[3])


def _fake_top(scores: Tensor, sizes: Tensor, keep: int, padded: bool) -> Tensor:
    return scores.new_empty((*scores.shape[:-1], keep), dtype=torch.int32)


@operator("pool_chunks", _fake_pool)
def pool_chunks(x: Tensor, sizes: Tensor, chunk: int) -> Tensor:
    """Means over the real tokens of chunks: x [B, N, heads, head_dim] -> [B, heads, N/chunk, head_dim], same dtype.

    sizes [n] int32: real tokens of every N/n slots; chunks consist of such parts. fp32 inside.
    """
    x, out = _matrix(x), _fake_pool(x, sizes, chunk)
    batch, tokens, heads, dim = x.shape
    part, chunks = tokens // len(sizes), tokens // chunk
    _pool[(heads * chunks, batch)](
        *(x, sizes, out, tokens, heads, chunks, x.stride(1)), CHUNK=chunk, PART=part, DIM=dim, num_warps=2
    )
    return out


@operator("top_chunks", _fake_top)
def top_chunks(scores: Tensor, sizes: Tensor, keep: int, padded: bool) -> Tensor:
    """Indices of the `keep` best key chunks, ascending: scores [.., n] in 16 bits -> [.., keep] int32.

    Of equal scores the first win. padded: chunks with sizes [n] of 0 are skipped; at least `keep` must remain. n is at
    most MAX_CHUNKS.
    """
    scores, out = scores.contiguous(), _fake_top(scores, sizes, keep, padded)
    chunks = scores.shape[-1]
    width = max(2, 1 << (chunks - 1).bit_length())
    _top_k[(scores.numel() // chunks,)](
        *(scores.view(torch.int16), sizes, out, chunks, keep),
        PADDED=padded,
        WIDTH=width,
        num_warps=min(16, max(1, width // 1024)),
    )
    return out


@operator("attend_chunks", lambda q, *_: q.new_empty(q.shape))
def _attend_op(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, sizes: Tensor, q_chunk: int, padded: bool
) -> Tensor:
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else (0, 0)
    tiles = choose_tiles(capability, q_chunk, k.shape[1] // len(sizes))
    return launch_attend(q, k, v, indices, counts, sizes, q_chunk, padded, tiles)


def launch_flash4(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, block_size: tuple[int, int], sums: bool = False
) -> tuple[Tensor, Tensor]:
    """FlashAttention-4 over lists of key blocks, outside of graphs: its output and, with `sums`, the log-sum-exp.

    block_size: tokens of a query block and of a key block. For the other arguments see `attend_chunks`.
    """
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import _flash_attn_fwd

    # Its two lists hold blocks with and without a mask; the first is empty here but required.
    lists = BlockSparseTensorsTorch(
        mask_block_cnt=torch.zeros_like(counts),
        mask_block_idx=torch.zeros_like(indices[..., :1]),
        full_block_cnt=counts,
        full_block_idx=indices,
        block_size=block_size,
    )
    return _flash_attn_fwd(q, k, v, block_sparse_tensors=lists, return_lse=sums)[:2]


@operator("attend_chunks_flash4", lambda q, *_: q.new_empty(q.shape))
def _flash4_op(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, sizes: Tensor, q_chunk: int, padded: bool
) -> Tensor:
    block_size = q_chunk, k.shape[1] // len(sizes)
    return launch_flash4(_matrix(q), _matrix(k), _matrix(v), indices, counts, block_size)[0]


def _fake_heads(q: Tensor, *_: object) -> Tensor:
    batch, tokens, heads, dim = q.shape
    return q.new_empty((batch, heads, tokens, dim)).transpose(1, 2)


@operator("attend_chunks_cudnn_fp8", _fake_heads)
def _cudnn_fp8_op(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, sizes: Tensor, q_chunk: int, padded: bool
) -> Tensor:
    return sparse_fp8.attend_fp8(q, k, v, indices, indices.shape[-1])[0].transpose(1, 2)


_ATTEND = {"triton": _attend_op, "fa4": _flash4_op, "cudnn-fp8": _cudnn_fp8_op}


def attend_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    sizes: Tensor,
    q_chunk: int,
    padded: bool,
    kernel: str = "triton",
) -> Tensor:
    """Attention of each query chunk to the key chunks listed for it, scale head_dim^-0.5 -> [B, Nq, heads, head_dim].

    q [B, Nq, heads, head_dim], k and v [B, Nk, heads, head_dim] in 16 bits, chunk after chunk. indices [B, heads,
    Nq/q_chunk, w] int32 with counts [B, heads, Nq/q_chunk] int32 of at least 1. sizes [n] int32: real tokens of each
    of the n key chunks, which come first in it; read only if `padded`. kernel: a name in NEEDS; `cudnn-fp8` computes in
    8 bits and takes whole lists; it does not read counts, and a head's tokens lie side by side in what it returns.
    """
    return _ATTEND[kernel](q, k, v, indices, counts, sizes, q_chunk, padded)
