"""Sparse attention in plain PyTorch, which runs anywhere and defines what every kernel computes.

Keys are cut into blocks of 64, from the first key on; the last Nk % 64 keys, the remainder, are always attended to
exactly, and so are the first blocks, the sink. Queries are cut into blocks of `query_block`, the last of which may be
short. The product of two blocks' means is their score, and each query block takes the other blocks with the best
scores, as many as the head keeps. All these keys enter one softmax with scale D^-0.5.

With a tail, every block that is left out enters the same softmax as one key and one value, their means over the block,
and its logit is raised by ln 64, so that it weighs as much as 64 equal keys (the pooled tail of Sol-Attn, arXiv
2607.24027). Each query has logits of its own to these means.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .settings import BLOCK

# Memory of the keys and values that are gathered at a time.
_GATHERED_BYTES = 1 << 27


def pool(x: Tensor, block: int) -> Tensor:
    """Means over blocks of consecutive tokens: x [B, N, H, D] -> [B, H, ceil(N / block), D], same dtype.

    Sums are fp32, or fp64 for such input. The last block may be short.
    """
    wide, whole = torch.promote_types(x.dtype, torch.float32), x.shape[1] // block * block
    means = x[:, :whole].unflatten(1, (-1, block)).mean(2, dtype=wide)
    if whole < x.shape[1]:
        means = torch.cat((means, x[:, whole:].mean(1, keepdim=True, dtype=wide)), dim=1)
    return means.to(x.dtype).transpose(1, 2)


def select_blocks(queries: Tensor, keys: Tensor, keep: Tensor, sink: int) -> Tensor:
    """The blocks that every query block takes beside the sink, ascending.

    queries [B, H, nq, D], keys [B, H, n, D]: means; keep [H]: how many of the n - sink blocks a head takes. Returns
    [B, H, nq, max(keep)] int64; entries past a head's number are n. Of equal scores the first block wins.
    """
    blocks, most = keys.shape[2], int(keep.max())
    wide = torch.promote_types(queries.dtype, torch.float32)
    scores = queries.to(wide) @ keys[:, :, sink:].to(wide).transpose(-1, -2)
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :most] + sink
    past = torch.arange(most, device=keys.device) >= keep.to(keys.device)[:, None, None]
    return best.masked_fill(past, blocks).sort(dim=-1).values


def attend_sparse_plain(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, *, sink: int, query_block: int, tail: bool
) -> Tensor:
    """q [B, Nq, H, D], k and v [B, Nk, H, D] -> as q, computed in fp32, or in fp64 for such input.

    keep [H] int32: how many blocks each head keeps beside the sink, at least 1 where there is one; sink: number of
    blocks at the front that are attended to exactly. Keys and values are gathered for some query blocks at a time.
    """
    batch, _, heads, dim = q.shape
    blocks = k.shape[1] // BLOCK
    sink, edge = min(sink, blocks), blocks * BLOCK
    wide, most = torch.promote_types(q.dtype, torch.float32), int(keep.max())
    pooled_q, pooled_k, pooled_v = pool(q, query_block), pool(k[:, :edge], BLOCK), pool(v[:, :edge], BLOCK)
    picked = select_blocks(pooled_q, pooled_k, keep, sink)
    # [B, H, blocks, 64, D].
    keys, values = (x[:, :edge].unflatten(1, (-1, BLOCK)).permute(0, 3, 1, 2, 4) for x in (k, v))
    always = [torch.cat((x[:, : sink * BLOCK], x[:, edge:]), dim=1).transpose(1, 2) for x in (k, v)]
    step = max(1, _GATHERED_BYTES // max(1, 2 * most * BLOCK * dim * heads * wide.itemsize))
    head = torch.arange(heads, device=q.device)[:, None, None]
    out = torch.empty_like(q)
    for b in range(batch):
        own_k, own_v = (x[b][:, None].to(wide) for x in always)
        mean_k, mean_v = (x[b][:, None].to(wide) for x in (pooled_k, pooled_v))
        for first in range(0, pooled_q.shape[2], step):
            some = picked[b, :, first : first + step]
            rows = slice(first * query_block, (first + some.shape[1]) * query_block)
            part = q[b, rows].to(wide).transpose(0, 1)
            short = -part.shape[1] % query_block
            part = torch.nn.functional.pad(part, (0, 0, 0, short)).unflatten(1, (-1, query_block)) * dim**-0.5
            absent = (some == blocks)[..., None].expand(*some.shape, BLOCK).flatten(2)[:, :, None]
            near = some.clamp(max=max(0, blocks - 1))
            near_k, near_v = (x[b][head, near].flatten(2, 3).to(wide) for x in (keys, values))
            logits = [part @ own_k.transpose(-1, -2), (part @ near_k.transpose(-1, -2)).masked_fill(absent, -math.inf)]
            if tail:
                taken = torch.zeros(heads, some.shape[1], blocks + 1, dtype=torch.bool, device=q.device)
                taken = taken.scatter_(2, some, True)[..., :blocks]
                taken[..., :sink] = True
                far = (part @ mean_k.transpose(-1, -2) + math.log(BLOCK)).masked_fill(taken[:, :, None], -math.inf)
                logits.append(far)
            weights = torch.cat(logits, dim=-1).softmax(-1).split([x.shape[-1] for x in logits], dim=-1)
            found = weights[0] @ own_v + weights[1] @ near_v
            if tail:
                found = found + weights[2] @ mean_v
            found = found.flatten(1, 2)
            out[b, rows] = found[:, : found.shape[1] - short].transpose(0, 1).to(q.dtype)
    return out
