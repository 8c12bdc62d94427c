"""Blocks under torch.compile: which inputs need a graph of their own, and which sizes are symbolic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..model.attention import Groups
from ..model.block import Block, run_block
from ..model.ops import Rope
from ..model.text import BlockText
from . import attention, operators
from .compilation import Regional
from .fused import TorchOps

WHAT = "the transformer block"
# One graph serves all blocks of all networks of a process.
COMPILED_BLOCK = Regional(run_block, WHAT)
# What compiles a block, or None to run it as it is.
Compilers = Callable[[Block], Regional | None]


def compiled_call(
    compilers: Compilers,
    ops: TorchOps,
    grid: Sequence[int],
    announce: Callable[[str], None],
    uncompiled: Callable[[Block, torch.device], bool] | None = None,
) -> Callable[..., Tensor]:
    """`run_block` through what compiles the block, for tokens of this grid (frames, tokens per frame).

    uncompiled: see `Execution`.
    """
    backend = attention.is_known(ops.kernels.attend)
    frames = None if ops.kernels.frames is None else operators.attend_foreign_frames
    within = ops if backend else ops.with_kernels(attend=operators.attend_foreign, quantized=None, frames=frames)

    def call(
        block: Block,
        x: Tensor,
        temb: Tensor,
        text: BlockText | None,
        rope: Rope,
        cached: tuple[Tensor, Tensor] | None,
        ops: TorchOps,
        groups: Groups,
        *keep: Any,
    ) -> Tensor:
        compiled = compilers(block)
        if compiled is None or (uncompiled is not None and uncompiled(block, x.device)):
            return run_block(block, x, temb, text, rope, cached, ops, groups, *keep)
        frames = temb.shape[1]
        batches = x.shape[0], temb.shape[0]
        kind: tuple[Any, ...] = (*batches, frames == 1, cached is None, groups, x.dtype, x.device, within)
        size = grid, None if cached is None else cached[0].shape[1]
        sized = [(x, (1, 2)), *((table, (0,)) for table in rope), *((part, (1,)) for part in cached or ())]
        if frames > 1:
            sized.append((temb, (1,)))
        varying: list[tuple[Tensor, tuple[int, ...]]] = []
        if text is not None and text.audio is not None:
            heard = text.audio
            of_frames = [rows for rows in (heard.tokens, *(heard.keys or ())) if rows is not None]
            sized += [(rows, (1, 2)) for rows in of_frames]
            sized += [] if heard.classes is None else [(heard.classes, (0,))]
            classes = None if heard.classes is None else heard.classes.shape[1]
            kind = *kind, of_frames[0].shape[0], heard.keys is None, classes
        if text is not None and text.bias is not None:
            read = (text.tokens, *(text.keys or ()))
            varying = [*((rows, (1,)) for rows in read if rows is not None), (text.bias, (3,))]
            if text.packing is not None:
                varying.append((text.packing.rows, (0,)))
        with nullcontext() if backend else operators.foreign_kernel(ops.kernels.attend, ops.kernels.frames):
            return compiled(
                *(block, x, temb, text, rope, cached, within, groups, *keep),
                kind=kind,
                size=size,
                varying=varying,
                sized=sized,
                announce=announce,
            )

    return call
