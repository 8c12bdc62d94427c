"""Copies by few programs: the kernel against PyTorch."""

from __future__ import annotations

import pytest
import torch

from longcat_core.optimize.kernels.put import launch_put, put

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def given(dtype: torch.dtype, heads: int, dim: int) -> torch.Tensor:
    """Some heads of some tokens of each frame, [2 samples, 3 frames, 37 tokens, heads, dim], of a larger tensor."""
    whole = torch.randn(2, 3, 50, 2 * heads, dim, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    return whole[:, :, 5:42, heads:]


@pytest.mark.parametrize("programs", [1, 4, 200])
@pytest.mark.parametrize(("heads", "dim"), [(4, 128), (3, 24)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_kernel_copies_every_row_and_nothing_else(dtype, heads, dim, programs):
    of = given(dtype, heads, dim)
    whole = torch.zeros(2, 3, 80, heads, dim, dtype=dtype, device=DEVICE)
    launch_put([(whole[:, :, 40:77], of)], programs)
    assert torch.equal(whole[:, :, 40:77], of)
    assert not whole[:, :, :40].any() and not whole[:, :, 77:].any()


def test_three_tensors_of_different_tokens_at_once():
    pairs = [(torch.zeros_like(of), of) for of in (given(torch.bfloat16, 4, 128)[:, :, :n] for n in (1, 37, 20))]
    launch_put(pairs, 4)
    assert all(torch.equal(to, of) for to, of in pairs)


def test_heads_that_do_not_lie_side_by_side():
    of = given(torch.bfloat16, 4, 128).transpose(2, 3).contiguous().transpose(2, 3)
    to = torch.zeros(of.shape, dtype=of.dtype, device=DEVICE)
    put([(to, of)], 4)
    assert torch.equal(to, of)
