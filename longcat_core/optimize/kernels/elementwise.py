"""Triton kernels for the element-wise regions of a block: every activation is read once and written once.

Compilers come near that, except that they read a norm's modulation again for every token (here a program keeps it for
several tokens) and split RoPE's pairs (here each lies in one thread). The kernels also save a first call from
compiling. All arithmetic is fp32 between the loads and the stores, and the kernels have no backward pass.
`model.ops.PlainOps` defines what they compute.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..operators import operator
from ..requirement import HALF, Inputs, Requirement
from .jit import jit, tl, triton

EPS = 1e-6
E4M3_MAX = 448.0
# The least that counts as a row's largest value, so that a row of zeros has a scale.
TINY = 1e-12
# Tokens that one program normalizes with the modulation it holds in registers.
ROWS = 8

# Parameters in these dtypes are widened to fp32 as they are loaded; others must be cast before.
READ = (*HALF, torch.float32)

NEEDS = Requirement(triton=True, dtypes=HALF, head_dims=None, backward=False)
missing = NEEDS.missing


def takes(dtype: torch.dtype) -> bool:
    """Whether these kernels can run on this machine for activations in `dtype`."""
    return dtype in HALF and not missing()


def usable(x: Tensor) -> bool:
    """Whether activations like x [.., C] can go through these kernels: on CUDA, in 16 bits, without gradients."""
    return not NEEDS.why_not(Inputs.of(x))


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [.., C] as e4m3 values and one fp32 scale [.., 1] a row: x is about values * scale, with values up to 448."""
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True).clamp(min=TINY) / E4M3_MAX
    return (x / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


# --- kernels ---------------------------------------------------------------------------------------------------------


@jit
def _store(out, scales, row, columns, mask, value, width, FP8: tl.constexpr):
    if FP8:
        scale = tl.maximum(tl.max(tl.abs(value), axis=0), 1e-12) / 448.0
        tl.store(scales + row, scale)
        # Rounding may lift the quotient above the largest e4m3 number, which has no infinity to fall back on.
        value = tl.minimum(tl.maximum(value / scale, -448.0), 448.0)
    tl.store(out + row * width + columns, value.to(out.dtype.element_ty), mask=mask)


@jit
def _residual_norm(
    x, update, gate, weight, bias, x_out, out, scales, frames, spatial, width, gate_sample, gate_frame, norm_sample,
    norm_frame, eps,
    UPDATE: tl.constexpr, GATE: tl.constexpr, NORM: tl.constexpr, ONE_PLUS: tl.constexpr, FP8: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    frame = tl.program_id(0).to(tl.int64)
    sample = frame // frames
    own = frame % frames
    columns = tl.arange(0, WIDTH)
    mask = columns < width
    if GATE:
        g = tl.load(gate + sample * gate_sample + own * gate_frame + columns, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        at = sample * norm_sample + own * norm_frame + columns
        w = tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(bias + at, mask=mask, other=0.0).to(tl.float32)
        if ONE_PLUS:
            w += 1.0
    first = tl.program_id(1) * ROWS
    for i in range(ROWS):
        if first + i < spatial:
            row = frame * spatial + first + i
            value = tl.load(x + row * width + columns, mask=mask, other=0.0).to(tl.float32)
            if UPDATE:
                more = tl.load(update + row * width + columns, mask=mask, other=0.0).to(tl.float32)
                if GATE:
                    more *= g
                # The norm reads what the residual stream holds, rounded.
                rounded = (value + more).to(x_out.dtype.element_ty)
                tl.store(x_out + row * width + columns, rounded, mask=mask)
                value = rounded.to(tl.float32)
            if NORM:
                mean = tl.sum(value, axis=0) / width
                centered = tl.where(mask, value - mean, 0.0)
                spread = tl.rsqrt(tl.sum(centered * centered, axis=0) / width + eps)
                _store(out, scales, row, columns, mask, centered * spread * w + b, width, FP8)


@jit
def _norm_rope(
    x, weight, cos, sin, out, tokens, heads, row_stride, out_stride, eps,
    ROPE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    channel = tl.arange(0, 2 * HALF)[None, :]
    mask = (head < heads) & (channel < 2 * HALF)
    value = tl.load(x + row * row_stride + head * (2 * HALF) + channel, mask=mask, other=0.0).to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, axis=1) / (2 * HALF) + eps)[:, None]
    value *= tl.load(weight + channel).to(tl.float32)
    if ROPE:
        even, odd = tl.split(tl.reshape(value, (HEADS, HALF, 2)))
        at = (row % tokens) * HALF + tl.arange(0, HALF)[None, :]
        c, s = tl.load(cos + at), tl.load(sin + at)
        value = tl.reshape(tl.join(even * c - odd * s, odd * c + even * s), (HEADS, 2 * HALF))
    at = row * out_stride + head * (2 * HALF) + channel
    tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)


@jit
def _gated_product(gate_up, out, scales, width, FP8: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    mask = columns < width
    gate = tl.load(gate_up + row * 2 * width + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + columns, mask=mask, other=0.0).to(tl.float32)
    _store(out, scales, row, columns, mask, gate / (1 + tl.exp(-gate)) * up, width, FP8)


@jit
def _quantize(
    x, out, scales, width, tokens, sample_stride, token_stride, head_stride, DIM: tl.constexpr, WIDTH: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    mask = columns < width
    x += (row // tokens) * sample_stride + (row % tokens) * token_stride
    at = (columns // DIM).to(tl.int64) * head_stride + columns % DIM if DIM else columns
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    _store(out, scales, row, columns, mask, value, width, True)


def _block(width: int) -> tuple[int, int]:
    """The next power of two that holds `width` columns, and the number of warps that work on them."""
    size = 1 << (width - 1).bit_length()
    return size, min(16, max(1, size // 512))


def whole_tokens(x: Tensor) -> Tensor:
    """x [B, N, heads, head_dim] with the channels of a token side by side; copied only if they are not."""
    return x if x.stride()[2:] == (x.shape[3], 1) else x.contiguous()


def _strides(vector: Tensor | None) -> tuple[int, int]:
    """Steps from sample to sample and frame to frame of a modulation [B or 1, T or 1, 1, C], a weight [C] or None."""
    if vector is None or vector.ndim == 1:
        return 0, 0
    sample, frame = (0 if vector.shape[dim] == 1 else vector.stride(dim) for dim in (0, 1))
    return sample, frame


def _out(like: Tensor, width: int, fp8: bool) -> tuple[Tensor, Tensor]:
    """Memory for a result [.., width] and for its scales [.., 1], which are empty without fp8."""
    shape = (*like.shape[:-1], width)
    scales = like.new_empty((*like.shape[:-1], 1) if fp8 else (0,), dtype=torch.float32)
    return like.new_empty(shape, dtype=torch.float8_e4m3fn if fp8 else like.dtype), scales


def _norm_out(x: Tensor, update: Tensor | None, fp8: bool) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape if update is not None else (0,)), *_out(x, x.shape[-1], fp8)


def _launch_residual_norm(
    x: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    total: Tensor,
    out: Tensor | None = None,
    scales: Tensor | None = None,
    one_plus: bool = False,
) -> None:
    """Write x + gate * update into `total` and, with a weight, the norm of that into `out` and `scales`."""
    batch, frames, spatial, width = x.shape
    size, warps = _block(width)
    _residual_norm[(batch * frames, triton.cdiv(spatial, ROWS))](
        *(x, update, gate, weight, bias, total, out, scales, frames, spatial, width),
        *(*_strides(gate), *_strides(weight), EPS),
        UPDATE=update is not None,
        GATE=gate is not None,
        NORM=weight is not None,
        ONE_PLUS=one_plus,
        FP8=scales is not None and scales.numel() > 0,
        ROWS=ROWS,
        WIDTH=size,
        num_warps=warps,
    )


@operator("residual_norm", lambda x, update, gate, weight, bias, one_plus, fp8: _norm_out(x, update, fp8))
def _residual_norm_op(
    x: Tensor, update: Tensor | None, gate: Tensor | None, weight: Tensor, bias: Tensor, one_plus: bool, fp8: bool
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _norm_out(x, update, fp8)
    _launch_residual_norm(x, update, gate, weight, bias, *outputs, one_plus)
    return outputs


def _launch_norm_rope(x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, out: Tensor) -> Tensor:
    batch, tokens, heads, dim = x.shape
    _norm_rope[(batch * tokens,)](
        *(x, weight, cos, sin, out, tokens, heads, x.stride(1), out.stride(1), EPS),
        ROPE=cos is not None,
        HEADS=1 << (heads - 1).bit_length(),
        HALF=dim // 2,
        num_warps=4,
    )
    return out


@operator("norm_rope", lambda x, weight, cos, sin: x.new_empty(x.shape))
def _norm_rope_op(x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    return _launch_norm_rope(x, weight, cos, sin, x.new_empty(x.shape))


@operator("gated_product", lambda gate_up, fp8: _out(gate_up, gate_up.shape[-1] // 2, fp8))
def _gated_product_op(gate_up: Tensor, fp8: bool) -> tuple[Tensor, Tensor]:
    width = gate_up.shape[-1] // 2
    out, scales = _out(gate_up, width, fp8)
    size, warps = _block(width)
    _gated_product[(gate_up.numel() // (2 * width),)](gate_up, out, scales, width, FP8=fp8, WIDTH=size, num_warps=warps)
    return out, scales


@operator("quantize", lambda x: _out(x, x.shape[-1], True))
def _quantize_op(x: Tensor) -> tuple[Tensor, Tensor]:
    width = x.shape[-1]
    out, scales = _out(x, width, True)
    size, warps = _block(width)
    rows = x.numel() // width
    _quantize[(rows,)](x, out, scales, width, rows, 0, width, 0, DIM=0, WIDTH=size, num_warps=warps)
    return out, scales


# --- what the network calls ------------------------------------------------------------------------------------------


class Quantized(NamedTuple):
    """Activations [.., C] as e4m3 `values` with one fp32 scale [.., 1] a row: values * scales."""

    values: Tensor
    scales: Tensor


def residual_norm(
    x: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    one_plus: bool = False,
    fp8: bool = False,
) -> tuple[Tensor, Tensor | Quantized]:
    """x + gate * update and its LayerNorm times weight plus bias; fp32 inside. Returns the sum and the norm.

    x, update [B, T, S, C] in 16 bits; without an update the sum is x itself. gate [B or 1, T or 1, 1, C] fp32, or None:
    1. weight and bias have the gate's shape, or [C]; one_plus: 1 + weight, as in modulation. fp8: the norm is quantized
    row by row.
    """
    update = None if update is None else update.contiguous()
    total, out, scales = _residual_norm_op(x.contiguous(), update, gate, weight, bias, one_plus, fp8)
    return x if update is None else total, Quantized(out, scales) if fp8 else out


def residual_(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """x + gate * update, summed in fp32 and written into x [B, T, S, C] contiguous; gate [B or 1, T or 1, 1, C] fp32.

    Must not be used in compiled graphs.
    """
    _launch_residual_norm(x, update.contiguous(), gate, None, None, x)
    return x


def norm_rope(x: Tensor, weight: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
    """RMSNorm over head_dim, then RoPE: x [B, N, heads, head_dim] in 16 bits -> the same.

    weight [head_dim]; rope: cosines and sines [N, head_dim/2] fp32, or None: the norm alone. x may be a slice of a
    fused projection: only a token's channels must lie side by side. Outside of compiled graphs the result is written
    into x, which saves the largest copies of a block.
    """
    cos, sin = rope or (None, None)
    dense = x.stride()[2:] == (x.shape[3], 1) and x.stride(0) == x.shape[1] * x.stride(1)
    x = x if dense else x.contiguous()
    if torch.compiler.is_compiling():
        return _norm_rope_op(x, weight, cos, sin)
    return _launch_norm_rope(x, weight, cos, sin, x)


def gated_product(gate_up: Tensor, *, fp8: bool = False) -> Tensor | Quantized:
    """silu(gate) * up of gate_up [.., 2*C] in 16 bits, gate first -> [.., C]. fp8: quantized row by row."""
    out, scales = _gated_product_op(gate_up.contiguous(), fp8)
    return Quantized(out, scales) if fp8 else out


def quantize(x: Tensor) -> Quantized:
    """x [.., C] in 16 bits as e4m3, row by row: `quantize_rows` in one kernel."""
    return Quantized(*_quantize_op(x.contiguous()))


def quantize_heads(x: Tensor) -> Quantized:
    """`quantize` of x [B, N, heads, head_dim] in 16 bits -> [B, N, C]; its heads may lie apart. Outside of graphs."""
    if x.is_contiguous() or x.stride(3) != 1:
        return quantize(x.flatten(2))
    batch, tokens, heads, dim = x.shape
    values = torch.empty((batch, tokens, heads * dim), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((batch, tokens, 1), dtype=torch.float32, device=x.device)
    size, warps = _block(heads * dim)
    _quantize[(batch * tokens,)](
        *(x, values, scales, heads * dim, tokens, *x.stride()[:3]), DIM=dim, WIDTH=size, num_warps=warps
    )
    return Quantized(values, scales)
