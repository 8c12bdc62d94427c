"""The fused sampler step: what the op-by-op one computes, one graph for all steps and guidance scales."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from longcat_core.optimize.compilation import Regional
from longcat_core.optimize.switches import Optimizations
from longcat_core.sampling import step
from longcat_core.sampling.guidance import cfg_zero
from longcat_core.sampling.step import euler_step, guide, take_step

ON = Optimizations(compile="blocks")
OFF = Optimizations(compile="blocks", fused_step=False)


@pytest.fixture(autouse=True)
def counter(monkeypatch) -> Iterator[CompileCounterWithBackend]:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(step, "STEP", Regional(euler_step, "the step", counter, slow=False))
    monkeypatch.setattr(step, "GUIDANCE", Regional(cfg_zero, "guidance", counter, slow=False))
    yield counter
    torch._dynamo.reset()


def inputs(seed: int, guided: bool, frames: int = 4, batch: int = 1) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, 16, frames, 4, 6, generator=generator)
    out = torch.randn(batch * (1 + guided), 16, frames, 4, 6, generator=generator)
    sigma, less, scale = torch.rand(3, generator=generator) * torch.tensor([1.0, -0.1, 8.0])
    return latents, out, sigma, less, scale if guided else None


@pytest.mark.parametrize("cond", [0, 2])
@pytest.mark.parametrize("guided", [True, False])
def test_a_step_by_its_definition(guided, cond):
    latents, out, sigma, less, scale = inputs(0, guided)
    before = latents.clone()
    after, clean = euler_step(latents, out, sigma, less, scale, cond)
    if guided:
        uncond, positive = out.double()
        ratio = (uncond * positive).sum() / (uncond.square().sum() + 1e-8)
        velocity = -(ratio * uncond + scale.double() * (positive - ratio * uncond))[None]
    else:
        velocity = -out.double()
    velocity[:, :, :cond] = 0
    torch.testing.assert_close(after.double(), latents + less * velocity, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(clean.double(), latents - sigma * velocity, rtol=1e-5, atol=1e-5)
    assert torch.equal(latents, before)
    for tensor in (after, clean):
        assert tensor.dtype == torch.float32 and torch.equal(tensor[:, :, :cond], latents[:, :, :cond])


@pytest.mark.parametrize("guided", [True, False])
def test_one_graph_for_all_steps_and_scales(counter, guided):
    for seed in range(4):
        given = (*inputs(seed, guided), 0)
        for fused, plain in zip(take_step(ON, *given), euler_step(*given), strict=True):
            torch.testing.assert_close(fused, plain, rtol=1e-6, atol=1e-6)
    assert counter.frame_count == 1
    for frames in (6, 3):
        take_step(ON, *inputs(0, guided, frames), 0)
    assert counter.frame_count == 2, "other sizes share one more"
    take_step(ON, *inputs(0, guided), 1)
    assert counter.frame_count == 3


def test_switched_off_it_is_not_compiled(counter):
    given = (*inputs(0, True), 0)
    for switches in (OFF, Optimizations()):
        for got, wanted in zip(take_step(switches, *given), euler_step(*given), strict=True):
            assert torch.equal(got, wanted)
    assert counter.frame_count == 0


def test_guidance_alone(counter):
    def halves(seed: int) -> list[Tensor]:
        return list(torch.randn(2, 1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(seed)))

    for seed, scale in enumerate((4.0, 2.5, 7.0)):
        wanted = cfg_zero(*halves(seed), scale)
        torch.testing.assert_close(guide(ON, *halves(seed), scale), wanted, rtol=1e-6, atol=1e-6)
        assert torch.equal(guide(OFF, *halves(seed), scale), wanted)
    assert counter.frame_count == 1
