"""Attention from video tokens to the few keys of a text, with the norm of the queries, in one Triton kernel.

Over so few keys attention moves data and hardly computes: what counts is that each query is read once and each output
written once. General kernels read queries that another kernel has normed, and know no bias, or are slow with one: so
folded padding had to be written out for them, most of 512 keys being the same one. Here its logarithm is added in fp32.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import EPS, HALF, _operator, find_spec

if find_spec("triton") is not None:
    import triton
    import triton.language as tl
else:
    triton = None

# Queries of a program and keys at a time, its warps and stages.
ROWS, COLUMNS, WARPS, STAGES = 64, 64, 4, 2


def refuses(x: Tensor, head_dim: int) -> str:
    """Why the kernel cannot take activations like x [.., C] with heads of `head_dim`, or ""; see `kernels.usable`."""
    if x.dtype not in HALF:
        return f"it takes bfloat16 or float16, not {str(x.dtype).removeprefix('torch.')}"
    return "" if head_dim in (16, 32, 64, 128) else f"it takes head dims of 16, 32, 64 and 128, not {head_dim}"


def plain_text_attention(q: Tensor, weight: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """The twin of `text_attention`."""
    q = q.float() * torch.rsqrt(q.float().square().mean(-1, keepdim=True) + EPS) * weight.float()
    q, k, v = (x.transpose(1, 2).float() for x in (q.to(k.dtype), k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


if triton is not None:

    @triton.jit(do_not_specialize=["keys"])
    def _text_attention(
        q,
        weight,
        k,
        v,
        bias,
        out,
        tokens,
        keys,
        heads,
        k_sample,
        k_stride,
        v_sample,
        v_stride,
        bias_sample,
        scale,
        eps,
        BIAS: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        DIM: tl.constexpr,
    ):
        # Heads side by side, so that the programs of one time read whole tokens.
        head = tl.program_id(0)
        first = tl.program_id(1) * ROWS
        sample = tl.program_id(2).to(tl.int64)
        row = tl.arange(0, ROWS)
        channel = tl.arange(0, DIM)
        # Offsets within a tile are small numbers; what is large about them is the tile's.
        start = ((sample * tokens + first) * heads + head) * DIM
        at = row[:, None] * (heads * DIM) + channel[None, :]
        mask = row[:, None] < tokens - first
        value = tl.load(q + start + at, mask=mask, other=0).to(tl.float32)
        value *= tl.rsqrt(tl.sum(value * value, axis=1) / DIM + eps)[:, None]
        query = (value * tl.load(weight + channel).to(tl.float32)[None, :]).to(k.dtype.element_ty)
        # Finite, so that keys which count nothing may come first.
        top = tl.full((ROWS,), -1e30, tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        summed = tl.zeros((ROWS, DIM), tl.float32)
        k += sample * k_sample + head * DIM
        v += sample * v_sample + head * DIM
        for begin in range(0, keys, COLUMNS):
            key = begin + tl.arange(0, COLUMNS)
            there = key < keys
            k_tile = tl.load(k + key[None, :] * k_stride + channel[:, None], mask=there[None, :], other=0)
            scores = tl.dot(query, k_tile) * scale
            if BIAS:
                more = tl.load(bias + sample * bias_sample + key, mask=there, other=float("-inf"))
                # Powers of two throughout.
                scores += (more * 1.4426950408889634)[None, :]
            else:
                scores = tl.where(there[None, :], scores, float("-inf"))
            highest = tl.maximum(top, tl.max(scores, axis=1))
            share = tl.exp2(scores - highest[:, None])
            shrink = tl.exp2(top - highest)
            total = total * shrink + tl.sum(share, axis=1)
            v_tile = tl.load(v + key[:, None] * v_stride + channel[None, :], mask=there[:, None], other=0)
            summed = summed * shrink[:, None] + tl.dot(share.to(v.dtype.element_ty), v_tile)
            top = highest
        tl.store(out + start + at, (summed / total[:, None]).to(out.dtype.element_ty), mask=mask)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride()[2:] == (x.shape[3], 1) else x.contiguous()


def _launch(q: Tensor, weight: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    batch, tokens, heads, dim = q.shape
    k, v = _dense(k), _dense(v)
    bias = None if bias is None else bias.contiguous().expand(batch, 1, 1, -1)
    # One text may be that of all videos.
    samples = [0 if x.shape[0] == 1 else x.stride(0) for x in (k, v)]
    _text_attention[(heads, triton.cdiv(tokens, ROWS), batch)](
        *(q, weight, k, v, bias, out, tokens, k.shape[1], heads),
        *(samples[0], k.stride(1), samples[1], v.stride(1), 0 if bias is None else bias.stride(0)),
        *(dim**-0.5 / math.log(2), EPS),
        BIAS=bias is not None,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        DIM=dim,
        num_warps=WARPS,
        num_stages=STAGES,
    )
    return out


def _text_attention_op(q: Tensor, weight: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    return _launch(q, weight, k, v, bias, q.new_empty(q.shape))


_text_attention_op = _operator("text_attention", _text_attention_op, lambda q, weight, k, v, bias: q.new_empty(q.shape))


def text_attention(q: Tensor, weight: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(RMSNorm(q) k^T / sqrt(head_dim) + bias) v: q [B, N, heads, head_dim] in 16 bits -> the same.

    weight [head_dim], of the norm; k, v [B or 1, M, heads, head_dim]; bias [B or 1, 1, 1, M] fp32 or None, with one
    finite number a sample at least. Outside of compiled graphs the result is written into q.
    """
    q = q.contiguous()
    if torch.compiler.is_compiling():
        return _text_attention_op(q, weight, k, v, bias)
    return _launch(q, weight, k, v, bias, q)
