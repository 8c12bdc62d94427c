"""Attention in 8 bits by cuDNN: queries, keys, values and weights as e4m3, products summed in fp32. Lossy.

cuDNN takes one scale for each whole tensor and returns e4m3. For a floating-point format that is less coarse than it
sounds: a value 10,000 times smaller than the largest still has all its bits. The keys' mean over all tokens is
subtracted first, as in SageAttention (arXiv 2410.02367): it adds the same to all scores of a query, which softmax
ignores, and in video models it is the largest part of the keys.

Keys are padded with zeros to whole tiles, because on an H100 cuDNN takes a tenth longer if it has to mask keys of the
last tile. Zeros have the score 0. Since keys have a mean of zero, the scores of a query do too, so by Jensen's
inequality the sum of their exponentials is at least their number: n extra keys make the outputs smaller by at most
n / tokens. Keys are padded where that is below 1 / `LEAST`, far below what 8 bits cost.

The package is nvidia-cudnn-frontend (`cudnn`); the library itself is the one that PyTorch brings.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .elementwise import E4M3_MAX, TINY, Quantized, whole_tokens
from .jit import jit, tl, triton

# Tokens of cuDNN's tiles of queries and of keys (as in its kernel's name), and how many real keys there must be for
# every key of zeros.
QUERIES, KEYS, LEAST = 64, 256, 128
# Weights of at most 1 are multiplied with this before they become e4m3: a power of two below e4m3's largest number.
# They may exceed 1 in kernels that adapt their maximum late, which cuDNN's kernel for Hopper does not.
WEIGHTS = 256.0
# Tokens of a program, and tokens at a time.
CHUNK, ROWS = 512, 32
# Values of a program that unpacks.
SIZE = 4096


@jit
def _fp8_attention_extent(
    x, largest, sums, tokens, sample_stride, stride,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Largest magnitude and sum over the tokens of one chunk, by head, and the sum by channel."""
    head, part, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, DIM)
    x += sample * sample_stride + head * DIM
    most = tl.zeros((ROWS, DIM), tl.float32)
    total = tl.zeros((ROWS, DIM), tl.float32)
    for start in range(0, CHUNK, ROWS):
        at = (part * CHUNK + start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        value = tl.load(x + at * stride + channel[None, :], mask=at < tokens, other=0.0).to(tl.float32)
        most = tl.maximum(most, tl.abs(value))
        total += value
    index = (sample * tl.num_programs(0) + head) * tl.num_programs(1) + part
    tl.store(largest + index, tl.max(most))
    tl.store(sums + index * DIM + channel, tl.sum(total, axis=0))


@jit
def _fp8_attention_pack(
    x, mean, scale, out, tokens, padded, sample_stride, stride,
    CENTERED: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """(x - mean) / scale as e4m3, zeros behind the tokens."""
    head, heads, sample = tl.program_id(0), tl.num_programs(0), tl.program_id(2).to(tl.int64)
    at = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    channel = tl.arange(0, DIM)[None, :]
    there = at < tokens
    value = tl.load(x + sample * sample_stride + at * stride + head * DIM + channel, mask=there, other=0.0)
    value = value.to(tl.float32)
    if CENTERED:
        value -= tl.load(mean + (sample * heads + head) * DIM + channel)
    value = tl.minimum(tl.maximum(value / tl.load(scale), -448.0), 448.0)
    value = tl.where(there, value, 0.0)
    to = ((sample * padded + at) * heads + head) * DIM + channel
    tl.store(out + to, value.to(out.dtype.element_ty), mask=at < padded)


@jit
def _fp8_attention_unpack(x, scale, out, numbers, sample_stride, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    sample = tl.program_id(1).to(tl.int64)
    value = tl.load(x + sample * sample_stride + at, mask=at < numbers).to(tl.float32)
    value *= tl.load(scale)
    tl.store(out + sample * numbers + at, value.to(out.dtype.element_ty), mask=at < numbers)


class Scaled(NamedTuple):
    """e4m3 values [B, N padded, heads, head_dim] and the one scale [1] fp32 of all: values * scale."""

    values: Tensor
    scale: Tensor


def pack(x: Tensor, tokens: int, *, centered: bool = False) -> Scaled:
    """x [B, N, heads, head_dim] in 16 bits as e4m3 with one scale, followed by zeros up to `tokens`.

    centered: without its mean over the N tokens, by sample, head and channel.
    """
    x = whole_tokens(x)
    batch, real, heads, dim = x.shape
    parts = triton.cdiv(real, CHUNK)
    largest = x.new_empty((batch, heads, parts), dtype=torch.float32)
    sums = x.new_empty((batch, heads, parts, dim), dtype=torch.float32)
    strides = x.stride(0), x.stride(1)
    _fp8_attention_extent[(heads, parts, batch)](x, largest, sums, real, *strides, CHUNK=CHUNK, ROWS=ROWS, DIM=dim)
    largest = largest.max()
    mean = None
    if centered:
        mean = sums.sum(2) / real
        # An upper bound is enough: a scale twice as large as necessary costs e4m3 no bit.
        largest = largest + mean.abs().max()
    scale = (largest / E4M3_MAX).clamp(min=TINY).view(1)
    out = torch.empty((batch, tokens, heads, dim), dtype=torch.float8_e4m3fn, device=x.device)
    grid = heads, triton.cdiv(tokens, ROWS), batch
    _fp8_attention_pack[grid](x, mean, scale, out, real, tokens, *strides, CENTERED=centered, ROWS=ROWS, DIM=dim)
    return Scaled(out, scale)


def unpack(x: Scaled, tokens: int, dtype: torch.dtype) -> Tensor:
    """The first `tokens` of x as [B, tokens, heads, head_dim] in `dtype`."""
    batch, _, heads, dim = x.values.shape
    out = torch.empty((batch, tokens, heads, dim), dtype=dtype, device=x.values.device)
    numbers = tokens * heads * dim
    grid = triton.cdiv(numbers, SIZE), batch
    _fp8_attention_unpack[grid](x.values, x.scale, out, numbers, x.values.stride(0), SIZE=SIZE)
    return out


def padded(tokens: int, keys: bool) -> int:
    """How many queries or keys cuDNN gets, padding included, for this number of tokens."""
    tile = KEYS if keys else QUERIES
    whole = -(-tokens // tile) * tile
    return whole if not keys or (whole - tokens) * LEAST <= tokens else tokens


class _Graph(NamedTuple):
    """cuDNN's graph for certain shapes. constants: `WEIGHTS` and its inverse, fp32 on the device."""

    graph: Any
    handle: Any
    workspace_bytes: int
    constants: Tensor


# What cuDNN reads and writes, by the names of its `sdpa_fp8`, and the numbers by which the graph knows them.
_SCALARS = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")
_UIDS = {name: i for i, name in enumerate(("q", "k", "v", *_SCALARS, "out", "amax_s", "amax_o"), 1)}


@lru_cache(maxsize=64)
def _build(thread: int, device: torch.device, batch: int, queries: int, keys: int, heads: int, dim: int) -> _Graph:
    """cuDNN's graph for such shapes; every thread has a handle of its own."""
    import cudnn

    handle = _handle(thread, device)
    eight, single = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
    graph = cudnn.pygraph(io_data_type=eight, intermediate_data_type=single, compute_data_type=single, handle=handle)

    def of(tokens: int) -> dict[str, Any]:
        return {"dim": (batch, heads, tokens, dim), "stride": (tokens * heads * dim, dim, heads * dim, 1)}

    one = {"dim": (1, 1, 1, 1), "stride": (1, 1, 1, 1)}
    tensors = {
        name: graph.tensor(uid=_UIDS[name], data_type=eight, **of(tokens))
        for name, tokens in (("q", queries), ("k", keys), ("v", keys))
    }
    tensors |= {name: graph.tensor(uid=_UIDS[name], data_type=single, **one) for name in _SCALARS}
    out, _, *largest = graph.sdpa_fp8(**tensors, attn_scale=dim**-0.5, generate_stats=False)
    for name, tensor, kind, shape in (
        ("out", out, eight, of(queries)),
        ("amax_s", largest[0], single, one),
        ("amax_o", largest[1], single, one),
    ):
        tensor.set_uid(_UIDS[name]).set_output(True)
        tensor.set_dim(shape["dim"]).set_stride(shape["stride"]).set_data_type(kind)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A])
    graph.check_support()
    graph.build_plans()
    constants = torch.tensor((WEIGHTS, 1 / WEIGHTS), device=device)
    return _Graph(graph, handle, max(1, graph.get_workspace_size()), constants)


@lru_cache(maxsize=64)
def _handle(thread: int, device: torch.device) -> Any:
    import cudnn

    return cudnn.create_handle()


def _by_cudnn(q: Scaled, k: Scaled, v: Scaled) -> Scaled:
    """Attention by cuDNN; the result, a mean of values, has the values' scale."""
    import cudnn

    device = q.values.device
    batch, queries, heads, dim = q.values.shape
    with torch.cuda.device(device):
        graph = _build(threading.get_ident(), device, batch, queries, k.values.shape[1], heads, dim)
        cudnn.set_stream(handle=graph.handle, stream=torch.cuda.current_stream(device).cuda_stream)
        out = torch.empty_like(q.values)
        scale, unscale = graph.constants.split(1)
        most_weight, most_out = v.scale.new_empty(2).split(1)
        workspace = torch.empty(graph.workspace_bytes, dtype=torch.uint8, device=device)
        # In the order of `_UIDS`; 1 / v.scale must live until the launch.
        tensors = (
            *(q.values, k.values, v.values, q.scale, k.scale, v.scale, unscale, scale, 1 / v.scale),
            *(out, most_weight, most_out),
        )
        pointers = {uid: tensor.data_ptr() for uid, tensor in zip(_UIDS.values(), tensors, strict=True)}
        graph.graph.execute(pointers, workspace.data_ptr(), handle=graph.handle)
    return Scaled(out, v.scale)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Scaled:
    queries, keys = padded(q.shape[1], False), padded(k.shape[1], True)
    return _by_cudnn(pack(q, queries), pack(k, keys, centered=True), pack(v, keys))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v in 8 bits: q [B, Nq, heads, head_dim], k and v [B, Nk, heads, head_dim]."""
    return unpack(_attend(q, k, v), q.shape[1], q.dtype)


def attend_quantized(q: Tensor, k: Tensor, v: Tensor) -> Quantized:
    """The same as cuDNN returns it, for an 8-bit GEMM: values [B, Nq, C] and one scale [B, Nq, 1] for all rows."""
    out, tokens = _attend(q, k, v), q.shape[1]
    # A copy only if queries were padded.
    return Quantized(out.values[:, :tokens].flatten(2).contiguous(), out.scale.expand(*q.shape[:2], 1).contiguous())
