"""The exact part of sparse attention: every query block over the key blocks in its list, with the log-sum-exp.

The kernels are our own (`triton`, any CUDA card), FlashAttention-4's (`fa4`) and those of the cuDNN frontend, in 16
bits (`cudnn`) and in 8 (`cudnn-fp8`). Lists name whole key blocks only, so that no kernel has to mask keys. cuDNN
wants whole query blocks too: queries are padded for it.

`cudnn-fp8` takes keys without their mean over all tokens, as SageAttention does. This shifts all scores of a query by
the same amount, and with them the log-sum-exp; whoever merges it must shift other keys alike. Its kernel has one number
of key blocks for all lists, so heads that keep different numbers go through it one group after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..requirement import Requirement
from . import block_sparse, sparse_fp8
from .elementwise import whole_tokens
from .sparse_choose import BLOCK, Chosen, on_device
from .sparse_fp8 import CUDNN

# Triton's stages by rows of a query tile, on compute capabilities 9 and 10. Measured on an H100 over 0.15 of the blocks
# of [2, 37440, 32, 128]: 15.0 ms with 64 rows, 14.4 with 128; the stages that suit the refinement take 18.5 and 15.6.
STAGES = {64: 5, 128: 7}


class Exact(NamedTuple):
    """out: [B, Nq or more, heads, head_dim] in 16 bits, with any strides. sums: [B, heads, Nq or more] fp32, its
    log-sum-exp. shift: [B, heads, 1, head_dim] fp32, the key that was subtracted from all others, or None."""

    out: Tensor
    sums: Tensor
    shift: Tensor | None = None


NEEDS = {
    "fa4": block_sparse.NEEDS["fa4"],
    "cudnn": Requirement((9, 0), f"{CUDNN}._interface", "bsa_attn_fwd", triton=True, head_dims=(128,), backward=False),
    "cudnn-fp8": sparse_fp8.NEEDS,
    "triton": block_sparse.NEEDS["triton"],
}
# Of the kernels above, those that round queries, keys and values to 8 bits.
EIGHT_BIT = ("cudnn-fp8",)


def _triton(q: Tensor, k: Tensor, v: Tensor, chosen: Chosen, query_block: int) -> Exact:
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else (0, 0)
    tiles = block_sparse.choose_tiles(capability, query_block, BLOCK)
    if capability[0] in (9, 10):
        tiles = tiles._replace(stages=STAGES[tiles.rows])
    sums = torch.empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32, device=q.device)
    # Without padding, numbers of real tokens are not read.
    lists = chosen.indices, chosen.counts, chosen.counts
    return Exact(block_sparse.launch_attend(q, k, v, *lists, query_block, False, tiles, sums, BLOCK), sums)


def _fa4(q: Tensor, k: Tensor, v: Tensor, chosen: Chosen, query_block: int) -> Exact:
    whole = k.shape[1] // BLOCK * BLOCK
    q, k, v = (whole_tokens(x) for x in (q, k[:, :whole], v[:, :whole]))
    return Exact(*block_sparse.launch_flash4(q, k, v, chosen.indices, chosen.counts, (query_block, BLOCK), sums=True))


def _padded(x: Tensor, tokens: int) -> Tensor:
    """x [B, N, ..] with zeros behind it up to a multiple of `tokens`; a copy only where some are missing."""
    short = -x.shape[1] % tokens
    return F.pad(x, (0, 0, 0, 0, 0, short)) if short else x


def _cudnn(q: Tensor, k: Tensor, v: Tensor, chosen: Chosen, query_block: int) -> Exact:
    whole, same = k.shape[1] // BLOCK * BLOCK, len(set(chosen.per_head)) == 1
    q, k, v = (whole_tokens(x) for x in (_padded(q, BLOCK), k[:, :whole], v[:, :whole]))
    found = import_module(f"{CUDNN}.api").block_sparse_attention_forward(
        *(q, k, v, chosen.indices, chosen.per_head[0]),
        q2k_block_nums=None if same else chosen.counts,
        sparse_block_size=BLOCK,
        # Lists of one length may be split where keys and values of a head exceed the L2 cache.
        **({"kv_splits": "auto"} if same and torch.cuda.get_device_capability(q.device)[0] == 9 else {}),
        layout="bshd",
    )
    return Exact(found["o_tensor"], found["lse_tensor"])


def _cudnn_fp8(q: Tensor, k: Tensor, v: Tensor, chosen: Chosen, query_block: int) -> Exact:
    lengths = sorted(set(chosen.per_head))
    if len(lengths) == 1:
        return _one_length((q, k, v), chosen.indices, lengths[0])
    heads = q.shape[2]
    shape = q.shape[0], heads, -(-q.shape[1] // BLOCK) * BLOCK, q.shape[3]
    out, sums = q.new_empty(shape), q.new_empty(shape[:3], dtype=torch.float32)
    shift = q.new_empty((shape[0], heads, 1, shape[3]), dtype=torch.float32)
    for length in lengths:
        numbers = tuple(head for head, other in enumerate(chosen.per_head) if other == length)
        group = on_device(numbers, q.device)
        part = _one_length([x.index_select(2, group) for x in (q, k, v)], chosen.indices[:, group], length)
        assert part.shift is not None
        out[:, group], sums[:, group], shift[:, group] = part.out.transpose(1, 2), part.sums, part.shift
    return Exact(out.transpose(1, 2), sums, shift)


def _one_length(qkv: Sequence[Tensor], indices: Tensor, length: int) -> Exact:
    """8-bit attention of heads whose lists all have the same length."""
    q, k, v = qkv
    whole = k.shape[1] // BLOCK * BLOCK
    out, sums, mean = sparse_fp8.attend_fp8(q, k[:, :whole], v[:, :whole], indices, length)
    return Exact(out.transpose(1, 2), sums, mean)


ATTEND: dict[str, Callable[[Tensor, Tensor, Tensor, Chosen, int], Exact]] = {
    "fa4": _fa4,
    "cudnn": _cudnn,
    "cudnn-fp8": _cudnn_fp8,
    "triton": _triton,
}


def attend_exact(q: Tensor, k: Tensor, v: Tensor, chosen: Chosen, query_block: int, kernel: str) -> Exact:
    """Attention of each query block to the key blocks in its list, scale head_dim^-0.5, by the kernel of that name.

    q [B, Nq, heads, head_dim], k and v [B, Nk, heads, head_dim] in 16 bits. Keys behind the last whole block are left
    out.
    """
    return ATTEND[kernel](q, k, v, chosen, query_block)
