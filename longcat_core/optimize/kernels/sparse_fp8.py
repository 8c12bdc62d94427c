"""Attention over lists of key blocks in 8 bits, by cuDNN's kernel for Hopper (nvidia-cudnn-frontend 1.32). Lossy.

It takes tokens in the form of SageAttention (arXiv 2411.10958): one scale for each query, one for 16 keys, from which
their mean over all tokens was subtracted, and one for each channel of the values. Tokens of a head lie side by side,
values with their channels as rows. One pass over memory finds the extents and one writes, from tokens as the network
has them.
"""

from __future__ import annotations

from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor

from ..requirement import Requirement
from .elementwise import E4M3_MAX, whole_tokens
from .jit import jit, tl, triton

CUDNN = "cudnn.block_sparse_attention"
NEEDS = Requirement(
    *((9, 0), f"{CUDNN}._interface", "_bsa_attn_fwd_sm90_fp8_blk64"),
    exactly=True,
    triton=True,
    dtypes=(torch.bfloat16,),
    head_dims=(128,),
    backward=False,
)
# Tokens of a program, and of a program that finds extents.
ROWS, CHUNK = 64, 256
# Keys that share a scale.
GROUP = 16
# The least largest magnitude of a group.
LEAST = 1e-3


class Packed(NamedTuple):
    """q, k: e4m3 [B, heads, N, head_dim]. v: e4m3 [B, heads, head_dim, Nk]. Scales in fp32: q_scale [B, heads, Nq],
    k_scale [B, heads, Nk / 16], v_scale [heads, head_dim]. In the order of the kernel's arguments."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_scale: Tensor
    k_scale: Tensor
    v_scale: Tensor


@jit
def _sparse_fp8_extents(
    k, v, sums, largest, tokens, k_sample, k_stride, v_sample, v_stride,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """By channel, the sum of the keys of one chunk and the largest magnitude of its values."""
    head, part, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, DIM)
    k += sample * k_sample + head * DIM
    v += sample * v_sample + head * DIM
    total = tl.zeros((DIM,), tl.float32)
    most = tl.zeros((DIM,), tl.float32)
    for start in range(0, CHUNK, ROWS):
        at = (part * CHUNK + start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        key = tl.load(k + at * k_stride + channel[None, :], mask=at < tokens, other=0.0).to(tl.float32)
        value = tl.load(v + at * v_stride + channel[None, :], mask=at < tokens, other=0.0).to(tl.float32)
        total += tl.sum(key, axis=0)
        most = tl.maximum(most, tl.max(tl.abs(value), axis=0))
    index = ((sample * tl.num_programs(0) + head) * tl.num_programs(1) + part) * DIM + channel
    tl.store(sums + index, total)
    tl.store(largest + index, most)


@jit
def _sparse_fp8_rows(
    x, mean, out, scales, tokens, padded, x_sample, x_stride,
    CENTERED: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Queries or keys with one scale for GROUP tokens; zeros behind the tokens."""
    head, part, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, DIM)[None, :]
    row = part * ROWS + tl.arange(0, ROWS)
    there = row[:, None] < tokens
    at = row.to(tl.int64)[:, None] * x_stride + channel
    value = tl.load(x + sample * x_sample + head * DIM + at, mask=there, other=0.0).to(tl.float32)
    pair = sample * tl.num_programs(0) + head
    if CENTERED:
        value = tl.where(there, value - tl.load(mean + pair * DIM + channel), 0.0)
    groups: tl.constexpr = ROWS // GROUP
    most = tl.max(tl.max(tl.reshape(tl.abs(value), (groups, GROUP, DIM)), axis=2), axis=1)
    scale = tl.maximum(most, 1e-3) / 448.0
    tl.store(scales + pair * (padded // GROUP) + part * groups + tl.arange(0, groups), scale)
    value = tl.reshape(tl.reshape(value, (groups, GROUP, DIM)) / scale[:, None, None], (ROWS, DIM))
    value = tl.minimum(tl.maximum(value, -448.0), 448.0)
    at = (pair * padded + row)[:, None] * DIM + channel
    tl.store(out + at, value.to(out.dtype.element_ty))


@jit
def _sparse_fp8_columns(
    v, scale, out, tokens, v_sample, v_stride,
    ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Values with one scale for each channel, channels as rows."""
    head, part, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, DIM)
    row = part * ROWS + tl.arange(0, ROWS)
    at = row.to(tl.int64)[:, None] * v_stride + channel[None, :]
    value = tl.load(v + sample * v_sample + head * DIM + at).to(tl.float32)
    value = value * (1.0 / tl.load(scale + head * DIM + channel))[None, :]
    value = tl.trans(tl.minimum(tl.maximum(value, -448.0), 448.0))
    pair = sample * tl.num_programs(0) + head
    tl.store(out + (pair * DIM + channel)[:, None] * tokens + row[None, :], value.to(out.dtype.element_ty))


def quantize(q: Tensor, k: Tensor, v: Tensor) -> tuple[Packed, Tensor]:
    """q [B, Nq, heads, head_dim], k and v [B, Nk, heads, head_dim] in 8 bits, and the keys' mean in fp32 [B, heads, 1,
    head_dim]. Queries are padded with zeros to a multiple of 64; Nk must be one.
    """
    q, k, v = map(whole_tokens, (q, k, v))
    batch, keys, heads, dim = k.shape
    padded = triton.cdiv(q.shape[1], ROWS) * ROWS
    parts = triton.cdiv(keys, CHUNK)
    sums = torch.empty((batch, heads, parts, dim), dtype=torch.float32, device=q.device)
    largest = torch.empty_like(sums)
    strides = k.stride(0), k.stride(1), v.stride(0), v.stride(1)
    _sparse_fp8_extents[(heads, parts, batch)](k, v, sums, largest, keys, *strides, CHUNK=CHUNK, ROWS=ROWS, DIM=dim)
    mean = sums.sum(2, keepdim=True) / keys
    v_scale = largest.amax((0, 2)).clamp(min=LEAST) / E4M3_MAX

    def eight(*shape: int) -> Tensor:
        return torch.empty((batch, heads, *shape), dtype=torch.float8_e4m3fn, device=q.device)

    def rows(x: Tensor, whole: int, group: int, center: Tensor | None) -> tuple[Tensor, Tensor]:
        out = eight(whole, dim)
        scales = torch.empty((batch, heads, whole // group), dtype=torch.float32, device=x.device)
        _sparse_fp8_rows[(heads, whole // ROWS, batch)](
            *(x, center, out, scales, x.shape[1], whole, x.stride(0), x.stride(1)),
            CENTERED=center is not None,
            ROWS=ROWS,
            GROUP=group,
            DIM=dim,
            # For groups of 16, four warps exchange values and run twice the instructions of eight.
            num_warps=4 if group == 1 else 8,
        )
        return out, scales

    packed_q, q_scale = rows(q, padded, 1, None)
    packed_k, k_scale = rows(k, keys, GROUP, mean)
    packed_v = eight(dim, keys)
    _sparse_fp8_columns[(heads, keys // ROWS, batch)](
        v, v_scale, packed_v, keys, v.stride(0), v.stride(1), ROWS=ROWS, DIM=dim
    )
    return Packed(packed_q, packed_k, packed_v, q_scale, k_scale, v_scale), mean


def attend_fp8(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of blocks of 64 queries to the first `length` of the blocks of 64 keys in `indices`.

    q [B, Nq, heads, 128], k and v [B, Nk, heads, 128] bf16, Nk a multiple of 64; indices [B, heads, query blocks, w]
    int32. Returns the output [B, heads, Nq or more, 128] bf16, its log-sum-exp [B, heads, Nq or more] fp32, and the
    keys' mean [B, heads, 1, 128] fp32. Since that was subtracted, the log-sum-exp of a query lacks its product with the
    query, times head_dim^-0.5.
    """
    attend = import_module(f"{CUDNN}._interface")._bsa_attn_fwd_sm90_fp8_blk64
    with torch.cuda.device(q.device):
        packed, mean = quantize(q, k, v)
        out, sums = attend(*packed, indices[..., :length].contiguous(), length)
    return out, sums, mean
