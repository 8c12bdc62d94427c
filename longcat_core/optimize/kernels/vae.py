"""Triton kernels for the VAE's element-wise work: each activation is read once and written once, where it belongs.

silu(norm(x + bias)) goes straight behind the frames that the next convolution still remembers, and a residual sum takes
the convolution's bias along, which cuDNN would add in a pass of its own. Arithmetic is in fp32 between the loads and
the stores, and the kernels have no backward pass. `vae.layers` defines what they compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..requirement import HALF, Inputs, Requirement
from .jit import jit, ready, tl, triton

NEEDS = Requirement(triton=True, dtypes=HALF, head_dims=None, backward=False)
# Numbers that one program works on.
BLOCK = 4096
# What F.rms_norm adds in `vae.layers`.
EPS = 1e-24


def takes(dtype: torch.dtype) -> bool:
    """Whether these kernels can run on this machine for activations in `dtype`."""
    return dtype in HALF and not NEEDS.missing()


def usable(x: Tensor) -> bool:
    """Whether activations like x [.., C] can go through these kernels: on CUDA, in 16 bits, without gradients."""
    return not torch.compiler.is_compiling() and not torch.is_grad_enabled() and not NEEDS.why_not(Inputs.of(x))


# What numbers of frames and pixels divide by changes no load or store, but each case would be compiled by itself.
@jit(do_not_specialize=["pixels", "frames", "per_frame"])
def _norm_silu(
    x, bias, gamma, out, pixels, frames, per_frame, sample_stride, frame_stride, width, eps,
    BIAS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    mask = (row < pixels)[:, None] & (column < width)[None, :]
    value = tl.load(x + row[:, None] * width + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        added = tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)
        value += added[None, :]
    square = tl.sum(value * value, axis=1) / width
    scale = tl.load(gamma + column, mask=column < width, other=0.0).to(tl.float32)
    value = value * tl.rsqrt(square + eps)[:, None] * scale[None, :]
    value = value / (1 + tl.exp(-value))
    frame = row // per_frame
    at = (frame // frames) * sample_stride + (frame % frames) * frame_stride + (row % per_frame) * width
    tl.store(out + at[:, None] + column[None, :], value.to(out.dtype.element_ty), mask=mask)


@jit
def _add(x, bias, more, out, count, width, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(more + at, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        value += tl.load(bias + at % width, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)


def norm_silu(x: Tensor, gamma: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write silu(rms_norm(x + bias) * gamma) of x [B, T, H, W, C] into `out`, whose frames are contiguous."""
    x = x.contiguous()
    width = x.shape[-1]
    constants = _constants(width, bias is not None)
    pixels, per_frame = x.numel() // width, x.shape[2] * x.shape[3]
    _norm_silu[(triton.cdiv(pixels, constants["ROWS"]),)](
        *(x, bias, gamma, out, pixels, x.shape[1], per_frame, out.stride(0), out.stride(1), width, EPS), **constants
    )


def _constants(width: int, biased: bool) -> dict[str, int]:
    size = 1 << (width - 1).bit_length()
    return {"BIAS": biased, "ROWS": max(1, BLOCK // size), "WIDTH": size, "num_warps": 8}


def add(x: Tensor, bias: Tensor | None, more: Tensor) -> Tensor:
    """x + bias + more, of x and more [.., C], in x's memory."""
    x, more = x.contiguous(), more.contiguous()
    _add[(triton.cdiv(x.numel(), BLOCK),)](
        *(x, bias, more, x, x.numel(), x.shape[-1]), BIAS=bias is not None, BLOCK=BLOCK, num_warps=8
    )
    return x


def compile_ahead(dtype: torch.dtype, widths: Iterable[int], stopped: Callable[[], bool]) -> None:
    """Compile the kernels for activations [.., C] of these widths C, or load them from Triton's cache; none runs.

    stopped: asked before each kernel whether to leave it at that.
    """
    for width in widths:
        for bias in (None, dtype):
            if stopped():
                return
            # Numbers that divide as those of a clip do: strides are multiples of the width.
            numbers = 1, 1, 1, 16 * width, 16 * width, width, EPS
            ready(_norm_silu, dtype, bias, dtype, dtype, *numbers, **_constants(width, bias is not None))
        ready(_add, *(dtype, dtype, dtype, dtype, 16 * width, width), BIAS=True, BLOCK=BLOCK, num_warps=8)
