"""Block-sparse attention: every chunk of the video attends to the few chunks that matter most to it.

Tokens of a grid (frames, rows, columns) are laid out chunk after chunk; a chunk is a small box of the grid. Queries and
keys are averaged over chunks, the products of the averages are scores, and each query chunk attends in full to the key
chunks with the best scores. Grids that the chunks do not divide are padded: padding comes last in its chunk, is never
a key and does not enter an average.

The layout is made once per grid. Tokens, RoPE tables and cached keys are arranged by it before the first block, so that
the blocks need no permutation: see `ChunkLayout`.

This is the plain PyTorch version, which runs anywhere and defines what `optimize.kernels.block_sparse` computes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import BackendUnavailable, LongCatError, check_choice, is_number, is_whole, plain_fields
from ..model.rope import rope_table
from ..model.transformer import ArrangedCache, BlockCache, FrameLayout
from .attention import Attend, Kernels
from .kernels import block_sparse as kernels
from .requirement import Inputs, trial

Shape = tuple[int, int, int]
Kernel = Literal["auto", "triton", "fa4", "cudnn-fp8", "plain"]
KERNELS = ("auto", "triton", "fa4", "cudnn-fp8", "plain")
# What `auto` tries, fastest first; the first only where 8 bits are allowed.
_AUTO = ("cudnn-fp8", "fa4", "triton")
# Memory of the keys and values that the plain version gathers at a time, and of the scores that it sorts.
_GATHERED_BYTES, _SORTED_BYTES = 1 << 27, 1 << 28


@dataclass(frozen=True)
class BlockSparse:
    """Settings of block-sparse attention. The defaults are the released model's at 720p.

    sparsity
        The share of key chunks that are left out: a query chunk keeps int((1 - sparsity) * n) of n, at least one.
    cdf_threshold
        Keep the best chunks while the softmax over all scores (times head_dim^-0.5) sums to no more than this. If a
        sparsity is set too, the setting that keeps more chunks decides.
    chunk
        Frames, rows and columns of a key chunk, in tokens.
    query_chunk
        The same of a query chunk, multiples of `chunk`; None: as `chunk`. All tokens of a query chunk attend to the
        same keys; query chunks of 128 tokens run faster than those of 64.
    kernel
        `triton`, `fa4` (FlashAttention-4), `cudnn-fp8` (8 bits, lossy), `plain` (PyTorch), or `auto`: the fastest that
        runs, `cudnn-fp8` only if the network's layers run in 8 bits as well.
    """

    sparsity: float | None = 0.9375
    cdf_threshold: float | None = None
    chunk: Shape = (4, 4, 4)
    query_chunk: Shape | None = None
    kernel: Kernel = "auto"

    def __post_init__(self) -> None:
        plain_fields(self)
        if self.sparsity is None and self.cdf_threshold is None:
            raise LongCatError("block-sparse attention has neither a sparsity nor a cdf_threshold; give one of them")
        for name, low in (("sparsity", 0.0), ("cdf_threshold", 0.0)):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and low <= value <= 1):
                raise LongCatError(f"block-sparse {name} is {value}; it must lie between 0 and 1")
        for name in ("chunk", "query_chunk"):
            value = getattr(self, name)
            if value is None and name == "query_chunk":
                continue
            sides = isinstance(value, list | tuple) and len(value) == 3
            if not sides or not all(is_whole(n) and n >= 1 for n in value):
                raise LongCatError(f"block-sparse {name} is {value}; it must be three whole numbers of at least 1")
            object.__setattr__(self, name, tuple(int(n) for n in value))
        if any(q % k for q, k in zip(self.queries, self.chunk, strict=True)):
            raise LongCatError(f"block-sparse query_chunk {self.queries} must be a multiple of the chunk {self.chunk}")
        check_choice("block-sparse kernel", self.kernel, KERNELS)

    @property
    def queries(self) -> Shape:
        """The query chunk in force."""
        return self.query_chunk or self.chunk

    @staticmethod
    def applies(frames: int) -> bool:
        """Whether attention to this many latent frames, conditioning frames included, is block-sparse."""
        return frames > 1

    def kept(self, chunks: int) -> int:
        """How many of `chunks` key chunks the sparsity keeps; 0 without a sparsity."""
        return 0 if self.sparsity is None else max(1, int((1 - self.sparsity) * chunks))


# --- the layout ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ChunkLayout:
    """Where the tokens of a grid lie, chunk after chunk; made and cached by `chunk_layout`.

    Conditioning frames come first and share no chunk with the noise frames. Query chunks are in the order of frames,
    rows, columns, and so are the key chunks in them. Slots of padding repeat a token of their chunk.

    All query chunks of the same frames form a slab: tokens [B, slots, C] become [B, slabs, slots/slabs, C], and the
    rest of the network treats slabs as frames. All frames of a slab have the same timestep, that of `slab_frames`.

    grid: tokens in frames, rows, columns. order: [slots] int64, the token in each slot. places: [N] int64, the slot of
    each token. sizes: [key chunks] int32, the number of real tokens in each. used: number of key chunks with real
    tokens; cond_used, cond_slots, cond_slabs: the conditioning frames' share. q_chunk, k_chunk: slots of a query chunk
    and of a key chunk. slab_frames: [slabs] int64, the first frame of each. padded: whether any slot is padding.
    """

    grid: Shape
    order: Tensor
    places: Tensor
    sizes: Tensor
    slab_frames: Tensor
    used: int
    q_chunk: int
    k_chunk: int
    cond_used: int
    cond_slots: int
    cond_slabs: int
    padded: bool

    @property
    def slots(self) -> int:
        return self.order.shape[0]

    @property
    def slabs(self) -> int:
        return self.slab_frames.shape[0]

    def arrange(self, x: Tensor, dim: int = 1) -> Tensor:
        """Tokens in (frames, rows, columns) order along `dim`, arranged: N becomes slots. A copy."""
        return x.index_select(dim, self.order)

    def restore(self, x: Tensor, dim: int = 1) -> Tensor:
        """The reverse: slots become N, padding is dropped. A copy."""
        return x.index_select(dim, self.places)


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # a layout made while sampling serves training too
def chunk_layout(
    grid: Shape, chunk: Shape, query_chunk: Shape | None = None, cond_frames: int = 0, device: Any = "cpu"
) -> ChunkLayout:
    """The layout of a grid (frames, rows, columns) of tokens whose first `cond_frames` are conditioning frames."""
    frames, height, width = grid
    query = query_chunk or chunk
    if not 0 <= cond_frames <= frames:
        raise LongCatError(f"{cond_frames} conditioning frames in a grid of {frames} frames; give at most that many")
    k_chunk, q_chunk = math.prod(chunk), math.prod(query)
    orders, counts, firsts, per_part = [], [], [], []
    for start, stop in ((0, cond_frames), (cond_frames, frames)):
        if start == stop:
            per_part.append((0, 0, 0))
            continue
        tokens = torch.arange(start * height * width, stop * height * width).view(stop - start, height, width)
        short = [-size % step for size, step in zip(tokens.shape, query, strict=True)]
        boxes = F.pad(tokens, (0, short[2], 0, short[1], 0, short[0]), value=-1)
        # Split each axis into query chunks, key chunks in them, and tokens in these.
        for axis in (0, 1, 2):
            boxes = boxes.unflatten(3 * axis, (-1, query[axis] // chunk[axis], chunk[axis]))
        boxes = boxes.permute(0, 3, 6, 1, 4, 7, 2, 5, 8).reshape(-1, k_chunk)
        missing = boxes < 0
        boxes = boxes.gather(1, missing.to(torch.int8).argsort(dim=1, stable=True))
        # The first slot of a query chunk always holds a token.
        spare = boxes.view(-1, q_chunk)[:, :1].repeat_interleave(q_chunk // k_chunk, 0)
        boxes = torch.where(boxes < 0, torch.where(boxes[:, :1] < 0, spare, boxes[:, :1]), boxes)
        size = (~missing).sum(1)
        orders.append(boxes.flatten())
        counts.append(size)
        firsts.append(torch.arange(start, stop, query[0]))
        per_part.append((int((size > 0).sum()), boxes.numel(), len(firsts[-1])))
    order, sizes = torch.cat(orders), torch.cat(counts).to(torch.int32)
    real = torch.arange(k_chunk)[None] < sizes[:, None]
    slots = real.flatten().nonzero()[:, 0]
    places = torch.empty(math.prod(grid), dtype=torch.int64).scatter_(0, order[slots], slots)
    (cond_used, cond_slots, cond_slabs), (used, _, _) = per_part
    return ChunkLayout(
        grid=grid,
        order=order.to(device),
        places=places.to(device),
        sizes=sizes.to(device),
        slab_frames=torch.cat(firsts).to(device),
        used=cond_used + used,
        q_chunk=q_chunk,
        k_chunk=k_chunk,
        cond_used=cond_used,
        cond_slots=cond_slots,
        cond_slabs=cond_slabs,
        padded=bool((sizes < k_chunk).any()),
    )


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def chunked_rope_table(head_dim: int, layout: ChunkLayout, start_frame: int, device: Any) -> tuple[Tensor, Tensor]:
    """`rope_table` of the layout's grid, arranged: cosines and sines, each [slots, head_dim/2] fp32."""
    cos, sin = rope_table(head_dim, *layout.grid, start_frame, torch.device(device))
    return layout.arrange(cos, 0), layout.arrange(sin, 0)


