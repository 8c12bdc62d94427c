"""Compares the VAE's Triton kernels with the layers' definitions; without a GPU they run in Triton's interpreter."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longcat_core.generate.vae import VideoVAE
from longcat_core.optimize.kernels import vae as kernels
from longcat_core.optimize.requirement import Requirement
from longcat_core.parallel.vae import Strip
from longcat_core.vae import layers
from longcat_core.vae.layers import Past, Residual, RMSNorm
from longcat_core.vae.network import VAEConfig, WanVAE
from longcat_core.vae.parts import decoded

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


class Launched:
    """In place of a kernel: which of its variants are launched, and which are compiled ahead."""

    def __init__(self, kernel) -> None:
        self.names = list(inspect.signature(kernel.fn).parameters)
        # The interpreter's functions keep their options, the compiler's each parameter's.
        options = getattr(kernel, "kwargs", {})
        self.plain = options.get("do_not_specialize") or [
            each.name for each in getattr(kernel, "params", ()) if each.do_not_specialize
        ]
        self.launched, self.compiled = set(), set()

    def variant(self, args, options) -> tuple:
        """What Triton compiles a kernel for: dtypes, constants, and how numbers divide."""
        found = []
        for name, value in zip(self.names, args, strict=False):
            if isinstance(value, int):
                found.append(None if name in self.plain else (value % 16 == 0, value == 1))
            else:
                found.append(getattr(value, "dtype", value))
        return *found, *sorted(options.items())

    def __getitem__(self, grid) -> Callable:
        return lambda *args, **options: self.launched.add(self.variant(args, options))

    def warmup(self, *args, grid, **options) -> None:
        self.compiled.add(self.variant(args, options))


def test_what_a_clip_needs_is_compiled_ahead(monkeypatch):
    found = [Launched(getattr(kernels, name)) for name in ("_norm_silu", "_add")]
    monkeypatch.setattr(kernels, "_norm_silu", found[0])
    monkeypatch.setattr(kernels, "_add", found[1])
    monkeypatch.setattr(kernels, "usable", lambda x: True)
    monkeypatch.setattr(kernels, "takes", lambda dtype: True)
    model = WanVAE(VAEConfig(16, 16, [0.0] * 16, [1.0] * 16)).to(torch.bfloat16).requires_grad_(False)
    with torch.no_grad():
        for frames, height, width, most in ((1, 2, 2, 1 << 20), (7, 3, 5, 1 << 17), (9, 4, 2, 1 << 20)):
            for _ in decoded(model, torch.zeros(1, 16, frames, height, width, dtype=torch.bfloat16), most):
                pass
    asked: list[bool] = []
    VideoVAE(model).compile_ahead(lambda: asked.append(len(asked) > 3) or asked[-1])
    assert 0 < sum(len(each.compiled) for each in found) < sum(len(each.launched) for each in found)
    VideoVAE(model).compile_ahead(lambda: False)
    assert [each.compiled for each in found] == [each.launched for each in found]
    assert len(found[0].launched) == 6
