"""Attention in 8 bits by cuDNN: queries, keys, values and weights as e4m3, products summed in fp32. Lossy.

cuDNN takes one scale for each whole tensor and returns e4m3. For a floating-point format that is less coarse than it
sounds: what is 10,000 times smaller than the largest value still has all its bits. Keys lose their mean over all tokens
first, as SageAttention has it (arXiv 2410.02367): it adds the same to all scores of a query, which softmax ignores, and
in video models it is most of what keys are.

Keys are padded with zeros to whole tiles: on an H100 cuDNN takes a tenth longer where it has to mask keys of the last
one. Zeros have the score 0. Since keys have no mean, the scores of a query have none either, so by
Jensen's inequality the sum of their exponentials is at least their number: n keys too many make the outputs smaller by
at most n / tokens. They are added where that is below 1 / `LEAST`, far below what 8 bits cost.

The package is nvidia-cudnn-frontend (`cudnn`); the library itself is the one that PyTorch brings.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .elementwise import E4M3_MAX, TINY, Quantised, find_spec, whole_tokens

if find_spec("triton") is not None:
    import triton
    import triton.language as tl
else:
    triton = None

# Tokens of cuDNN's tiles of queries and of keys (which its kernel's name tells), and how many real keys there must be
# for each one of zeros.
QUERIES, KEYS, LEAST = 64, 256, 128
# What weights of at most 1 are multiplied with before they become e4m3: a power of two, below its largest number. They
# may be larger than 1 where a kernel puts off adapting their maximum, which cuDNN's for Hopper does not.
WEIGHTS = 256.0
# Tokens that a program looks at, and at a time.
CHUNK, ROWS = 512, 32
# Numbers of one program that unpacks.
SIZE = 4096

if triton is not None:

    @triton.jit
    def _fp8_attention_extent(
        x, largest, sums, tokens, sample_stride, stride, CHUNK: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr
    ):
        """Largest magnitude and sum over the tokens of one chunk, by head, and the sum by channel."""
        head, part, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
        channel = tl.arange(0, DIM)
        x += sample * sample_stride + head * DIM
        most = tl.zeros((ROWS, DIM), tl.float32)
        total = tl.zeros((ROWS, DIM), tl.float32)
        for start in range(0, CHUNK, ROWS):
            at = (part * CHUNK + start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
            value = tl.load(x + at * stride + channel[None, :], mask=at < tokens, other=0).to(tl.float32)
            most = tl.maximum(most, tl.abs(value))
            total += value
        index = (sample * tl.num_programs(0) + head) * tl.num_programs(1) + part
        tl.store(largest + index, tl.max(most))
        tl.store(sums + index * DIM + channel, tl.sum(total, axis=0))

    @triton.jit
    def _fp8_attention_pack(
        x,
        mean,
        scale,
        out,
        tokens,
        padded,
        sample_stride,
        stride,
        CENTRED: tl.constexpr,
        ROWS: tl.constexpr,
        DIM: tl.constexpr,
    ):
        """(x - mean) / scale as e4m3, zeros behind the tokens."""
        head, heads, sample = tl.program_id(0), tl.num_programs(0), tl.program_id(2).to(tl.int64)
        at = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        channel = tl.arange(0, DIM)[None, :]
        there = at < tokens
        value = tl.load(x + sample * sample_stride + at * stride + head * DIM + channel, mask=there, other=0)
        value = value.to(tl.float32)
        if CENTRED:
            value -= tl.load(mean + (sample * heads + head) * DIM + channel)
        value = tl.minimum(tl.maximum(value / tl.load(scale), -448.0), 448.0)
        value = tl.where(there, value, 0.0)
        to = ((sample * padded + at) * heads + head) * DIM + channel
        tl.store(out + to, value.to(out.dtype.element_ty), mask=at < padded)

    @triton.jit
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


def pack(x: Tensor, tokens: int, *, centred: bool = False) -> Scaled:
    """x [B, N, heads, head_dim] in 16 bits as e4m3 with one scale, followed by zeros up to `tokens`.

    centred: without its mean over the N tokens, by sample, head and channel.
    """
    x = whole_tokens(x)
    batch, own, heads, dim = x.shape
    parts = triton.cdiv(own, CHUNK)
    largest = x.new_empty((batch, heads, parts), dtype=torch.float32)
    sums = x.new_empty((batch, heads, parts, dim), dtype=torch.float32)
    strides = x.stride(0), x.stride(1)
    _fp8_attention_extent[(heads, parts, batch)](x, largest, sums, own, *strides, CHUNK=CHUNK, ROWS=ROWS, DIM=dim)
    largest = largest.max()
    mean = None
    if centred:
        mean = sums.sum(2) / own
        # No need to know better: a scale twice as large as it must be costs e4m3 no bit.
        largest = largest + mean.abs().max()
    scale = (largest / E4M3_MAX).clamp(min=TINY).view(1)
    out = torch.empty((batch, tokens, heads, dim), dtype=torch.float8_e4m3fn, device=x.device)
    grid = heads, triton.cdiv(tokens, ROWS), batch
    _fp8_attention_pack[grid](x, mean, scale, out, own, tokens, *strides, CENTRED=centred, ROWS=ROWS, DIM=dim)
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
    """How many tokens cuDNN gets for so many queries or keys."""
    tile = KEYS if keys else QUERIES
    whole = -(-tokens // tile) * tile
    return whole if not keys or (whole - tokens) * LEAST <= tokens else tokens


class _Plan(NamedTuple):
    """constants: what weights are multiplied with and its inverse, fp32."""

    graph: Any
    handle: Any
    workspace_bytes: int
    constants: Tensor


# What cuDNN reads and writes, by the numbers that the graph knows them by.
(
    _Q,
    _K,
    _V,
    _SCALE_Q,
    _SCALE_K,
    _SCALE_V,
    _UNSCALE_WEIGHTS,
    _SCALE_WEIGHTS,
    _UNSCALE_OUT,
    _OUT,
    _MOST_WEIGHT,
    _MOST_OUT,
) = range(1, 13)


@lru_cache(maxsize=64)
def _plan(thread: int, device: torch.device, batch: int, queries: int, keys: int, heads: int, dim: int) -> _Plan:
    """cuDNN's graph for such shapes; `thread` has a handle of its own."""
    import cudnn

    handle = _handle(thread, device)
    eight, single = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
    graph = cudnn.pygraph(io_data_type=eight, intermediate_data_type=single, compute_data_type=single, handle=handle)

    def of(tokens: int) -> dict[str, Any]:
        return {"dim": (batch, heads, tokens, dim), "stride": (tokens * heads * dim, dim, heads * dim, 1)}

    one = {"dim": (1, 1, 1, 1), "stride": (1, 1, 1, 1)}
    tensors = {
        uid: graph.tensor(uid=uid, data_type=eight, **of(n)) for uid, n in ((_Q, queries), (_K, keys), (_V, keys))
    }
    for uid in (_SCALE_Q, _SCALE_K, _SCALE_V, _UNSCALE_WEIGHTS, _SCALE_WEIGHTS, _UNSCALE_OUT):
        tensors[uid] = graph.tensor(uid=uid, data_type=single, **one)
    out, _, *largest = graph.sdpa_fp8(
        q=tensors[_Q],
        k=tensors[_K],
        v=tensors[_V],
        descale_q=tensors[_SCALE_Q],
        descale_k=tensors[_SCALE_K],
        descale_v=tensors[_SCALE_V],
        descale_s=tensors[_UNSCALE_WEIGHTS],
        scale_s=tensors[_SCALE_WEIGHTS],
        scale_o=tensors[_UNSCALE_OUT],
        attn_scale=dim**-0.5,
        generate_stats=False,
    )
    shape = of(queries)
    out.set_uid(_OUT).set_output(True).set_dim(shape["dim"]).set_stride(shape["stride"]).set_data_type(eight)
    for uid, tensor in zip((_MOST_WEIGHT, _MOST_OUT), largest, strict=True):
        tensor.set_uid(uid).set_output(True).set_dim(one["dim"]).set_stride(one["stride"]).set_data_type(single)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A])
    graph.check_support()
    graph.build_plans()
    constants = torch.tensor((WEIGHTS, 1 / WEIGHTS), device=device)
    return _Plan(graph, handle, max(1, graph.get_workspace_size()), constants)


