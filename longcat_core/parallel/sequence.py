"""Sequence parallel: every rank has a share of each frame's tokens outside attention, and of the heads in it.

Attention exchanges one for the other, all to all, and back (DeepSpeed-Ulysses, arXiv 2309.14509). Where ranks have
`windows`, each writes its share straight to where another one's attention reads it. Elsewhere heads go out in chunks of
messages, and the attention of the first chunk runs while the others are under way. Because every frame is cut the same
way, conditioning frames, attention to text and to a frame's audio need no change.

What does not divide is padded: frames by tokens that nobody attends to, heads by zeros. The result is exact, unless
tensors are exchanged in 8 bits (`codecs`).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..model.ops import Rope
from ..model.transformer import ArrangedCache, BlockCache, FrameLayout
from ..optimize.attention import Kernels
from ..optimize.block_sparse import ChunkedLayout
from ..optimize.copies import contiguous, copy
from ..optimize.kernels.put import put
from ..optimize.sparse.passes import SparsePass
from ..optimize.switches import Exchange
from .codecs import CODECS
from .windows import ALL_PROGRAMS, Windows

# The most chunks of a rank's heads: more chunks hide more, until attention runs worse on few heads.
CHUNKS = 4
# Through windows the first chunk is one part in `FIRST` of a rank's heads, because nothing hides its exchange. The rest
# is divided evenly. A short last one would hide more of the results, but attention runs worse on few heads.
FIRST = 8


# The newer name, where PyTorch has it: the older one warns there.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class SequenceSharing:
    """The sharing of one pass between the ranks of a process group; see `optimize.sharing.Sharing`."""

    def __init__(self, group: dist.ProcessGroup, exchange: Exchange = "exact", windows: Windows | None = None) -> None:
        """windows: the group's, or None."""
        self.group, self.codec, self.chunks = group, CODECS[exchange], CHUNKS
        self.windows = windows if exchange == "exact" else None
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def layout(self, inner: FrameLayout, grid: tuple[int, int, int]) -> ShareLayout:
        return ShareLayout(inner, self, inner.sizes(grid)[1])

    def kernels(
        self, chosen: Kernels, inner: FrameLayout, grid: tuple[int, int, int], sparse: SparsePass | None
    ) -> Kernels:
        spatial = inner.sizes(grid)[1]
        # Dense attention is the same in any order of keys.
        attention = ShareAttention(
            self, chosen, spatial, sparse is not None or isinstance(inner, ChunkedLayout), sparse
        )
        return chosen._replace(
            attend=attention.attend,
            text=chosen.text or (chosen.attend if sparse is None else sparse.dense),
            quantized=None,
            # Only sparse attention puts the tokens of one frame into several rows.
            frames=chosen.frames if sparse is None else attention.frames,
            whole=lambda keys: self.whole_rows(keys, spatial),
        )

    def share(self, spatial: int) -> int:
        """How many of a frame's `spatial` tokens a rank has, with padding."""
        return -(-spatial // self.size)

    def cut(self, x: Tensor, dim: int) -> Tensor:
        """This rank's share of x along `dim`, padded with zeros."""
        share, spatial = self.share(x.shape[dim]), x.shape[dim]
        start = min(spatial, self.rank * share)
        own = x.narrow(dim, start, min(share, spatial - start))
        missing = share - own.shape[dim]
        if not missing:
            return own.contiguous()
        return F.pad(own, (0, 0) * (own.ndim - 1 - dim) + (0, missing))

    def gather(self, x: Tensor, dim: int, size: int) -> Tensor:
        """The first `size` entries along `dim` of all ranks' x, one behind the other."""
        x = x.contiguous()
        found = x.new_empty(self.size, *x.shape)
        all_gather(_bytes(found.flatten(0, 1)), _bytes(x), self.group)
        return found.movedim(0, dim).flatten(dim, dim + 1).narrow(dim, 0, size)

    def whole_rows(self, rows: Tensor, spatial: int) -> Tensor:
        """Rows [B, T * share, ..] of all ranks -> [B, T * spatial, ..]."""
        whole = self.gather(rows.unflatten(1, (-1, self.share(spatial))), 2, spatial)
        return whole.flatten(1, 2)


def _bytes(x: Tensor) -> Tensor:
    # Not every backend knows 8-bit floats.
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x


def _heads(x: Tensor, heads: slice) -> Tensor:
    """Heads of keys or values [B, T, M, H, D]; zeros for those past the last one."""
    found = x[..., heads, :]
    return F.pad(found, (0, 0, 0, heads.stop - heads.start - found.shape[-2]))


class ShareLayout(FrameLayout):
    """A rank's share of the tokens that another layout arranges: [B, T, S, C] become [B, T, S / ranks, C]."""

    def __init__(self, inner: FrameLayout, sharing: SequenceSharing, spatial: int) -> None:
        """spatial: S."""
        self.inner, self.sharing, self.spatial = inner, sharing, spatial

    def arrange(self, tokens: Tensor) -> Tensor:
        return self.sharing.cut(self.inner.arrange(tokens), 2)

    def restore(self, tokens: Tensor) -> Tensor:
        return self.inner.restore(self.sharing.gather(tokens, 2, self.spatial))

    def rope(self, head_dim: int, grid: tuple[int, ...], start: int, device: torch.device) -> Rope:
        cos, sin = (
            self.sharing.cut(table.unflatten(0, (-1, self.spatial)), 1).flatten(0, 1)
            for table in self.inner.rope(head_dim, grid, start, device)
        )
        return cos, sin

    def per_frame(self, temb: Tensor) -> Tensor:
        return self.inner.per_frame(temb)

    def leading(self, frames: int) -> int:
        return self.inner.leading(frames)

    def groups(self, num_cond: int, start: int, frames: int) -> Any:
        return self.inner.groups(num_cond, start, frames)

    def sizes(self, grid: tuple[int, ...]) -> tuple[int, int]:
        return self.inner.sizes(grid)[0], self.sharing.share(self.spatial)

    def restore_rows(self, rows: Tensor) -> Tensor:
        return self.inner.restore_rows(self.sharing.whole_rows(rows, self.spatial))

    def cached(self, cache: BlockCache) -> BlockCache:
        return ArrangedCache(self.inner.cached(cache), self.cut_rows) if cache.num_latents else cache

    def cut_rows(self, rows: Tensor) -> Tensor:
        """Rows [B, T * S, ..] of whole frames -> this rank's share [B, T * S / ranks, ..]."""
        return self.sharing.cut(rows.unflatten(1, (-1, self.spatial)), 2).flatten(1, 2)


class _Frames(NamedTuple):
    """The order of one GPU: frames of `spatial` tokens, of which each rank has `per_rank` rows, padding included."""

    spatial: int
    per_rank: int

    def tokens(self, rows: int) -> int:
        """The number of tokens of all ranks, each of which has `rows` rows."""
        return rows // self.per_rank * self.spatial

    def of(self, x: Tensor, rank: int, reader: int) -> Tensor:
        """A rank's tokens among all those [B, N, ..] that `reader` reads: [B, T, S, ..]."""
        return x.unflatten(1, (-1, self.spatial))[:, :, rank * self.per_rank : (rank + 1) * self.per_rank]

    def share(self, x: Tensor, rank: int) -> Tensor:
        """A rank's share [B, n, ..] in the form that `of` gives."""
        filled = max(0, min(self.per_rank, self.spatial - rank * self.per_rank))
        return x.unflatten(1, (-1, self.per_rank))[:, :, :filled]


class _Ranks(NamedTuple):
    """The ranks' shares, of `rows` rows each, one behind the other; the reader's own comes last. See `_Frames`."""

    rows: int
    size: int

    def tokens(self, rows: int) -> int:
        return rows * self.size

    def of(self, x: Tensor, rank: int, reader: int) -> Tensor:
        # x may hold the shares of all ranks, of the others only, or the reader's only.
        at = -1 if rank == reader else (rank - reader - 1) % self.size
        return x.unflatten(1, (-1, self.rows))[:, at, None]

    def share(self, x: Tensor, rank: int) -> Tensor:
        return x[:, None]


_Order = _Frames | _Ranks


class ShareAttention:
    """Attention of one pass, from shares of tokens to shares of tokens: stands in for kernels of a backend."""

    def __init__(self, sharing: SequenceSharing, kernels: Kernels, spatial: int, ordered: bool, sparse: Any) -> None:
        """kernels: what each rank runs on its heads. spatial: tokens of a frame. ordered: whether the kernels depend on
        the order of tokens. sparse: the `SparsePass` that they belong to, or None."""
        self.sharing, self.kernels, self.spatial, self.sparse = sharing, kernels, spatial, sparse
        # apart: queries may come in any order. ordered: messages must be put into the order of one GPU.
        self.apart, self.ordered = not ordered, ordered or self._padded

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Self-attention: q [B, Nq, H, D], k and v [B, Nk, H, D], shares of whole frames -> as q."""
        return self._exchanged([q, k, v], lambda heads, q, k, v: self.kernels.attend(q, k, v), self.apart)

    def frames(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`Kernels.frames` with q [B, N, H, D] a share of whole frames, k and v whole -> as q."""
        assert self.kernels.frames is not None
        attend = self.kernels.frames
        return self._exchanged([q], lambda heads, q: attend(q, _heads(k, heads), _heads(v, heads)), False)

    def _exchanged(self, shares: list[Tensor], attend: Callable[..., Tensor], apart: bool) -> Tensor:
        """attend(heads, *tensors) with all tokens [B, N, h, D] of some of this rank's heads, and back to shares.

        shares: of the tensors, [B, n, H, D], the first of which, the queries, is as the result; the list is emptied.
        apart: whether queries may come in any order, and some of them without the others.
        """
        size, (heads, head_dim) = self.sharing.size, shares[0].shape[2:]
        own = -(-heads // size)
        padding = own * size - heads
        # [B, n, ranks, heads of a rank, D]
        parts = [F.pad(x, (0, 0, 0, padding)) if padding else x for x in shares]
        parts = [x.unflatten(2, (size, own)) for x in parts]
        shares.clear()
        if self.sharing.windows is None:
            out = self._by_messages(parts, attend)
        else:
            out = self._through_windows(parts, attend, self.sharing.windows, apart)
        return out.view(*out.shape[:2], -1, head_dim)[:, :, :heads]

    def _through_windows(
        self, parts: list[Tensor], attend: Callable[..., Tensor], windows: Windows, apart: bool
    ) -> Tensor:
        """`_exchanged` of parts [B, n, ranks, heads of a rank, D], as the first of which the result is.

        A chunk's heads are written while those before it are attended to. If queries may be `apart`, other ranks' come
        first in the last chunk, and their results leave while this rank's own are attended to.
        """
        rank, (batch, rows, size, own, dim) = windows.rank, parts[0].shape
        frames = _Frames(self.spatial, self.sharing.share(self.spatial))
        order: _Order = _Ranks(rows, size) if apart else frames
        orders = [order, frames, frames][: len(parts)]
        places = [
            windows.of(name, (batch, each.tokens(x.shape[1]), own, dim), x.dtype)
            for name, (each, x) in enumerate(zip(orders, parts, strict=True))
        ]
        back = windows.of("out", (size, batch, rows, own, dim), parts[0].dtype)
        out = parts[0].new_zeros(parts[0].shape) if self._padded else parts[0].new_empty(parts[0].shape)
        chunks = _short_first(own, self.sharing.chunks)
        ready = _hand_in(windows, chunks, orders, places, parts)
        q, *others = (place[rank] for place in places)
        for each, x, part in zip(orders, (q, *others), parts, strict=True):
            copy(each.of(x, rank, rank), each.share(part[:, :, rank], rank))
        total = q.shape[1]
        work = [(begun, chunk, slice(0, total)) for begun, chunk in zip(ready, chunks, strict=True)]
        if apart:
            split = slice(0, total - rows), slice(total - rows, total)
            work[-1:] = [(*work[-1][:2], queries) for queries in split]
        results = []
        with windows.turns() as turn:
            for at, (begun, chunk, queries) in enumerate(work):
                if at == len(work) - 1:
                    windows.join(ready[-1])
                    parts.clear()
                with turn(at):
                    windows.join(begun)
                    tensors = [q[:, queries, chunk], *(x[:, :, chunk] for x in others)]
                    found = self._attended(attend, rank * own, chunk, tensors)
                    # Its memory is not for others until it is written.
                    results.append(found)
                    if queries.stop == total:
                        copy(order.share(out[:, :, rank, chunk], rank), order.of(found, rank, rank))
                    if queries.start == 0:
                        _hand_back(windows, chunk, order, back, found)
                        if chunk.stop == own:
                            _collect(windows, order, back[rank], out)
        windows.join(windows.begun())
        results.clear()
        # From here on others may write into the windows of this rank.
        with windows.beside():
            windows.arrived()
        return out

    @property
    def _padded(self) -> bool:
        """Whether shares have tokens that belong to no frame."""
        return self.spatial % self.sharing.size > 0

    def _by_messages(self, parts: list[Tensor], attend: Callable[..., Tensor]) -> Tensor:
        """`_through_windows`, where ranks have none."""
        own = parts[0].shape[3]
        chunks = _even(own, self.sharing.chunks)
        out = parts[0].new_empty(parts[0].shape)
        # Tensors of as many tokens travel as one, because each message is one more to wait for.
        alike = [list(run) for _, run in groupby(parts, lambda x: x.shape)]
        waiting = [
            [(len(run), self._send(_gathered([x[:, :, :, chunk].transpose(1, 2) for x in run]))) for run in alike]
            for chunk in chunks
        ]
        parts.clear()
        del alike
        back = []
        for i, chunk in enumerate(chunks):
            joined = [x for count, receive in waiting[i] for x in self._joined(receive()).chunk(count, 2)]
            waiting[i] = []
            found = self._attended(attend, self.sharing.rank * own, chunk, joined)
            del joined
            back.append(self._send(self._parted(found)))
            del found
        for chunk, receive in zip(chunks, back, strict=True):
            copy(out[:, :, :, chunk], receive().transpose(1, 2))
        return out

    def _attended(self, attend: Callable[..., Tensor], first: int, chunk: slice, tensors: list[Tensor]) -> Tensor:
        """Attention with a chunk of a rank's heads, the first of which is the network's head `first`."""
        if self.sparse is not None:
            self.sparse.first_head = first + chunk.start
        return attend(slice(first + chunk.start, first + chunk.stop), *tensors)

    def _send(self, x: Tensor) -> Callable[[], Tensor]:
        """Send x [B, ranks, N, h, D], to each rank its part. Returns what waits for theirs, which has x's shape."""
        codec = self.sharing.codec
        sent = codec.encode(x)
        received = torch.empty_like(sent)
        works = [
            dist.all_to_all_single(to, of, group=self.sharing.group, async_op=True)
            for to, of in zip(received, sent, strict=True)
        ]
        shape, dtype = x.shape[2:], x.dtype

        def receive() -> Tensor:
            for work in works:
                work.wait()
            return codec.decode(received, shape, dtype)

        return receive

    def _joined(self, parts: Tensor) -> Tensor:
        """[B, ranks, N, h, D] -> [B, tokens of all ranks, h, D]."""
        if not self.ordered:
            return parts.flatten(1, 2)
        # Frames, then ranks, then the tokens of each.
        frames = parts.unflatten(2, (-1, self.sharing.share(self.spatial))).transpose(1, 2)
        return contiguous(frames).flatten(2, 3)[:, :, : self.spatial].flatten(1, 2)

    def _parted(self, x: Tensor) -> Tensor:
        """[B, tokens of all ranks, h, D] -> [B, ranks, N, h, D]."""
        size = self.sharing.size
        if not self.ordered:
            return x.unflatten(1, (size, -1))
        share = self.sharing.share(self.spatial)
        frames = x.unflatten(1, (-1, self.spatial))
        if missing := size * share - self.spatial:
            frames = F.pad(frames, (0, 0, 0, 0, 0, missing))
        return contiguous(frames.unflatten(2, (size, share)).transpose(1, 2)).flatten(2, 3)


def _gathered(tensors: list[Tensor]) -> Tensor:
    """Tensors [B, ranks, N, h, D] as one, contiguous, with all their heads."""
    shape, heads = list(tensors[0].shape), tensors[0].shape[3]
    shape[3] *= len(tensors)
    out = tensors[0].new_empty(shape)
    for part, x in zip(out.split(heads, 3), tensors, strict=True):
        copy(part, x)
    return out


def _hand_in(
    windows: Windows, chunks: list[slice], orders: list[_Order], places: list[list[Tensor]], parts: list[Tensor]
) -> list[Any]:
    """Write other ranks' heads of parts [B, n, ranks, h, D] to their places, by tensor and rank, [B, N, h, D].

    Returns what `Windows.join` waits for, by chunk.
    """
    ready = []
    with windows.beside():
        for i, chunk in enumerate(chunks):
            for to in windows.others:
                pairs = [
                    (order.of(place[to][:, :, chunk], windows.rank, to), order.share(x[:, :, to, chunk], windows.rank))
                    for order, place, x in zip(orders, places, parts, strict=True)
                ]
                put(pairs, windows.programs if i else ALL_PROGRAMS)
            windows.arrived()
            ready.append(windows.begun())
    return ready


def _hand_back(windows: Windows, chunk: slice, order: _Order, back: list[Tensor], found: Tensor) -> None:
    """Write a chunk's results [B, N, h, D] to the ranks whose tokens they are of: back, by rank [ranks, B, n, H, D]."""
    with windows.beside():
        for to in windows.others:
            place = back[to][windows.rank][:, :, chunk]
            put([(order.share(place, to), order.of(found, to, windows.rank))], windows.programs)


def _collect(windows: Windows, order: _Order, back: Tensor, out: Tensor) -> None:
    """Copy what the others wrote, [ranks, B, n, H, D], to the result [B, n, ranks, H, D] once it is there.

    It does not stay in the window, because another call may come before it is read.
    """
    with windows.beside():
        windows.arrived()
        for of in windows.others:
            copy(order.share(out[:, :, of], windows.rank), order.share(back[of], windows.rank))


def _even(heads: int, most: int, start: int = 0) -> list[slice]:
    """At most `most` runs of a rank's heads from `start` on, the smaller ones first: nothing hides the exchange of the
    first."""
    count = min(most, heads - start)
    return [
        slice(start + (heads - start) * i // count, start + (heads - start) * (i + 1) // count) for i in range(count)
    ]


def _short_first(heads: int, most: int) -> list[slice]:
    """At most `most` runs of a rank's heads: one part in `FIRST`, and even ones."""
    first = max(1, heads // FIRST)
    return [slice(0, first), *_even(heads, most - 1, first)]
