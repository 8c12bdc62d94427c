"""Compares the VAE's Triton kernels with the layers' definitions; without a GPU they run in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longcat_core.optimize.kernels import vae as kernels
from longcat_core.optimize.requirement import Requirement
from longcat_core.parallel.vae import Strip
from longcat_core.vae import layers
from longcat_core.vae.layers import Past, Residual, RMSNorm

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def randn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, torch.float16)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.float(), want.float(), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("width", [8, 96, 130])
@pytest.mark.parametrize("with_bias", [True, False])
def test_norm_and_silu_go_behind_frames_and_between_rows(width, with_bias):
    x, gamma = randn(2, 3, 5, 7, width), randn(width, 1, 1, 1)
    bias = randn(width) if with_bias else None
    room = torch.full((2, 5, 7, 7, width), 9.0, device=DEVICE, dtype=torch.float16)
    out = room[:, 2:, 1:-1]
    kernels.norm_silu(x, gamma, bias, out)
    shifted = x.float() if bias is None else x.float() + bias.float()
    close(out, F.silu(F.rms_norm(shifted, (width,), gamma.flatten().float(), kernels.EPS)))
    out.fill_(9)
    assert (room == 9).all()


def test_a_pixel_of_zeros_stays_zero():
    out = randn(1, 1, 2, 2, 8)
    kernels.norm_silu(torch.zeros_like(out), randn(8), None, out)
    assert (out == 0).all()


@pytest.mark.parametrize("with_bias", [True, False])
def test_a_sum_with_a_bias(with_bias):
    x, more, bias = randn(1, 3, 5, 7, 96), randn(2, 3, 5, 7, 96)[:1], randn(96)
    want = x + more + (bias if with_bias else 0)
    got = kernels.add(x, bias if with_bias else None, more)
    close(got, want)
    assert got.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("rows", [layers.WHOLE, Strip((4,), 0, None)], ids=["whole", "strip"])
@pytest.mark.parametrize("widths", [(8, 8), (8, 12)])
def test_a_residual_block_gives_the_same_with_and_without_kernels(monkeypatch, widths, rows):
    torch.manual_seed(0)
    block = Residual(*widths).to(DEVICE, torch.float16).requires_grad_(False)
    parts, found = randn(2, 5, 4, 6, widths[0]).split((1, 4), dim=1), {}
    # As on a GPU.
    monkeypatch.setattr(kernels, "NEEDS", Requirement(None, triton=True, head_dims=None, backward=False))
    for name in ("kernels", "layers"):
        if name == "layers":
            monkeypatch.setattr(layers.kernels, "usable", lambda x: False)
        kept, outs = [], []
        for number, part in enumerate(parts):
            past = Past(kept, rows if name == "kernels" else layers.WHOLE)
            with torch.no_grad():
                assert layers.kernels.usable(part) == (name == "kernels")
                outs.append(block(part, past, number == 0))
            kept = past.after
        found[name] = torch.cat(outs, dim=1)
    close(found["kernels"], found["layers"])


def test_they_stay_out_where_gradients_flow():
    norm = RMSNorm(8, 3).to(DEVICE, torch.float16)
    assert not kernels.usable(randn(1, 1, 2, 2, 8)), "gradients are on"
    with torch.no_grad():
        assert kernels.usable(randn(1, 1, 2, 2, 8)) == (DEVICE.type == "cuda")
        assert not kernels.usable(randn(1, 1, 2, 2, 8).float())
    out = torch.empty(1, 1, 2, 2, 8, device=DEVICE, dtype=torch.float16)
    layers.normed(norm, randn(1, 1, 2, 2, 8), out)
    out.sum().backward()
    assert norm.gamma.grad is not None
