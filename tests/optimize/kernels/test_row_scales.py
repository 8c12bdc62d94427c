"""Rows in 8 bits with their scales: the kernels against PyTorch, and how much is lost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longcat_core.optimize.kernels import row_scales as rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def given(dtype: torch.dtype, dim: int = 24) -> Tensor:
    """Some heads of a slice of a fused projection, by rank: [2 samples, 3 ranks, 37 tokens, 2 heads, dim]."""
    fused = torch.randn(2, 37, 3 * 3 * 4 * dim, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    fused[:, 3] = 0
    fused[:, 5] *= 1000
    return fused.chunk(3, dim=-1)[1].unflatten(-1, (3, 4, dim))[:, :, :, 1:3].transpose(1, 2)


@pytest.mark.parametrize("dim", [24, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_loses_what_e4m3_rounds(dtype, dim):
    x = given(dtype, dim)
    packed = rows.pack(x)
    assert packed.words.is_contiguous() and packed.words.shape[:2] == x.shape[:2]
    assert packed.words.shape[2] * 4 <= 37 * 2 * (dim + 4) + 3
    found = rows.unpack(packed, dtype)
    assert found.dtype == dtype and found.is_contiguous()
    most = x.abs().amax(-1, keepdim=True).float()
    lost = (found.float() - x.float()).abs()
    # Half of the last of three bits; of numbers below 2^-6 half of 2^-9, and bf16 rounds once more.
    assert (lost <= x.abs().float() / 16 * 1.07 + most / 448 / 1024).all()
    assert not found[:, :, 3].any(), "zeros"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kernels_do_what_pytorch_does(dtype):
    x = given(dtype)
    wanted, packed = rows.empty(x), rows.empty(x)
    values, scales = rows.quantize_rows(x)
    rows.launch_pack(x, packed)
    torch.testing.assert_close(packed.scales, scales[..., 0])
    # Triton's interpreter gets wrong what rounds up to a power of two.
    right = values.float().abs().log2() % 1 != 0 if DEVICE.type == "cpu" else torch.ones_like(values, dtype=torch.bool)
    found, expected = packed.values.float()[right], values.float()[right]
    # A quotient in the middle between two numbers may become either.
    torch.testing.assert_close(found, expected, rtol=0.13, atol=2**-9)
    assert (found == expected).float().mean() > 0.99
    wanted.scales.copy_(scales[..., 0])
    wanted.values.view(torch.uint8).copy_(values.view(torch.uint8))
    torch.testing.assert_close(rows.launch_unpack(wanted, dtype), (values.float() * scales).to(dtype))
