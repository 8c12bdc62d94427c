"""What sparse attention would cost each head, measured beside dense attention on some of its queries.

For a few query blocks the softmax over all keys is computed exactly, block by block of keys. Whatever blocks a density
takes, the sparse output is then a sum of parts that are there already: exact parts of the blocks that it takes, and the
pooled parts of the others. So one look at the keys prices every density of a ladder, at the cost of about `samples`
query blocks of plain attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import LongCatError
from ..model.attention import Groups
from ..model.kv_cache import KVCache
from ..model.text import TextTokens
from ..model.transformer import FrameLayout, ReferenceLayout
from ..optimize.attention import Kernels
from ..optimize.execution import AroundBlock, Execution
from ..optimize.operators import Attend
from ..optimize.optimized import OptimizedTransformer
from ..optimize.plan import free_bytes
from ..optimize.sparse.plain import pool
from ..optimize.sparse.settings import BLOCK, kept
from .clock import Laps

# Densities that are priced; 1 needs no price. Steps of about 1.4 times: a finer choice would save less than 2 % of a
# step.
LADDER = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.55)
# Memory of the keys, values and products that are held at a time, if a quarter of the free memory is as much. At full
# size, 37,440 tokens of 32 heads, 8 query blocks took 33 ms with it and 63 ms with 512 MiB (H100, 2026-11-28).
BYTES = 1 << 31
SCALE = 64.0
# Order of the noise frames' tokens in the blocks, [N] int64, for a grid (frames, rows, columns) of which some frames
# (first, past the last) are ordered by themselves.
Order = Callable[[tuple[int, int, int], torch.device, tuple[int, int]], Tensor]


class Price(NamedTuple):
    """Of every head [H] and density [L]. error: |sparse - exact|^2 of the head's outputs, summed, [H, L]; size:
    |exact|^2, [H]; mass: share of the softmax in the blocks that are taken, mean over the queries, [H, L]; best: the
    same of the blocks that hold the most of it, as many for each query block, [H, L]."""

    error: Tensor
    size: Tensor
    mass: Tensor
    best: Tensor


def price(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ladder: Sequence[float],
    *,
    sink: int,
    query_block: int,
    tail: bool,
    order: Tensor | None = None,
    roots: Tensor | None = None,
) -> Price:
    """What each density of a ladder changes for these queries.

    q [n, query_block, H, D]: whole query blocks of one video; k, v [Nk, H, D]: all keys and values. order [Nk]: the key
    at each place in the order of the blocks; None: they are in order. sink, tail: see `attend_sparse_plain`. roots [H,
    D, D]: error and size are those of roots @ output; see `roots_of`. Computed in fp32, or in fp64 for such input.
    """
    blocks, heads, dim = len(k) // BLOCK, k.shape[1], k.shape[2]
    sink = min(sink, blocks)
    keeps = torch.tensor(kept(tuple(ladder), blocks - sink), device=q.device)
    wide = torch.promote_types(q.dtype, torch.float32)
    each = wide.itemsize * (2 * len(k) * dim + 3 * query_block * len(k) + 2 * blocks * query_block * dim)
    room = min(BYTES, free_bytes(q.device) // 4) if q.device.type == "cuda" else BYTES
    some = max(1, room // each)
    groups = [slice(first, first + some) for first in range(0, heads, some)]
    places = slice(None) if order is None else order
    # Only a group's keys are put in order at a time.
    own = [None if roots is None else roots[h].to(wide) for h in groups]
    parts = [
        _price(q[:, :, h], k[:, h][places], v[:, h][places], keeps, sink, tail, wide, root)
        for h, root in zip(groups, own, strict=True)
    ]
    return Price(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _price(
    q: Tensor, k: Tensor, v: Tensor, keeps: Tensor, sink: int, tail: bool, wide: torch.dtype, roots: Tensor | None
) -> Price:
    """`price` of a few heads."""
    size, blocks = q.shape[1], len(k) // BLOCK
    edge, levels = blocks * BLOCK, len(keeps)
    # [H, .., D]
    mean_q = pool(q.flatten(0, 1)[None], size)[0].to(wide)
    mean_k, mean_v = (pool(x[None, :edge], BLOCK)[0].to(wide) for x in (k, v))
    keys, values = (x.transpose(0, 1).to(wide).contiguous() for x in (k, v))
    if roots is not None:
        mean_v, values = (x @ roots.transpose(-1, -2) for x in (mean_v, values))
    near = values[:, :edge].unflatten(1, (blocks, BLOCK))
    scores = mean_q @ mean_k[:, sink:].transpose(-1, -2)
    ranks = torch.argsort(scores.argsort(dim=-1, descending=True, stable=True), dim=-1)
    # The step of the ladder at which each block is taken first: 0 for the sink, levels + 1 for never.
    level = torch.searchsorted(keeps, ranks + 1) + 1
    level = torch.nn.functional.pad(level, (sink, 0))
    error, mass, best = (q.new_zeros(len(keys), levels, dtype=wide) for _ in range(3))
    whole = q.new_zeros(len(keys), dtype=wide)
    for i, part in enumerate(q.transpose(1, 2).to(wide) * q.shape[-1] ** -0.5):
        taken = torch.nn.functional.one_hot(level[:, i], levels + 2).transpose(-1, -2).to(wide)
        logits = part @ keys.transpose(-1, -2)
        most = logits.amax(-1, keepdim=True)
        weights = logits.sub_(most).exp_()
        # The logit of a mean exceeds the largest of its block by ln 64 at most.
        pooled = (part @ mean_k.transpose(-1, -2) + math.log(BLOCK) - most).exp_()
        if not tail:
            pooled.zero_()
        del logits
        # Exact parts of each block: numerators [H, blocks, Q, D] and denominators [H, blocks, Q].
        inside = weights[..., :edge].unflatten(-1, (blocks, BLOCK))
        ours = inside.transpose(1, 2) @ near
        sums, pooled = inside.sum(-1).transpose(-1, -2), pooled.transpose(-1, -2)
        # The pooled parts of all blocks, and the remainder, from which each level of the ladder takes some blocks.
        top = pooled.transpose(-1, -2) @ mean_v + weights[..., edge:] @ values[:, edge:]
        bottom = pooled.sum(1) + weights[..., edge:].sum(-1)
        held = weights[..., edge:].sum(-1)[:, None] + (taken @ sums).cumsum(1)
        more = (taken @ ours.flatten(2)).unflatten(-1, part.shape[1:])
        less = (taken[..., None, :] * pooled.transpose(-1, -2)[:, None]) @ mean_v[:, None]
        tops = top[:, None] + (more - less).cumsum(1)
        bottoms = bottom[:, None] + (taken @ (sums - pooled)).cumsum(1)
        del ours, inside, weights, more, less
        # Number 0 is the sink alone, and the last one all blocks, which is exact.
        exact = tops[:, -1] / bottoms[:, -1, :, None]
        sparse = tops[:, 1:-1] / bottoms[:, 1:-1, :, None]
        error += (sparse - exact[:, None]).square().sum((-1, -2))
        whole += exact.square().sum((-1, -2))
        mass += (held[:, 1:-1] / held[:, -1:]).mean(-1) / len(q)
        # [H, blocks], the largest first; the sink and the remainder are always taken.
        shares = (sums[:, sink:] / held[:, -1:]).mean(-1).sort(descending=True).values
        best += (1 - shares.sum(-1, keepdim=True) + shares.cumsum(-1)[:, keeps - 1]) / len(q)
    return Price(error, whole, mass, best)


def project(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x) without its bias and, if it can, without 8 bits: [.., C_in] -> [.., C_out]."""
    options = {"fp8": False} if getattr(layer, "eight_bit", False) else {}
    out: Tensor = layer(x, **options) - layer(torch.zeros_like(x[:1]), **options)
    return out


