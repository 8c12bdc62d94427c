"""The first output under lossy settings is checked; a spoiled one is recomputed without them and announced."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from longcat_core.checkpoints.load import load_transformer
from longcat_core.files.safetensors_io import read_tensors
from longcat_core.model.config import ModelConfig
from longcat_core.optimize import attention as backends
from longcat_core.optimize.attention import Backend
from longcat_core.optimize.guard import lossy_switches
from longcat_core.optimize.optimized import OptimizedTransformer
from longcat_core.optimize.switches import Optimizations

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
CONFIG = ModelConfig.from_json(GOLDEN / "config.json")
PLAIN = Optimizations(attention="sdpa")


class Kernel:
    """A lossy attention backend that gives what the test wants."""

    def __init__(self) -> None:
        self.factor, self.calls = 1.0, 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.calls += 1
        return backends._sdpa(q, k, v) * self.factor


@pytest.fixture
def kernel(monkeypatch) -> Kernel:
    kernel = Kernel()
    lossy = Backend("lossy", "for tests", backends._ANYWHERE, kernel, exact=False)
    monkeypatch.setitem(backends._BY_NAME, "lossy", lossy)
    return kernel


@pytest.fixture
def model() -> OptimizedTransformer:
    model = load_transformer(GOLDEN / "dit.safetensors", config=CONFIG, optimizations=PLAIN)
    model.said = []
    model.announce = model.said.append
    return model


@pytest.fixture(scope="module")
def inputs() -> tuple[Tensor, ...]:
    data = read_tensors(GOLDEN / "forward.safetensors")
    return data["x"], data["t"], data["context"], data["mask"]


def test_only_lossy_exchanges_are_checked():
    exact, found = Optimizations(), lossy_switches(Optimizations(exchange="int8"), False)
    assert found == [("exchange in int8", exact)]
    assert not lossy_switches(exact, False) and not lossy_switches(Optimizations(exchange="messages"), False)


@torch.no_grad()
def run(model: OptimizedTransformer, inputs: tuple[Tensor, ...], **changes) -> Tensor:
    return model(*inputs, **changes)


@pytest.mark.parametrize("way", ["chosen", "handed in"])
def test_nan_from_a_lossy_kernel(model, inputs, kernel, way):
    wanted = run(model, inputs)
    asked = replace(PLAIN, attention="lossy")
    model.set_optimizations(asked)
    kernel.factor = float("nan")
    kernels = model.choose_kernels(torch.device("cpu")) if way == "handed in" else None
    assert torch.equal(run(model, inputs, kernels=kernels), wanted)
    assert model.said == [
        "attention backend 'lossy' gave NaN or a black picture at the first step; going on without it"
    ]
    assert model.optimizations == replace(PLAIN, attention="auto") and model.requested == asked
    calls = kernel.calls
    assert torch.equal(run(model, inputs), wanted) and kernel.calls == calls and len(model.said) == 1


def test_a_lossy_kernel_that_works_stays(model, inputs, kernel):
    model.set_optimizations(replace(PLAIN, attention="lossy"))
    run(model, inputs)
    assert kernel.calls == CONFIG.depth, "text is attended exactly"
    assert model.optimizations.attention == "lossy" and not model.said
    # What comes later is not looked at: that would hold up every step.
    kernel.factor = float("nan")
    assert run(model, inputs).isnan().any() and not model.said


def test_a_spoiled_cache_of_given_frames_is_filled_again(model, inputs, kernel):
    x = inputs[0]
    wanted = model.fill_kv_cache(x[:, :, :2])
    model.set_optimizations(replace(PLAIN, attention="lossy"))
    kernel.factor = float("nan")
    cache = model.fill_kv_cache(x[:, :, :2])
    assert torch.equal(cache.k, wanted.k) and torch.equal(cache.v, wanted.v) and len(model.said) == 1


def test_filling_a_cache_is_not_the_first_step(model, inputs, kernel):
    x, t, *text = inputs
    model.set_optimizations(replace(PLAIN, attention="lossy"))
    cache = model.fill_kv_cache(x[:, :, :2])
    kernel.factor = float("nan")
    assert run(model, (x[:, :, 2:], t, *text), kv_cache=cache).isfinite().all() and len(model.said) == 1


def test_a_black_picture(model, inputs, kernel):
    model.set_optimizations(replace(PLAIN, attention="lossy"))
    with torch.no_grad():
        model.final_layer.linear.weight.zero_()
        model.final_layer.linear.bias.zero_()
    assert not run(model, inputs).any()
    assert len(model.said) == 1 and model.optimizations.attention == "auto"


def test_exact_settings_are_not_checked(model, inputs):
    with torch.no_grad():
        model.blocks[0].attn.proj.bias.fill_(float("nan"))
    assert run(model, inputs).isnan().all() and not model.said


class Quantized(nn.Module):
    """Stands for a layer in fp8."""

    eight_bit = True

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, fp8: bool = True) -> Tensor:
        return self.layer(x) * (float("nan") if fp8 else 1)


def test_fp8_is_switched_and_given_up(model, inputs):
    wanted = run(model, inputs)
    model.blocks[1].ffn.down = Quantized(model.blocks[1].ffn.down)
    model.set_optimizations(replace(PLAIN, fp8=False))
    assert torch.equal(run(model, inputs), wanted) and not model.said
    model.set_optimizations(PLAIN)
    assert torch.equal(run(model, inputs), wanted)
    assert model.said == ["fp8 gave NaN or a black picture at the first step; going on without it"]
    assert model.optimizations == replace(PLAIN, fp8=False)


def test_both_are_given_up_one_after_the_other(model, inputs, kernel):
    wanted = run(model, inputs)
    model.blocks[1].ffn.down = Quantized(model.blocks[1].ffn.down)
    kernel.factor = float("inf")
    model.set_optimizations(replace(PLAIN, attention="lossy"))
    assert torch.equal(run(model, inputs), wanted)
    assert len(model.said) == 2 and model.optimizations == replace(PLAIN, attention="auto", fp8=False)