class ChunkedLayout(FrameLayout):
    """Tokens chunk after chunk: the blocks see slabs instead of frames.

    tokens: the layout of x; keys: of all keys, including those of cached frames in front of x; before: of the cached
    keys alone, or None.
    """

    def __init__(self, tokens: ChunkLayout, keys: ChunkLayout, before: ChunkLayout | None) -> None:
        self.tokens, self.keys, self.before = tokens, keys, before

    @classmethod
    def of(cls, grid: Shape, settings: BlockSparse, num_cond: int, start: int, device: Any) -> ChunkedLayout:
        """The layout of a grid behind `start` cached frames; num_cond: conditioning frames at its front."""
        shapes = settings.chunk, settings.query_chunk
        tokens = chunk_layout(grid, *shapes, num_cond, device)
        if not start:
            return cls(tokens, tokens, None)
        keys = chunk_layout((start + grid[0], *grid[1:]), *shapes, start, device)
        return cls(tokens, keys, chunk_layout((start, *grid[1:]), *shapes, 0, device))

    def sizes(self, grid: tuple[int, ...]) -> tuple[int, int]:
        return self.tokens.slabs, self.tokens.slots // self.tokens.slabs

    def arrange(self, tokens: Tensor) -> Tensor:
        return self.tokens.arrange(tokens.flatten(1, 2)).unflatten(1, (self.tokens.slabs, -1))

    def restore(self, tokens: Tensor) -> Tensor:
        return self.restore_rows(tokens.flatten(1, 2)).unflatten(1, (self.tokens.grid[0], -1))

    def restore_rows(self, rows: Tensor) -> Tensor:
        return self.tokens.restore(rows)

    def rope(self, head_dim: int, grid: tuple[int, ...], start: int, device: torch.device) -> tuple[Tensor, Tensor]:
        return chunked_rope_table(head_dim, self.tokens, start, device)

    def per_frame(self, temb: Tensor) -> Tensor:
        return temb if temb.shape[1] == 1 else temb[:, self.tokens.slab_frames]

    def mixes(self, timestep: Tensor) -> bool:
        """Whether a slab has frames of several timesteps. timestep: [B or 1] or [B or 1, T or 1]."""
        frames, first = timestep.shape[-1], self.tokens.slab_frames.to(timestep.device)
        slabs = torch.bucketize(torch.arange(frames, device=first.device), first, right=True) - 1
        return timestep.ndim == 2 and frames > 1 and bool((timestep != timestep[:, first[slabs]]).any())

    def leading(self, frames: int) -> int:
        # The layout was made for exactly these conditioning frames.
        return self.tokens.cond_slabs

    def cached(self, cache: BlockCache) -> BlockCache:
        return cache if self.before is None else ArrangedCache(cache, self.before.arrange)


