"""Triton kernels for the element-wise regions of a block: every activation is read once and written once.

Compilers come near that, with two exceptions that these kernels take on: a norm's modulation is read again for every
token (here a program keeps it for several), and RoPE's pairs (here they lie in one thread). They also save a first call
from compiling. All arithmetic is fp32 between the loads and the stores. There is no backward pass.

Each public function has a twin in plain PyTorch, which says what it computes and serves where Triton does not run.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..operators import operator

EPS = 1e-6
E4M3_MAX = 448.0
# The least that counts as a row's largest value, so that a row of zeros has a scale.
TINY = 1e-12
# Tokens that one program normalises with the modulation it holds in registers.
ROWS = 8
HALF = (torch.bfloat16, torch.float16)

if find_spec("triton") is not None:
    import triton
    import triton.language as tl
else:
    triton = None


@cache
def missing() -> str:
    """Why these kernels cannot run on this machine, or ""."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if triton is None:
        return "the triton package is not installed"
    have = torch.cuda.get_device_capability()
    return "" if have >= (8, 0) else f"needs compute capability 8.0, this GPU has {have[0]}.{have[1]}"


def usable(x: Tensor) -> bool:
    """Whether activations like x [.., C] can go through these kernels: on CUDA, 16 bits wide, without gradient."""
    learns = torch.is_grad_enabled() and x.requires_grad
    return x.is_cuda and x.dtype in HALF and not learns and not missing()


# --- what the kernels compute ----------------------------------------------------------------------------------------


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [.., C] as e4m3 with one fp32 scale [.., 1] a row: x is about values * scale, the largest value is 448."""
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True).clamp(min=TINY) / E4M3_MAX
    return (x / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def plain_norm(
    x: Tensor, update: Tensor | None, gate: Tensor | None, weight: Tensor, bias: Tensor, one_plus: bool
) -> tuple[Tensor, Tensor]:
    """The twin of `residual_norm`, before quantising."""
    if update is not None:
        x = (x.float() + (update.float() if gate is None else gate * update.float())).to(x.dtype)
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=EPS)
    return x, normed * (1 + weight if one_plus else weight.float()) + bias.float()


def plain_gated_product(gate_up: Tensor) -> Tensor:
    """The twin of `gated_product`, before quantising."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return F.silu(gate) * up


# --- kernels ---------------------------------------------------------------------------------------------------------