def roots_of(layer: nn.Module, heads: int, like: Tensor) -> Tensor:
    """[heads, D, D] fp32: |root @ output| of a head is the length of what `layer` [.., heads * D] makes of its output.

    The layer is asked, since its weight may be packed, streamed or patched. like: its input's dtype and device.
    """
    size = layer.in_features
    # Scaled, so that rounding to 16 bits is that of the weight and not that of the bias.
    eye = SCALE * torch.eye(int(size), dtype=like.dtype, device=like.device)  # type: ignore[arg-type]
    weight = (project(layer, eye).double() / SCALE).unflatten(0, (heads, -1))
    values, vectors = torch.linalg.eigh(weight @ weight.transpose(-1, -2))
    return (vectors * values.clamp(min=0).sqrt()[:, None]).transpose(-1, -2).float()


class Look(NamedTuple):
    """One attention of a block, which is measured. queries [Nq], keys [Nk]: its tokens in the order of the blocks;
    sink: see `price`; share: of the noise tokens that are its queries, 0..1."""

    queries: Tensor
    keys: Tensor
    sink: int
    share: float


def looks(groups: Groups, frames: int, spatial: int, given: int, cached: bool, order: Tensor) -> dict[int, Look]:
    """Which of a block's attentions are measured, by their number, counted from 1: those of the noise frames.

    groups: of an input of `frames` frames of `spatial` tokens. given: clean tokens in front of the noise ones, cached
    ones included; cached: whether there are any of these. order [N]: of the noise tokens, whose hidden frames are
    ordered by themselves.
    """
    found, clean = {}, groups.clean * spatial
    for number, (own, seen) in enumerate(groups.reads(frames, spatial, cached), 1):
        first, past = own.start - clean, own.stop - clean
        # Clean frames stay exact.
        if first < 0:
            continue
        front = given - seen.start
        keys = torch.cat((torch.arange(front, device=order.device), order + front))
        found[number] = Look(order[first:past] - first, keys, math.ceil(front / BLOCK), (past - first) / len(order))
    return found