@lru_cache(maxsize=64)
def _handle(thread: int, device: torch.device) -> Any:
    import cudnn

    return cudnn.create_handle()


def _by_cudnn(q: Scaled, k: Scaled, v: Scaled) -> Scaled:
    """Attention by cuDNN; its result has the scale of the values, of which it is a mean."""
    import cudnn

    device = q.values.device
    batch, queries, heads, dim = q.values.shape
    with torch.cuda.device(device):
        plan = _plan(threading.get_ident(), device, batch, queries, k.values.shape[1], heads, dim)
        cudnn.set_stream(handle=plan.handle, stream=torch.cuda.current_stream(device).cuda_stream)
        out = torch.empty_like(q.values)
        scale, unscale = plan.constants.split(1)
        most_weight, most_out = v.scale.new_empty(2).split(1)
        unscale_out = 1 / v.scale
        workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=device)
        given = {
            _Q: q.values,
            _K: k.values,
            _V: v.values,
            _SCALE_Q: q.scale,
            _SCALE_K: k.scale,
            _SCALE_V: v.scale,
            _UNSCALE_WEIGHTS: unscale,
            _SCALE_WEIGHTS: scale,
            _UNSCALE_OUT: unscale_out,
            _OUT: out,
            _MOST_WEIGHT: most_weight,
            _MOST_OUT: most_out,
        }
        pointers = {uid: tensor.data_ptr() for uid, tensor in given.items()}
        plan.graph.execute(pointers, workspace.data_ptr(), handle=plan.handle)
    return Scaled(out, v.scale)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Scaled:
    queries, keys = padded(q.shape[1], False), padded(k.shape[1], True)
    return _by_cudnn(pack(q, queries), pack(k, keys, centred=True), pack(v, keys))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v in 8 bits: q [B, Nq, heads, head_dim], k and v [B, Nk, heads, head_dim]."""
    return unpack(_attend(q, k, v), q.shape[1], q.dtype)


def attend_quantised(q: Tensor, k: Tensor, v: Tensor) -> Quantised:
    """The same as cuDNN gives it, for an 8-bit product: values [B, Nq, C] and one scale [B, Nq, 1] for all rows."""
    out, tokens = _attend(q, k, v), q.shape[1]
    # A copy only where queries were padded.
    return Quantised(out.values[:, :tokens].flatten(2).contiguous(), out.scale.expand(*q.shape[:2], 1).contiguous())