if triton is not None:

    @triton.jit
    def _store(out, scales, row, columns, mask, value, width, FP8: tl.constexpr):
        if FP8:
            scale = tl.maximum(tl.max(tl.abs(value), axis=0), 1e-12) / 448.0
            tl.store(scales + row, scale)
            # Rounding may lift the quotient above the largest e4m3 number, which has no infinity to fall back on.
            value = tl.minimum(tl.maximum(value / scale, -448.0), 448.0)
        tl.store(out + row * width + columns, value.to(out.dtype.element_ty), mask=mask)

    @triton.jit
    def _residual_norm(
        x,
        update,
        gate,
        weight,
        bias,
        x_out,
        out,
        scales,
        frames,
        spatial,
        width,
        gate_sample,
        gate_frame,
        norm_sample,
        norm_frame,
        eps,
        UPDATE: tl.constexpr,
        GATE: tl.constexpr,
        NORM: tl.constexpr,
        ONE_PLUS: tl.constexpr,
        FP8: tl.constexpr,
        ROWS: tl.constexpr,
        WIDTH: tl.constexpr,
    ):
        frame = tl.program_id(0).to(tl.int64)
        sample = frame // frames
        own = frame % frames
        columns = tl.arange(0, WIDTH)
        mask = columns < width
        if GATE:
            g = tl.load(gate + sample * gate_sample + own * gate_frame + columns, mask=mask, other=0).to(tl.float32)
        if NORM:
            at = sample * norm_sample + own * norm_frame + columns
            w = tl.load(weight + at, mask=mask, other=0).to(tl.float32)
            b = tl.load(bias + at, mask=mask, other=0).to(tl.float32)
            if ONE_PLUS:
                w += 1.0
        first = tl.program_id(1) * ROWS
        for i in range(ROWS):
            if first + i < spatial:
                row = frame * spatial + first + i
                value = tl.load(x + row * width + columns, mask=mask, other=0).to(tl.float32)
                if UPDATE:
                    more = tl.load(update + row * width + columns, mask=mask, other=0).to(tl.float32)
                    if GATE:
                        more *= g
                    # The norm reads what the residual stream holds, rounded.
                    rounded = (value + more).to(x_out.dtype.element_ty)
                    tl.store(x_out + row * width + columns, rounded, mask=mask)
                    value = rounded.to(tl.float32)
                if NORM:
                    mean = tl.sum(value, axis=0) / width
                    centred = tl.where(mask, value - mean, 0.0)
                    spread = tl.rsqrt(tl.sum(centred * centred, axis=0) / width + eps)
                    _store(out, scales, row, columns, mask, centred * spread * w + b, width, FP8)

    @triton.jit
    def _norm_rope(
        x,
        weight,
        cos,
        sin,
        out,
        tokens,
        heads,
        row_stride,
        out_stride,
        eps,
        ROPE: tl.constexpr,
        HEADS: tl.constexpr,
        HALF: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        head = tl.arange(0, HEADS)[:, None]
        channel = tl.arange(0, 2 * HALF)[None, :]
        mask = (head < heads) & (channel < 2 * HALF)
        value = tl.load(x + row * row_stride + head * (2 * HALF) + channel, mask=mask, other=0).to(tl.float32)
        value *= tl.rsqrt(tl.sum(value * value, axis=1) / (2 * HALF) + eps)[:, None]
        value *= tl.load(weight + channel).to(tl.float32)
        if ROPE:
            even, odd = tl.split(tl.reshape(value, (HEADS, HALF, 2)))
            at = (row % tokens) * HALF + tl.arange(0, HALF)[None, :]
            c, s = tl.load(cos + at), tl.load(sin + at)
            value = tl.reshape(tl.join(even * c - odd * s, odd * c + even * s), (HEADS, 2 * HALF))
        at = row * out_stride + head * (2 * HALF) + channel
        tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)

    @triton.jit
    def _gated_product(gate_up, out, scales, width, FP8: tl.constexpr, WIDTH: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, WIDTH)
        mask = columns < width
        gate = tl.load(gate_up + row * 2 * width + columns, mask=mask, other=0).to(tl.float32)
        up = tl.load(gate_up + row * 2 * width + width + columns, mask=mask, other=0).to(tl.float32)
        _store(out, scales, row, columns, mask, gate / (1 + tl.exp(-gate)) * up, width, FP8)

    @triton.jit
    def _quantise(x, out, scales, width, WIDTH: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, WIDTH)
        mask = columns < width
        value = tl.load(x + row * width + columns, mask=mask, other=0).to(tl.float32)
        _store(out, scales, row, columns, mask, value, width, True)


