"""Attention from video tokens to the few keys of a text, with the norm of the queries, in one Triton kernel.

Over so few keys attention is bound by memory traffic: each query should be read once and each output written once.
General kernels read queries that another kernel has normed, and take no bias or are slow with one, so that folded
padding has to be written out for them: most of 512 keys are then the same. Here its logarithm is added in fp32.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..operators import operator
from ..requirement import Requirement
from .elementwise import E4M3_MAX, EPS, TINY, Quantized, whole_tokens
from .jit import jit, tl, triton

# Measured on an H100 with 74,880 tokens of 32 heads of 128 channels, norm included: 0.64 ms over 127 keys, 1.42 over
# 257, 2.35 over 512; the norm and cuDNN, which needs the padding written out to 512 keys, take 1.63.
# Most keys that a program holds for all its queries.
SHORT = 128
# Queries of a tile, tiles of a program and its warps.
SHORT_ROWS, SHORT_TILES, SHORT_WARPS = 64, 16, 4
# Queries of a program, keys at a time, warps and stages for more keys than that.
ROWS, COLUMNS, WARPS, STAGES = 64, 32, 4, 2
# Most keys for which this kernel is the fastest.
LONGEST = 288


HEAD_DIMS = (16, 32, 64, 128)
NEEDS = Requirement(triton=True, head_dims=HEAD_DIMS, backward=False)


def refuses(head_dim: int, keys: int) -> str:
    """Why heads of `head_dim` channels over `keys` keys do not go through the kernel, or ""."""
    if head_dim not in HEAD_DIMS:
        return f"it takes head dims of 16, 32, 64 and 128, not {head_dim}"
    return f"over more than {LONGEST} keys other kernels are faster; these are {keys}" if keys > LONGEST else ""


def plain_text_attention(q: Tensor, weight: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """`text_attention` in plain PyTorch, in fp32 -> [B, N, heads, head_dim]."""
    q = q.float() * torch.rsqrt(q.float().square().mean(-1, keepdim=True) + EPS) * weight.float()
    q, k, v = (x.transpose(1, 2).float() for x in (q.to(k.dtype), k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


@jit
def _normed(q, at, mask, weight, channel, eps, DIM: tl.constexpr):
    value = tl.load(q + at, mask=mask, other=0.0).to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, axis=1) / DIM + eps)[:, None]
    return value * tl.load(weight + channel).to(tl.float32)[None, :]


@jit
def _store(out, at, mask, value, scales, sample, FP8: tl.constexpr):
    if FP8:
        # A mean of values does not exceed the largest; rounded weights may add up to a little more than 1.
        value = tl.minimum(tl.maximum(value * (1 / tl.load(scales + sample)), -448.0), 448.0)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)


@jit(do_not_specialize=["keys"])
def _short_text_attention(
    q, weight, k, v, bias, out, scales, tokens, keys, heads, k_sample, k_stride, v_sample, v_stride, bias_sample,
    scale, eps,
    BIAS: tl.constexpr, FP8: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, KEYS: tl.constexpr,
    DIM: tl.constexpr,
):  # fmt: skip
    # Heads side by side, so that programs that run together read whole tokens.
    head = tl.program_id(0)
    sample = tl.program_id(2).to(tl.int64)
    row = tl.arange(0, ROWS)
    channel = tl.arange(0, DIM)
    key = tl.arange(0, KEYS)
    there = key < keys
    k += sample * k_sample + head * DIM
    v += sample * v_sample + head * DIM
    k_tile = tl.load(k + key[None, :] * k_stride + channel[:, None], mask=there[None, :], other=0.0)
    v_tile = tl.load(v + key[:, None] * v_stride + channel[None, :], mask=there[:, None], other=0.0)
    if BIAS:
        more = tl.load(bias + sample * bias_sample + key, mask=there, other=float("-inf")) * 1.4426950408889634
    else:
        more = tl.where(there, 0.0, float("-inf"))
    for tile in range(TILES):
        # Offsets within a tile are small; the large part of an address is the tile's.
        first = (tl.program_id(1) * TILES + tile) * ROWS
        start = ((sample * tokens + first) * heads + head) * DIM
        at = row[:, None] * (heads * DIM) + channel[None, :]
        mask = row[:, None] < tokens - first
        query = _normed(q, start + at, mask, weight, channel, eps, DIM).to(k.dtype.element_ty)
        scores = tl.dot(query, k_tile) * scale + more[None, :]
        # Powers of two throughout.
        share = tl.exp2(scores - tl.max(scores, axis=1)[:, None])
        summed = tl.dot(share.to(v.dtype.element_ty), v_tile)
        _store(out, start + at, mask, summed / tl.sum(share, axis=1)[:, None], scales, sample, FP8)


@jit(do_not_specialize=["keys"])
def _text_attention(
    q, weight, k, v, bias, out, scales, tokens, keys, heads, k_sample, k_stride, v_sample, v_stride, bias_sample,
    scale, eps,
    BIAS: tl.constexpr, FP8: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    first = tl.program_id(1) * ROWS
    sample = tl.program_id(2).to(tl.int64)
    row = tl.arange(0, ROWS)
    channel = tl.arange(0, DIM)
    start = ((sample * tokens + first) * heads + head) * DIM
    at = row[:, None] * (heads * DIM) + channel[None, :]
    mask = row[:, None] < tokens - first
    query = _normed(q, start + at, mask, weight, channel, eps, DIM).to(k.dtype.element_ty)
    # Finite, so that keys of weight 0 may come first.
    top = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    summed = tl.zeros((ROWS, DIM), tl.float32)
    k += sample * k_sample + head * DIM
    v += sample * v_sample + head * DIM
    for begin in range(0, keys, COLUMNS):
        key = begin + tl.arange(0, COLUMNS)
        there = key < keys
        k_tile = tl.load(k + key[None, :] * k_stride + channel[:, None], mask=there[None, :], other=0.0)
        scores = tl.dot(query, k_tile) * scale
        if BIAS:
            more = tl.load(bias + sample * bias_sample + key, mask=there, other=float("-inf"))
            scores += (more * 1.4426950408889634)[None, :]
        else:
            scores = tl.where(there[None, :], scores, float("-inf"))
        highest = tl.maximum(top, tl.max(scores, axis=1))
        share = tl.exp2(scores - highest[:, None])
        shrink = tl.exp2(top - highest)
        total = total * shrink + tl.sum(share, axis=1)
        v_tile = tl.load(v + key[:, None] * v_stride + channel[None, :], mask=there[:, None], other=0.0)
        summed = summed * shrink[:, None] + tl.dot(share.to(v.dtype.element_ty), v_tile)
        top = highest
    _store(out, start + at, mask, summed / total[:, None], scales, sample, FP8)


def _launch(
    q: Tensor, weight: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, scales: Tensor | None = None
) -> Tensor:
    batch, tokens, heads, dim = q.shape
    k, v = whole_tokens(k), whole_tokens(v)
    bias = None if bias is None else bias.contiguous().expand(batch, 1, 1, -1)
    # One text may serve all videos.
    samples = [0 if x.shape[0] == 1 else x.stride(0) for x in (k, v)]
    args = (
        *(q, weight, k, v, bias, out, scales, tokens, k.shape[1], heads),
        *(samples[0], k.stride(1), samples[1], v.stride(1), 0 if bias is None else bias.stride(0)),
        *(dim**-0.5 / math.log(2), EPS),
    )
    common = {"BIAS": bias is not None, "FP8": scales is not None, "DIM": dim}
    if k.shape[1] <= SHORT:
        # The products take at least 16.
        keys = max(16, triton.next_power_of_2(k.shape[1]))
        tiles = {"ROWS": SHORT_ROWS, "TILES": SHORT_TILES, "KEYS": keys, "num_warps": SHORT_WARPS, "num_stages": 1}
        grid = (heads, triton.cdiv(tokens, SHORT_ROWS * SHORT_TILES), batch)
        _short_text_attention[grid](*args, **common, **tiles)
    else:
        tiles = {"ROWS": ROWS, "COLUMNS": COLUMNS, "num_warps": WARPS, "num_stages": STAGES}
        _text_attention[(heads, triton.cdiv(tokens, ROWS), batch)](*args, **common, **tiles)
    return out


def _fake_fp8(q: Tensor, weight: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    values = torch.empty((*q.shape[:2], q.shape[2] * q.shape[3]), dtype=torch.float8_e4m3fn, device=q.device)
    return values, q.new_empty((*q.shape[:2], 1), dtype=torch.float32)


@operator("text_attention_fp8", _fake_fp8)
def _text_attention_fp8_op(
    q: Tensor, weight: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, tokens = q.shape[:2]
    out = torch.empty(q.shape, dtype=torch.float8_e4m3fn, device=q.device)
    # A mean of a text's values does not exceed the largest. e4m3 is a floating-point format: a scale larger than a row
    # needs costs nothing until the row is ten thousand times smaller.
    scales = (v.abs().amax((1, 2, 3)).float() / E4M3_MAX).clamp(min=TINY).expand(batch).contiguous()
    _launch(q, weight, k, v, bias, out, scales)
    return out.flatten(2), scales[:, None, None].expand(batch, tokens, 1).contiguous()


@operator("text_attention", lambda q, weight, k, v, bias: q.new_empty(q.shape))
def _text_attention_op(q: Tensor, weight: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    return _launch(q, weight, k, v, bias, q.new_empty(q.shape))


def text_attention(
    q: Tensor, weight: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *, fp8: bool = False
) -> Tensor | Quantized:
    """softmax(RMSNorm(q) k^T / sqrt(head_dim) + bias) v: q [B, N, heads, head_dim] in 16 bits -> [B, N, C].

    weight [head_dim], of the norm; k, v [B or 1, M, heads, head_dim]; bias [B or 1, 1, 1, M] fp32 or None, with at
    least one finite number per sample. fp8: the result is quantized, with one scale for all rows of a sample. Without
    it, and outside of compiled graphs, the result is written into q.
    """
    q = q.contiguous()
    if fp8:
        return Quantized(*_text_attention_fp8_op(q, weight, k, v, bias))
    if torch.compiler.is_compiling():
        return _text_attention_op(q, weight, k, v, bias).flatten(2)
    return _launch(q, weight, k, v, bias, q).flatten(2)
