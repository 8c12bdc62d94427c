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
def test_a_row_loses_half_a_step_of_its_largest_value(dtype, dim):
    x = given(dtype, dim)
    packed = rows.pack(x)
    assert packed.words.is_contiguous() and packed.words.shape[:2] == x.shape[:2]
    assert packed.words.shape[2] * 4 <= 37 * 2 * (dim + 4) + 3
    found = rows.unpack(packed, dtype)
    assert found.dtype == dtype and found.is_contiguous()
    most = x.abs().amax(-1, keepdim=True).float()
    # bf16 rounds once more.
    assert (
        (found.float() - x.float()).abs() <= most * (0.5 / 127 + (2**-8 if dtype == torch.bfloat16 else 1e-6))
    ).all()
    assert not found[:, :, 3].any(), "zeros"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kernels_do_what_pytorch_does(dtype):
    x = given(dtype)
    wanted, packed = rows.empty(x), rows.empty(x)
    rows.fill(x, wanted)
    rows.launch_pack(x, packed)
    torch.testing.assert_close(packed.scales, wanted.scales)
    # A quotient in the middle between two numbers may become either.
    off = (packed.values.int() - wanted.values.int()).abs()
    assert off.max() <= 1 and off.float().mean() < 0.01
    expected = (wanted.values.float() * wanted.scales[..., None]).to(dtype)
    torch.testing.assert_close(rows.launch_unpack(wanted, dtype), expected)