# --- which chunks ----------------------------------------------------------------------------------------------------


def pool_chunks(x: Tensor, sizes: Tensor, chunk: int) -> Tensor:
    """Means over the real tokens of chunks: x [B, N, heads, head_dim] -> [B, heads, N/chunk, head_dim], same dtype.

    sizes [n] int32: real tokens of every N/n slots, where they come first; chunks consist of such parts.
    """
    part = x.shape[1] // len(sizes)
    real = torch.arange(part, device=x.device) < sizes[:, None]
    # Summed in fp32 without a copy in fp32.
    summed = torch.where(real[..., None, None], x.unflatten(1, (-1, part)), 0).sum(2, dtype=torch.float32)
    summed = summed.unflatten(1, (-1, chunk // part)).sum(2)
    counts = sizes.view(-1, chunk // part).sum(1).clamp(min=1)
    return (summed / counts[:, None, None]).to(x.dtype).transpose(1, 2)


def chunk_scores(q: Tensor, k: Tensor) -> Tensor:
    """Products of means: q [B, heads, nq, D], k [B, heads, nk, D] -> [B, heads, nq, nk], rounded to their dtype."""
    if q.is_cuda:
        return q @ k.transpose(-1, -2)
    return (q.float() @ k.float().transpose(-1, -2)).to(q.dtype)


def select_chunks(
    scores: Tensor, settings: BlockSparse, sizes: Tensor, used: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The key chunks of every query chunk, ascending: scores [.., nk] -> indices [.., w] and counts [..], int32.

    Entries past a row's count are arbitrary. Of equal scores the first chunk wins. sizes [nk]: chunks of size 0 are
    skipped; used: number of the others; scale: of the softmax for cdf_threshold.
    """
    keep, width = settings.kept(used), scores.shape[-1]
    found = []
    # Sorting takes about forty bytes per score, so only some rows are sorted at a time.
    for rows in scores.flatten(0, -2).split(max(1, _SORTED_BYTES // (40 * width))):
        ranked = torch.sort(rows.masked_fill(sizes == 0, -math.inf), dim=-1, descending=True, stable=True)
        if settings.cdf_threshold is None:
            counts = torch.full(rows.shape[:1], keep, dtype=torch.int32, device=rows.device)
            indices = ranked.indices[:, :keep].sort(dim=-1).values
        else:
            mass = (ranked.values.float() * scale).softmax(-1).cumsum(-1)
            # Rounding may lift the sum of all above 1.
            limit = settings.cdf_threshold if settings.cdf_threshold < 1 else math.inf
            counts = (mass <= limit).sum(-1, dtype=torch.int32).clamp(min=max(1, keep), max=used)
            past = torch.arange(width, device=rows.device) >= counts[:, None]
            indices = ranked.indices.masked_fill(past, width).sort(dim=-1).values.clamp(max=width - 1)
        found.append((indices.to(torch.int32), counts))
    indices, counts = (torch.cat(parts) for parts in zip(*found, strict=True))
    return indices.view(*scores.shape[:-1], -1), counts.view(scores.shape[:-1])


# --- attention over them ---------------------------------------------------------------------------------------------


def attend_plain(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, sizes: Tensor, q_chunk: int, padded: bool
) -> Tensor:
    """`kernels.block_sparse.attend_chunks` in PyTorch, for any dtype and with gradients.

    Keys and values are gathered for some query chunks at a time, which bounds memory.
    """
    batch, _, heads, dim = q.shape
    k_chunk = k.shape[1] // len(sizes)
    queries = q.unflatten(1, (-1, q_chunk)).permute(0, 3, 1, 2, 4)
    keys, values = (x.unflatten(1, (-1, k_chunk)).permute(0, 3, 1, 2, 4) for x in (k, v))
    width = indices.shape[-1]
    step = max(1, _GATHERED_BYTES // (2 * width * k_chunk * dim * q.element_size() * heads))
    slot = torch.arange(k_chunk, device=q.device)
    head = torch.arange(heads, device=q.device)[:, None, None]
    samples = []
    for b in range(batch):
        outs = []
        for first in range(0, queries.shape[2], step):
            some = indices[b, :, first : first + step].long()
            picked_k, picked_v = (x[b][head, some].flatten(2, 3) for x in (keys, values))
            mask = (torch.arange(width, device=q.device) < counts[b, :, first : first + step, None])[..., None]
            if padded:
                mask = mask & (slot < sizes[some][..., None])
            mask = mask.expand(*mask.shape[:-1], k_chunk).flatten(2)[:, :, None]
            outs.append(F.scaled_dot_product_attention(queries[b, :, first : first + step], picked_k, picked_v, mask))
        samples.append(torch.cat(outs, dim=1))
    return torch.stack(samples).permute(0, 2, 3, 1, 4).flatten(1, 2)


# Chunks of a trial, and the relative error that is accepted, which is 0.02 for all other kernels.
_TRIAL_CHUNKS, _TOLERANCES = 4, {"cudnn-fp8": 0.1}


@cache
def tried(kernel: str, device: torch.device, dtype: torch.dtype, dim: int, q_chunk: int, k_chunk: int) -> str:
    """Why a kernel does not work on `device`, tried on a few chunks, or ""; its package may be of another version."""
    chunks, picked = _TRIAL_CHUNKS, _TRIAL_CHUNKS // 2
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn((1, chunks * chunk, 2, dim), generator=generator, device=device).to(dtype)
        for chunk in (q_chunk, k_chunk, k_chunk)
    )
    indices = torch.arange(chunks, device=device)[:, None] // 2 + torch.arange(picked, device=device)
    indices = indices.to(torch.int32).expand(1, 2, -1, -1).contiguous()
    counts = torch.full(indices.shape[:-1], picked, dtype=torch.int32, device=device)
    sizes = torch.full((chunks,), k_chunk, dtype=torch.int32, device=device)

    def run() -> tuple[Tensor, Tensor]:
        out = kernels.attend_chunks(q, k, v, indices, counts, sizes, q_chunk, False, kernel).float()
        return out, attend_plain(q.float(), k.float(), v.float(), indices, counts, sizes, q_chunk, False)

    return trial(run, _TOLERANCES.get(kernel, 0.02))


def choose_kernel(
    settings: BlockSparse, q: Tensor, q_chunk: int, k_chunk: int, padded: bool, eight_bit: bool = False
) -> str:
    """The name of the kernel for such queries. eight_bit: `auto` may take one that computes in 8 bits.

    Raises BackendUnavailable if a kernel chosen by name cannot run.
    """
    if settings.kernel == "plain":
        return "plain"
    reason = ""
    for name in _AUTO[not eight_bit :] if settings.kernel == "auto" else (settings.kernel,):
        reason = kernels.NEEDS[name].why_not(Inputs.of(q)) or kernels.refuses(name, q_chunk, k_chunk, padded)
        if name == "cudnn-fp8" and settings.cdf_threshold is not None:
            reason = reason or "a cdf_threshold makes lists of different lengths, and it takes those of one length"
        if name != "triton" and not reason and not torch.compiler.is_compiling():
            reason = tried(name, q.device, q.dtype, q.shape[-1], q_chunk, k_chunk)
        if not reason:
            return name
    if settings.kernel == "auto":
        return "plain"
    raise BackendUnavailable(f"block-sparse kernel {name!r} cannot run here: {reason}; choose 'auto' or 'plain'")


def attend_arranged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    settings: BlockSparse,
    *,
    sizes: Tensor,
    used: int,
    q_sizes: Tensor,
    q_chunk: int,
    padded: bool,
    eight_bit: bool = False,
) -> Tensor:
    """Block-sparse attention of arranged tokens: q [B, Nq, heads, head_dim], k and v [B, Nk, ..] -> as q.

    sizes [nk] int32: real tokens of each key chunk; used: number of chunks with any; q_sizes: as sizes, of the parts
    that query chunks consist of; q_chunk: slots of a query chunk; padded: whether any slot is padding; eight_bit: see
    `choose_kernel`.
    """
    kernel = choose_kernel(settings, q, q_chunk, k.shape[1] // len(sizes), padded, eight_bit)
    fused = kernel != "plain"
    pool = kernels.pool_chunks if fused else pool_chunks
    # The choice of chunks has no gradient.
    with torch.no_grad():
        scores = chunk_scores(pool(q, q_sizes, q_chunk), pool(k, sizes, k.shape[1] // len(sizes)))
        if fused and settings.cdf_threshold is None and scores.shape[-1] <= kernels.MAX_CHUNKS:
            indices = kernels.top_chunks(scores, sizes, settings.kept(used), padded)
            counts = torch.full(indices.shape[:-1], indices.shape[-1], dtype=torch.int32, device=q.device)
        else:
            indices, counts = select_chunks(scores, settings, sizes, used, q.shape[-1] ** -0.5)
        del scores
    if fused:
        return kernels.attend_chunks(q, k, v, indices, counts, sizes, q_chunk, padded, kernel)
    return attend_plain(q, k, v, indices, counts, sizes, q_chunk, padded)


def block_sparse_attend(layout: ChunkLayout, settings: BlockSparse, eight_bit: bool = False) -> Attend:
    """Block-sparse attention under the signature of an attention backend, for tokens arranged by `layout`.

    eight_bit: see `choose_kernel`.

    The number of tokens of q and k [B, N, heads, head_dim] says which ones they are: if there are as many keys as the
    conditioning frames have slots, both belong to these frames; otherwise keys are all slots and queries the last ones.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n_q, n_k = q.shape[1], k.shape[1]
        cond = layout.cond_slots > 0 and n_q == n_k == layout.cond_slots != layout.slots
        if n_k != (layout.cond_slots if cond else layout.slots) or n_q % layout.q_chunk or n_q > n_k:
            raise LongCatError(
                f"{n_q} queries and {n_k} keys do not fit a layout of {layout.slots} slots in chunks of "
                f"{layout.q_chunk}; use `arrange` on the tokens first"
            )
        sizes = layout.sizes[: n_k // layout.k_chunk]
        return attend_arranged(
            *(q, k, v, settings),
            sizes=sizes,
            used=layout.cond_used if cond else layout.used,
            q_sizes=sizes[len(sizes) - n_q // layout.k_chunk :],
            q_chunk=layout.q_chunk,
            padded=layout.padded,
            eight_bit=eight_bit,
        )

    return attend


def with_block_sparse(chosen: Kernels, layout: ChunkLayout, settings: BlockSparse, eight_bit: bool = False) -> Kernels:
    """The kernels of a forward pass with block-sparse self-attention; attention to the text does not change.

    layout: of all keys, including those of cached conditioning frames. eight_bit: whether layers run in 8 bits, so that
    attention may too.
    """
    text = chosen.text or chosen.attend
    return chosen._replace(attend=block_sparse_attend(layout, settings, eight_bit), text=text, quantized=None)


def attend_grid(q: Tensor, k: Tensor, v: Tensor, grid: Shape, settings: BlockSparse) -> Tensor:
    """Block-sparse attention of all tokens of a grid in (frames, rows, columns) order, which golden data holds.

    q, k, v [B, N, heads, head_dim] -> as q.
    """
    if not q.shape[1] == k.shape[1] == math.prod(grid):
        raise LongCatError(f"{q.shape[1]} queries and {k.shape[1]} keys do not fit a grid of {grid} tokens")
    layout = chunk_layout(tuple(grid), settings.chunk, settings.query_chunk, 0, q.device)
    q, k, v = (layout.arrange(x) for x in (q, k, v))
    return layout.restore(block_sparse_attend(layout, settings)(q, k, v))
