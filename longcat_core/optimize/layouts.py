"""The order of tokens in one pass, and the attention kernels that go with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import LongCatError
from ..model.kv_cache import KVCache, Reference
from ..model.transformer import FrameLayout, ReferenceLayout
from . import attention
from .block_sparse import BlockSparse, ChunkedLayout, with_block_sparse
from .requirement import Inputs
from .sparse.layout import SparseLayout
from .sparse.passes import MIXED, SparsePass, mixed, plan_pass, with_attend


def choose_layout(
    execution: Any,
    x: Tensor,
    timestep: Tensor,
    num_cond: int,
    start: int,
    filling: bool,
    kernels: attention.Kernels,
    grad: bool,
    progress: float | None,
    reference: Reference | None,
) -> tuple[FrameLayout, attention.Kernels, SparsePass | None]:
    """The order of tokens and the kernels for it, and which layers of an `Execution` are sparse, if any.

    start: number of cached frames in front of x. Frames are as `Execution.__call__` has them.
    """
    dense = FrameLayout() if reference is None else ReferenceLayout(reference)
    grid = execution.grid(x)
    # Noise frames will follow the frames of a cache that is being filled, so there is more than one frame.
    if execution.block_sparse is not None and reference is None and BlockSparse.applies(start + grid[0] + filling):
        chunked = ChunkedLayout.of(grid, execution.block_sparse, num_cond, start, x.device)
        if torch.compiler.is_compiling() or not chunked.mixes(timestep):
            eight_bit = execution.optimizations.fp8 and execution.eight_bit
            return chunked, with_block_sparse(kernels, chunked.keys, execution.block_sparse, eight_bit), None
        execution.say(MIXED)
        return dense, kernels, None
    settings = None if filling or execution.block_sparse is not None else execution.sparse
    if settings is None or torch.compiler.is_compiling():
        return dense, kernels, None
    inputs = Inputs(x.device, execution.active_dtype(x.device), execution.config.head_dim, grad)
    apart = int(reference is not None)
    sparse = plan_pass(settings, inputs, kernels.attend, progress, grid, num_cond, start, execution.say, apart)
    if sparse is not None and mixed(timestep, num_cond):
        execution.say(MIXED)
        sparse = None
    if sparse is None:
        return dense, kernels, None
    layout = SparseLayout(grid, num_cond, x.device, start, reference)
    return layout, with_attend(kernels, sparse.attend, layout), sparse


def check_reference(cache: KVCache | None, reference: Reference | None) -> None:
    """Raise LongCatError if a cache's first frame has another position than the reference of the pass that uses it."""
    position = None if reference is None else reference.position
    if cache is not None and cache.reference != position:
        raise LongCatError(
            f"the cache has its reference frame at {cache.reference}, not at {position}; fill one with this reference"
        )
