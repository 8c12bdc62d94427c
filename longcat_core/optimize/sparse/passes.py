"""One forward pass under sparse attention: which attention each layer runs.

In compiled graphs the attention of a pass is one opaque operator, and all that depends on layer and step happens within
it. So one graph serves dense and sparse passes and all layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor

from ..attention import Kernels
from ..fused import attend_by_frames
from ..operators import Attend
from ..requirement import Inputs
from .choose import SparseBackend, choose_sparse
from .layout import SparseLayout
from .settings import BLOCK, Sparse, kept

# Of fewer key blocks behind conditioning frames nothing is left out: a dense kernel is as fast.
MIN_BLOCKS = 16
MIXED = "frames without noise stand behind others in this video, so it attends to all tokens"


def blocks_of(tokens: int, sink_tokens: int) -> tuple[int, int]:
    """The number of sink blocks and that of all others, for this many keys; sink_tokens: at the front, exact."""
    blocks = tokens // BLOCK
    sink = min(blocks, math.ceil(sink_tokens / BLOCK))
    return sink, blocks - sink


@lru_cache(maxsize=1024)
@torch.inference_mode(False)  # made while sampling, it serves other passes too
def kept_blocks(densities: tuple[float, ...], blocks: int) -> Tensor | None:
    """How many of `blocks` blocks each head keeps, [heads] int32 on the CPU; None: every head keeps all."""
    found = kept(densities, blocks)
    return None if min(found) >= blocks else torch.tensor(found, dtype=torch.int32)


class SparsePass:
    """The self-attention of one forward pass: `attend` stands in for an attention backend.

    layer: the block that runs, counted from 0; whoever calls the blocks sets it. first_head: which of its heads the
    given ones begin with, where they are not all.
    """

    def __init__(
        self,
        settings: Sparse,
        backend: SparseBackend,
        dense: Attend,
        progress: float | None,
        keys: int,
        sink: int,
        apart: int = 0,
    ) -> None:
        """dense: the kernel of dense layers and of all other attention. progress: share of the steps that is done.
        keys: number of tokens, cached ones included; sink: of conditioning frames, at the front; apart: of a reference
        frame in front of these, which some queries do not see."""
        self.settings, self.backend, self.dense = settings, backend, dense
        self.progress, self.keys, self.layer, self.first_head = progress, keys, 0, 0
        # Of an attention over all keys, and of one without the reference frame: sink blocks and others.
        self.blocks = {keys - hidden: blocks_of(keys - hidden, sink - hidden) for hidden in (0, apart)}

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, Nq, H, D], k and v [B, Nk, H, D] of block `layer` -> as q."""
        # Conditioning frames attend to each other alone, and a text may come this way too.
        if k.shape[1] not in self.blocks:
            return self.dense(q, k, v)
        settings, (sink, others), first = self.settings, self.blocks[k.shape[1]], self.first_head
        past = first + q.shape[2]
        found = settings.of(self.progress, self.layer, past)[first:past]
        # Heads past the last one are zeros, as several ranks have them where heads do not divide.
        keep = kept_blocks(found + (0.0,) * (q.shape[2] - len(found)), others)
        if keep is None:
            return self.dense(q, k, v)
        return self.backend.attend(q, k, v, keep, sink=sink, query_block=settings.queries, tail=settings.tail)


def plan_pass(
    settings: Sparse,
    inputs: Inputs,
    dense: Attend,
    progress: float | None,
    grid: tuple[int, int, int],
    cond: int,
    start: int,
    say: Callable[[str], None],
    apart: int = 0,
) -> SparsePass | None:
    """The self-attention of a pass over a grid of tokens (frames, rows, columns), or None: it is dense.

    cond: conditioning frames at the front of the grid; start: cached frames in front of it; apart: how many of these
    are reference frames. say: receives the reason for a dense pass where users would not expect one. Raises
    BackendUnavailable if a kernel chosen by name cannot run.
    """
    if settings.dense_at(progress) or cond >= grid[0]:
        return None
    if inputs.grad:
        say("sparse attention has no gradients; passes with gradients attend to all tokens")
        return None
    spatial = grid[1] * grid[2]
    keys, given = (start + grid[0]) * spatial, (start + cond) * spatial
    if keys - given < MIN_BLOCKS * BLOCK:
        say(
            f"this video has {keys - given} tokens to generate, too few for sparse attention, which needs "
            f"{MIN_BLOCKS * BLOCK}; it attends to all tokens"
        )
        return None
    backend = choose_sparse(settings.kernel, inputs, settings.queries, settings.tail)
    if backend.name == "plain" != settings.kernel and inputs.device.type == "cuda":
        say("sparse attention runs in plain PyTorch, which is slow; longcat backends says why no kernel runs")
    return SparsePass(settings, backend, dense, progress, keys, given, apart * spatial)


def mixed(timestep: Tensor, num_cond: int) -> bool:
    """Whether frames behind the first `num_cond` ones differ in their timestep [B or 1] or [B or 1, T or 1]."""
    noise = timestep[:, num_cond:] if timestep.ndim == 2 and timestep.shape[1] > 1 else timestep.view(-1, 1)
    return noise.shape[1] > 1 and bool((noise != noise[:, :1]).any())


def with_attend(chosen: Kernels, attend: Attend, layout: SparseLayout | None = None) -> Kernels:
    """The kernels of a pass whose self-attention is `attend`. layout: of its tokens; None: the order of frames."""
    frames = partial(attend_by_frames, chosen)
    return chosen._replace(attend=attend, quantized=None, frames=frames if layout is None else layout.by_frames(frames))


def like_sparse(chosen: Kernels) -> Kernels:
    """The kernels of a dense pass that shall run the graphs of sparse ones."""
    # No backend's own kernel, so compiled blocks hold the operator for kernels that may change with every pass.
    return with_attend(chosen, lambda q, k, v: chosen.attend(q, k, v))
