"""Sparse attention by kernels: the choice of key blocks, the exact part over them, and the tail.

`optimize.sparse.plain` has the definition in plain PyTorch. `sol` is comfy-kitchen's Sol-Attn (arXiv 2607.24027), which
makes its own choice and has its own tail: it takes the neighbors of a block exactly as well, its tail is one for all
tokens of a query block, and it computes in 8 bits.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise

import torch
from torch import Tensor

from ...errors import BackendUnavailable
from ..requirement import Requirement
from ..sparse.settings import NARROW
from . import sparse_exact
from .elementwise import whole_tokens
from .sparse_choose import BLOCK, Chosen, block_means, block_scores, choose_blocks
from .sparse_exact import Exact, attend_exact
from .sparse_tail import add_tail

SUMMARIES = {
    "fa4": "FlashAttention-4 over blocks (flash-attn-4; Hopper)",
    "cudnn": "cuDNN over blocks (nvidia-cudnn-frontend 1.32; Hopper and Blackwell)",
    "triton": "our Triton kernel (any CUDA card)",
    "cudnn-fp8": "cuDNN over blocks in fp8 (nvidia-cudnn-frontend 1.32; Hopper; lossy; only by name)",
    "sol": "Sol-Attn of comfy-kitchen (8-bit, lossy; only by name)",
}
NEEDS = sparse_exact.NEEDS | {"sol": Requirement((8, 0), "comfy_kitchen", "sol_attn", head_dims=(128,), backward=False)}
# Kernels that round queries, keys and values to 8 bits.
LOSSY = (*sparse_exact.EIGHT_BIT, "sol")
# The exact kernels, fastest first, by compute capability and tokens of a query block. On an H100 a layer of [2, 37440,
# 32, 128] takes, at a density of 0.15, choice and tail included: with blocks of 64 tokens 18.5 ms by cudnn and 19.6 by
# fa4 (dense 65.0; cudnn-fp8 15.8, sol 28.2), with blocks of 128 15.7 by fa4 and 18.3 by triton.
MEASURED = {((9, 0), 64): ("cudnn", "triton", "fa4"), ((9, 0), 128): ("fa4", "triton")}


def refuses(kernel: str, query_block: int) -> str:
    """Why a kernel does not take query blocks of this many tokens, or ""."""
    limited = kernel in NARROW and query_block != BLOCK
    return f"its query blocks have 64 tokens, not {query_block}" if limited else ""


def choose(q: Tensor, k: Tensor, keep: Sequence[int], sink: int, query_block: int) -> tuple[Chosen, Tensor]:
    """The key blocks of every query block, and the means of the keys [B, heads, blocks, head_dim]."""
    means = block_means(k, BLOCK, whole=True)
    return choose_blocks(block_scores(block_means(q, query_block), means), tuple(keep), sink), means


def finish(
    q: Tensor, k: Tensor, v: Tensor, exact: Exact, chosen: Chosen, means_k: Tensor, query_block: int, tail: bool
) -> Tensor:
    """Sparse attention [B, Nq, heads, head_dim] from its exact part: with the tail, and with the keys behind the last
    whole block."""
    whole, tokens = k.shape[1] // BLOCK * BLOCK, q.shape[1]
    out, sums = exact.out[:, :tokens], exact.sums[:, :, :tokens]
    if not tail and whole == k.shape[1]:
        return out
    rest_k, means = k[:, whole:], None
    if exact.shift is not None:
        rest_k = (rest_k - exact.shift.transpose(1, 2)).to(k.dtype)
        means_k = (means_k - exact.shift).to(k.dtype)
    if tail:
        means = means_k, block_means(v, BLOCK, whole=True)
    return add_tail(q, out, sums, means, chosen.mask, (rest_k, v[:, whole:]), query_block)


def attend_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | Sequence[int],
    *,
    sink: int,
    query_block: int,
    tail: bool,
    kernel: str,
) -> Tensor:
    """Sparse attention by the kernel of that name in NEEDS, without gradients and outside of graphs.

    As `optimize.sparse.plain.attend_sparse_plain` up to rounding, except `sol`: q [B, Nq, heads, head_dim], k and v
    [B, Nk, heads, head_dim] in 16 bits -> as q. keep: how many key blocks each head keeps beside the first `sink`,
    [heads] whole numbers; where they lie on a GPU, reading them waits for it. query_block: 64 or 128 tokens. tail:
    whether other blocks count as their means. Raises BackendUnavailable for what `sol` cannot do.
    """
    counts = tuple(int(n) for n in (keep.tolist() if isinstance(keep, Tensor) else keep))
    with torch.no_grad():
        if kernel == "sol":
            return _sol(q, k, v, counts, sink, tail)
        chosen, means = choose(q, k, counts, min(sink, k.shape[1] // BLOCK), query_block)
        exact = attend_exact(q, k, v, chosen, query_block, kernel)
        return finish(q, k, v, exact, chosen, means, query_block, tail)


def _sol(q: Tensor, k: Tensor, v: Tensor, keep: Sequence[int], sink: int, tail: bool) -> Tensor:
    reason = ""
    if q.shape != k.shape:
        reason = "it takes as many queries as keys, not keys from a cache"
    elif len(set(keep)) > 1:
        reason = "it takes one density for all heads"
    if reason:
        raise BackendUnavailable(f"sparse kernel 'sol' cannot run here: {reason}; choose 'auto' or 'plain'")
    # Its number of blocks counts a short last one; the sink is not part of the share.
    others = max(1, -(-k.shape[1] // BLOCK) - sink)
    share = min(max(keep[0], 1) / others, 1 - 1e-6)
    q, k, v = map(whole_tokens, (q, k, v))
    found: Tensor = import_module("comfy_kitchen").sol_attn(q, k, v, sink_blocks=[0, sink], topk_ratio=share, tail=tail)
    return found


_fastest: dict[tuple[object, ...], str] = {}


def attend_fastest(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, *, sink: int, query_block: int, tail: bool, kernels: tuple[str, ...]
) -> Tensor:
    """`attend_sparse` by the fastest of some kernels, each of which is timed at the first call on a GPU."""

    def attend(kernel: str) -> Tensor:
        return attend_sparse(q, k, v, keep, sink=sink, query_block=query_block, tail=tail, kernel=kernel)

    def milliseconds(kernel: str) -> float:
        attend(kernel)  # compiles
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
        for place, mark in enumerate(marks):
            mark.record()
            if place < len(marks) - 1:
                attend(kernel)
        marks[-1].synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in pairwise(marks))

    key = (q.device, q.dtype, q.shape[-1], query_block, tail, kernels)
    if key not in _fastest:
        _fastest[key] = min(kernels, key=milliseconds) if len(kernels) > 1 else kernels[0]
    return attend(_fastest[key])