def _block(width: int) -> tuple[int, int]:
    """The next power of two that holds `width` columns, and how many warps work on them."""
    size = 1 << (width - 1).bit_length()
    return size, min(16, max(1, size // 512))


def whole_tokens(x: Tensor) -> Tensor:
    """x [B, N, heads, head_dim] with the channels of a token together; a copy only where they are not."""
    return x if x.stride()[2:] == (x.shape[3], 1) else x.contiguous()


def _strides(vector: Tensor | None) -> tuple[int, int]:
    """Steps from sample to sample and frame to frame of a modulation [B or 1, T or 1, 1, C], a weight [C] or None."""
    if vector is None or vector.ndim == 1:
        return 0, 0
    return tuple(0 if size == 1 else stride for size, stride in zip(vector.shape[:2], vector.stride()[:2], strict=True))


def _out(like: Tensor, width: int, fp8: bool) -> tuple[Tensor, Tensor]:
    shape = (*like.shape[:-1], width)
    scales = like.new_empty((*like.shape[:-1], 1) if fp8 else (0,), dtype=torch.float32)
    return like.new_empty(shape, dtype=torch.float8_e4m3fn if fp8 else like.dtype), scales


def _launch_residual_norm(
    x: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    total: Tensor,
    one_plus: bool = False,
    fp8: bool = False,
) -> tuple[Tensor, Tensor]:
    batch, frames, spatial, width = x.shape
    norm = weight is not None
    out, scales = _out(x, width, fp8) if norm else (x.new_empty(0), x.new_empty(0, dtype=torch.float32))
    size, warps = _block(width)
    _residual_norm[(batch * frames, triton.cdiv(spatial, ROWS))](
        *(x, update, gate, weight, bias, total, out, scales, frames, spatial, width),
        *(*_strides(gate), *_strides(weight), EPS),
        UPDATE=update is not None,
        GATE=gate is not None,
        NORM=norm,
        ONE_PLUS=one_plus,
        FP8=fp8,
        ROWS=ROWS,
        WIDTH=size,
        num_warps=warps,
    )
    return out, scales


def _residual_norm_op(
    x: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    one_plus: bool,
    fp8: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    total = x.new_empty(x.shape if update is not None else (0,))
    return total, *_launch_residual_norm(x, update, gate, weight, bias, total, one_plus, fp8)


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


def _norm_rope_op(x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    return _launch_norm_rope(x, weight, cos, sin, x.new_empty(x.shape))


def _gated_product_op(gate_up: Tensor, fp8: bool) -> tuple[Tensor, Tensor]:
    width = gate_up.shape[-1] // 2
    out, scales = _out(gate_up, width, fp8)
    size, warps = _block(width)
    _gated_product[(gate_up.numel() // (2 * width),)](gate_up, out, scales, width, FP8=fp8, WIDTH=size, num_warps=warps)
    return out, scales


def _quantise_op(x: Tensor) -> tuple[Tensor, Tensor]:
    width = x.shape[-1]
    out, scales = _out(x, width, True)
    size, warps = _block(width)
    _quantise[(x.numel() // width,)](x, out, scales, width, WIDTH=size, num_warps=warps)
    return out, scales


def _fake_norm(
    x: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    one_plus: bool,
    fp8: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    none = x.new_empty(0, dtype=torch.float32)
    out = _out(x, x.shape[-1], fp8) if weight is not None else (x.new_empty(0), none)
    return x.new_empty(x.shape if update is not None else (0,)), *out


_residual_norm_op = operator("residual_norm", _residual_norm_op, _fake_norm)
_norm_rope_op = operator("norm_rope", _norm_rope_op, lambda x, weight, cos, sin: x.new_empty(x.shape))
_gated_product_op = operator(
    "gated_product", _gated_product_op, lambda gate_up, fp8: _out(gate_up, gate_up.shape[-1] // 2, fp8)
)
_quantise_op = operator("quantise", _quantise_op, lambda x: _out(x, x.shape[-1], True))


# --- what the network calls ------------------------------------------------------------------------------------------


class Quantised(NamedTuple):
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
) -> tuple[Tensor, Tensor | Quantised]:
    """x + gate * update and its LayerNorm times weight plus bias; fp32 inside. Returns the sum and the norm.

    x, update [B, T, S, C] in 16 bits; no update: x stays. gate [B or 1, T or 1, 1, C] fp32, or None: 1. weight and
    bias alike, or [C]; one_plus: 1 + weight, as modulation has it. fp8: the norm comes quantised row by row.
    """
    update = None if update is None else update.contiguous()
    total, out, scales = _residual_norm_op(x.contiguous(), update, gate, weight, bias, one_plus, fp8)
    return x if update is None else total, Quantised(out, scales) if fp8 else out


def residual_(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """x + gate * update, summed in fp32 and written into x [B, T, S, C] contiguous; gate [B or 1, T or 1, 1, C] fp32.

    Not for compiled graphs.
    """
    _launch_residual_norm(x, update.contiguous(), gate, None, None, x)
    return x


def norm_rope(x: Tensor, weight: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
    """RMSNorm over head_dim, then RoPE: x [B, N, heads, head_dim] in 16 bits -> the same.

    weight [head_dim]; rope: cosines and sines [N, head_dim/2] fp32, or None: the norm alone. x may be a slice of a
    fused projection: only a token's channels must lie together. Outside of compiled graphs the result is written into
    x, which saves the largest copies of a block.
    """
    cos, sin = rope or (None, None)
    dense = x.stride()[2:] == (x.shape[3], 1) and x.stride(0) == x.shape[1] * x.stride(1)
    x = x if dense else x.contiguous()
    return (
        _norm_rope_op(x, weight, cos, sin)
        if torch.compiler.is_compiling()
        else _launch_norm_rope(x, weight, cos, sin, x)
    )


def gated_product(gate_up: Tensor, *, fp8: bool = False) -> Tensor | Quantised:
    """silu(gate) * up of gate_up [.., 2*C] in 16 bits, gate first -> [.., C]. fp8: quantised row by row."""
    out, scales = _gated_product_op(gate_up.contiguous(), fp8)
    return Quantised(out, scales) if fp8 else out


def quantise(x: Tensor) -> Quantised:
    """x [.., C] in 16 bits as e4m3, row by row: `quantise_rows` as one kernel."""
    return Quantised(*_quantise_op(x.contiguous()))