@dataclass
class Probe:
    """Collects prices of passes in ranges of steps.

    squares: error [ranges, depth, heads, L] that comes of each head: |W_h (sparse - exact)|^2 / |W exact|^2, where W is
    the layer's output projection and W_h the head's part; mass, best: see `Price`, [depth, heads, L]; all these are
    sums over `count` [ranges, depth] prices, one for each pass and video. Where noise frames attend in several parts,
    since some do not see a reference frame, the price is the mean over the parts, weighted by their queries. seen:
    passes [ranges]. roots: by layer, see `roots_of`. samples: query blocks of each pass, layer and video. order: see
    above.
    """

    ranges: int
    depth: int
    heads: int
    query_block: int
    tail: bool
    ladder: tuple[float, ...]
    samples: int
    seed: int
    order: Order

    def __post_init__(self) -> None:
        self.device = torch.device("cpu")
        self.squares = torch.zeros(self.ranges, self.depth, self.heads, len(self.ladder))
        self.mass, self.best = torch.zeros_like(self.squares[0]), torch.zeros_like(self.squares[0])
        self.count = torch.zeros(self.ranges, self.depth, dtype=torch.float64)
        self.seen = [0] * self.ranges
        # The range and the number of the pass that runs, None while nothing is measured; the block that runs.
        self.range: int | None = None
        self.number = self.layer = self.calls = 0
        self.roots: dict[int, Tensor] = {}
        # Seconds of dense attention in each pass that was measured.
        self.attention_s: list[float] = []

    def measured(self, attend: Attend, parts: dict[int, Look], laps: Laps, blocks: Sequence[nn.Module]) -> Attend:
        """Dense attention `attend` that is also measured.

        parts: the calls in a block that are measured, by their number; before them clean frames may attend to
        themselves, and after them tokens to the text. laps: get a lap for each measured call; blocks: the network's.
        """

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.calls += 1
            if (look := parts.get(self.calls)) is None:
                return attend(q, k, v)
            laps.mark()
            out = attend(q, k, v)
            laps.mark()
            self._take(q, k, v, out, look, blocks[self.layer].get_submodule("attn.proj"))
            return out

        return call

    def _take(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, part: Look, layer: nn.Module) -> None:
        assert self.range is not None, "a pass is measured"
        count, share = q.shape[1] // self.query_block, part.share
        if not count or k.shape[1] // BLOCK <= part.sink:
            raise LongCatError(
                f"{q.shape[1]} tokens are too few for blocks of {self.query_block}; calibrate with larger or longer "
                "videos"
            )
        chosen = self._chosen(count, max(1, round(self.samples * share))).to(q.device)
        rows = part.queries[: count * self.query_block].view(count, self.query_block)[chosen]
        if self.device != q.device:
            self.device, self.squares = q.device, self.squares.to(q.device)
            self.mass, self.best = self.mass.to(q.device), self.best.to(q.device)
        if self.layer not in self.roots:
            self.roots[self.layer] = roots_of(layer, self.heads, q)
        look = partial(price, sink=part.sink, query_block=self.query_block, tail=self.tail, order=part.keys)
        for video in range(len(q)):
            found = look(q[video, rows], k[video], v[video], self.ladder, roots=self.roots[self.layer])
            whole = project(layer, out[video, rows.flatten()].flatten(1)).float().square().sum()
            place = self.squares[self.range, self.layer]
            place += share * (found.error / whole.clamp(min=torch.finfo(torch.float32).tiny)).to(place)
            self.mass[self.layer] += share * found.mass.to(place)
            self.best[self.layer] += share * found.best.to(place)
            self.count[self.range, self.layer] += share

    def mean_squares(self) -> Tensor:
        """`squares` of a price, [ranges, depth, heads, L] fp64 on the CPU."""
        return self.squares.cpu().double() / self.count[..., None, None].clamp(min=1)

    def _chosen(self, whole: int, samples: int) -> Tensor:
        """Which of the query blocks are measured: others in every pass and layer, the same for a seed."""
        place = (self.seed * 1009 + self.number) * self.depth + self.layer
        generator = torch.Generator().manual_seed(place % (1 << 31))
        return torch.randperm(whole, generator=generator)[:samples].sort().values

    def around(self, outer: AroundBlock | None) -> AroundBlock:
        """`around_block` of a pass that is measured. outer: what else goes around blocks."""

        def around(i: int, run: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
            self.layer, self.calls = i, 0
            return run(tokens) if outer is None else outer(i, run, tokens)

        return around


class Probed:
    """An execution under a probe: passes are measured while `probe.range` is set. Everything else is the execution's,
    and so is the output."""

    execution: Execution
    probe: Probe

    def __init__(self, execution: Execution, probe: Probe) -> None:
        self.__dict__.update(execution=execution, probe=probe)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.execution, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.execution, name, value)

    def __call__(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor | TextTokens | None,
        mask: Tensor | None = None,
        *,
        num_cond_latents: int = 0,
        kv_cache: KVCache | None = None,
        **options: Any,
    ) -> Tensor:
        """See `Execution.__call__`."""
        there: dict[str, Any] = {"num_cond_latents": num_cond_latents, "kv_cache": kv_cache}
        probe = self.probe
        if probe.range is None:
            return self.execution(x, timestep, context, mask, **there, **options)
        _, ph, pw = self.execution.config.patch_size
        frames, rows, columns = x.shape[2], x.shape[3] // ph, x.shape[4] // pw
        start = 0 if kv_cache is None else kv_cache.num_latents
        reference = options.get("reference")
        layout = FrameLayout() if reference is None else ReferenceLayout(reference)
        groups = layout.groups(num_cond_latents, start, frames)
        order = probe.order((frames - num_cond_latents, rows, columns), x.device, groups.hidden)
        given = (num_cond_latents + start) * rows * columns
        parts = looks(groups, frames, rows * columns, given, start > 0, order)
        laps = Laps(x.device)
        chosen: Kernels = options.pop("kernels", None) or self.execution.choose_kernels(x.device)
        attend = probe.measured(chosen.attend, parts, laps, self.execution.network.blocks)
        options["kernels"] = chosen._replace(attend=attend, quantized=None)
        options["around_block"] = probe.around(options.pop("around_block", None))
        probe.number += 1
        out = self.execution(x, timestep, context, mask, **there, **options)
        probe.attention_s.append(sum(laps.times_ms()[::2]) / 1000)
        probe.seen[probe.range] += 1
        return out


@contextmanager
def probing(model: OptimizedTransformer, probe: Probe) -> Iterator[None]:
    """Passes of a network go through a probe inside the `with` block."""
    before = model.execution
    model.__dict__["execution"] = Probed(before, probe)
    try:
        yield
    finally:
        model.__dict__["execution"] = before
