"""Sequence parallel: every rank has a share of each frame's tokens outside attention, and of the heads in it.

Attention exchanges one for the other, all to all, and back (DeepSpeed-Ulysses, arXiv 2309.14509). Where ranks have
`windows`, each writes its share straight to where another one's attention reads it. Elsewhere heads go out in chunks of
messages, and the attention of the first chunk runs while the others are under way. Because every frame is cut the same
way, conditioning frames, attention to text and to a frame's audio need no change.

What does not divide is padded: frames by tokens that nobody attends to, heads by zeros. The result is exact, unless
tensors are exchanged in 8 bits (`codecs`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from itertools import groupby
from typing import Any

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
from .windows import PROGRAMS, Windows

# The most chunks of a rank's heads: more chunks hide more of the exchange, until launches cost more.
CHUNKS = 4


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


class ShareAttention:
    """Attention of one pass, from shares of tokens to shares of tokens: stands in for kernels of a backend."""

    def __init__(self, sharing: SequenceSharing, kernels: Kernels, spatial: int, ordered: bool, sparse: Any) -> None:
        """kernels: what each rank runs on its heads. spatial: tokens of a frame. ordered: whether the kernels depend on
        the order of tokens. sparse: the `SparsePass` that they belong to, or None."""
        self.sharing, self.kernels, self.spatial, self.sparse = sharing, kernels, spatial, sparse
        # What ranks hand in lies one behind the other; frames lie among these.
        self.ordered = ordered or self._padded

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Self-attention: q [B, Nq, H, D], k and v [B, Nk, H, D], shares of whole frames -> as q."""
        return self._exchanged([q, k, v], lambda heads, q, k, v: self.kernels.attend(q, k, v))

    def frames(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`Kernels.frames` with q [B, N, H, D] a share of whole frames, k and v whole -> as q."""
        assert self.kernels.frames is not None
        attend = self.kernels.frames
        return self._exchanged([q], lambda heads, q: attend(q, _heads(k, heads), _heads(v, heads)))

    def _exchanged(self, shares: list[Tensor], attend: Callable[..., Tensor]) -> Tensor:
        """attend(heads, *tensors) with all tokens [B, N, h, D] of some of this rank's heads, and back to shares.

        shares: of the tensors, [B, n, H, D], the first of which is as the result; the list is emptied.
        """
        size, (heads, head_dim) = self.sharing.size, shares[0].shape[2:]
        own = -(-heads // size)
        padding = own * size - heads
        # [B, n, ranks, heads of a rank, D]
        parts = [F.pad(x, (0, 0, 0, padding)) if padding else x for x in shares]
        parts = [x.unflatten(2, (size, own)) for x in parts]
        shares.clear()
        exchanged = self._by_messages if self.sharing.windows is None else self._through_windows
        out = exchanged(parts, attend)
        return out.view(*out.shape[:2], -1, head_dim)[:, :, :heads]

    def _through_windows(self, parts: list[Tensor], attend: Callable[..., Tensor]) -> Tensor:
        """`_exchanged` of parts [B, n, ranks, heads of a rank, D], as the first of which the result is.

        A chunk's heads are written while those before it are attended to.
        """
        windows, rank, own = self.sharing.windows, self.sharing.rank, parts[0].shape[3]
        assert windows is not None
        chunks = _chunks(own, CHUNKS)
        ready = []
        for i, chunk in enumerate(chunks):
            with windows.beside():
                whole = [self._put_whole((name, i), x[:, :, :, chunk]) for name, x in enumerate(parts)]
                windows.arrived()
            ready.append((windows.begun(), whole))
        out = parts[0].new_zeros(parts[0].shape) if self._padded else parts[0].new_empty(parts[0].shape)
        places, results = [], []
        for i, (chunk, (begun, whole)) in enumerate(zip(chunks, ready, strict=True)):
            windows.join(begun)
            if i == len(chunks) - 1:
                parts.clear()
            if self.sparse is not None:
                self.sparse.first_head = rank * own + chunk.start
            found = attend(slice(rank * own + chunk.start, rank * own + chunk.stop), *whole)
            with windows.beside():
                places.append(self._put_shares(("out", i), found, out[:, :, :, chunk]))
            # Its memory is not for others until it is written.
            results.append(found)
        with windows.beside():
            windows.arrived()
            for chunk, shares in zip(chunks, places, strict=True):
                for of in windows.others:
                    copy(self._filled(out[:, :, of, chunk], rank), self._filled(shares[of], rank))
        windows.join(windows.begun())
        results.clear()
        return out

    def _put_whole(self, name: Hashable, x: Tensor) -> Tensor:
        """Write shares x [B, n, ranks, h, D] where each rank reads whole frames; this rank's, [B, N, h, D]."""
        windows, rank = self.sharing.windows, self.sharing.rank
        assert windows is not None
        tokens = x.shape[1] // self.sharing.share(self.spatial) * self.spatial
        places = windows.of(name, (len(x), tokens, *x.shape[3:]), x.dtype)
        for to in windows.others:
            put(self._places(places[to], rank), self._filled(x[:, :, to], rank), PROGRAMS)
        copy(self._places(places[rank], rank), self._filled(x[:, :, rank], rank))
        return places[rank]

    def _put_shares(self, name: Hashable, found: Tensor, out: Tensor) -> Tensor:
        """Write a result [B, N, h, D] to the ranks whose tokens it is of; this rank's of all, [ranks, B, n, h, D].

        out: of this rank, [B, n, ranks, h, D], which gets its own part. The others' do not stay in the window, because
        another call may come before they are read.
        """
        windows, rank = self.sharing.windows, self.sharing.rank
        assert windows is not None
        places = windows.of(name, (self.sharing.size, *out[:, :, 0].shape), out.dtype)
        for to in windows.others:
            put(self._filled(places[to][rank], to), self._places(found, to), PROGRAMS)
        copy(self._filled(out[:, :, rank], rank), self._places(found, rank))
        return places[rank]

    @property
    def _padded(self) -> bool:
        """Whether shares have tokens that belong to no frame."""
        return self.spatial % self.sharing.size > 0

    def _places(self, x: Tensor, rank: int) -> Tensor:
        """A rank's tokens [B, T, ..] among those of whole frames [B, T * S, ..]."""
        share = self.sharing.share(self.spatial)
        return x.unflatten(1, (-1, self.spatial))[:, :, rank * share : (rank + 1) * share]

    def _filled(self, x: Tensor, rank: int) -> Tensor:
        """A rank's share [B, T * share, ..] without padding, [B, T, ..]."""
        share = self.sharing.share(self.spatial)
        return x.unflatten(1, (-1, share))[:, :, : max(0, min(share, self.spatial - rank * share))]

    def _by_messages(self, parts: list[Tensor], attend: Callable[..., Tensor]) -> Tensor:
        """`_through_windows`, where ranks have none."""
        own = parts[0].shape[3]
        chunks = _chunks(own, self.sharing.chunks)
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
            first = self.sharing.rank * own
            if self.sparse is not None:
                self.sparse.first_head = first + chunk.start
            joined = [x for count, receive in waiting[i] for x in self._joined(receive()).chunk(count, 2)]
            waiting[i] = []
            found = attend(slice(first + chunk.start, first + chunk.stop), *joined)
            del joined
            back.append(self._send(self._parted(found)))
            del found
        for chunk, receive in zip(chunks, back, strict=True):
            copy(out[:, :, :, chunk], receive().transpose(1, 2))
        return out

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


def _chunks(heads: int, most: int) -> list[slice]:
    """At most `most` runs of a rank's heads, the smaller ones first: nothing hides the exchange of the first."""
    count = min(most, heads)
    return [slice(heads * i // count, heads * (i + 1) // count) for i in range(count)]
