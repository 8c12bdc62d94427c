"""Blocks that are not run: what stands in for them, when, and that everything around a block stays out of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from longcat_core.model.block import run_block
from longcat_core.model.config import ModelConfig
from longcat_core.optimize import residual_cache
from longcat_core.optimize.compilation import Regional
from longcat_core.optimize.execution import OptimizedTransformer
from longcat_core.optimize.residual_cache import ResidualCache, ResidualCaches, first_blocks
from longcat_core.optimize.switches import Optimizations

GOLDEN = Path(__file__).parent.parent / "data" / "golden"
CONFIG = replace(ModelConfig.from_json(GOLDEN / "config.json"), depth=6)
STEPS = 20


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return request.param


@pytest.fixture(scope="module")
def network(device):
    torch.manual_seed(0)
    model = OptimizedTransformer(CONFIG, dtype=torch.float32)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    return model.to(device).eval()


class Inputs:
    """Latents that drift in a straight line over the noise levels, so that a line predicts what blocks do to them."""

    def __init__(self, network: OptimizedTransformer, batch: int = 1) -> None:
        torch.manual_seed(1)
        device = network.device
        self.start, self.drift = (torch.randn(batch, 16, 3, 4, 6, device=device) for _ in range(2))
        self.text = network.embed_text(torch.randn(batch, 5, CONFIG.caption_channels, device=device), None)

    def at(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        sigma = 1 - step / STEPS
        x = self.start + 0.01 * step * self.drift
        return x, torch.full((1, 1), 1000 * sigma, device=x.device)


def count_blocks(model):
    """A list that grows by the number of every block that runs."""
    ran = []
    handles = [
        block.register_forward_pre_hook(lambda _, __, i=i: ran.append(i)) for i, block in enumerate(model.blocks)
    ]
    return ran, handles


def run(model, inputs, cache, step, **options):
    x, timestep = inputs.at(step)
    cache.begin(step, 1 - step / STEPS)
    with torch.no_grad():
        return model(x, timestep, inputs.text, residuals=cache, **options)


@pytest.mark.parametrize("depth, first", [(48, 8), (6, 1), (12, 2), (1, 1), (24, 4)])
def test_the_first_blocks_scale_with_the_depth(depth, first):
    assert first_blocks(depth) == first


@pytest.mark.parametrize("order, expected", [(0, 1.48), (1, 0.52), (2, 0.97)])
def test_a_prediction_goes_through_the_last_residuals(monkeypatch, order, expected):
    """Over the noise levels, unevenly far apart: constant, along a line, along a parabola."""
    monkeypatch.setattr(residual_cache, "ORDER", order)
    cache = ResidualCache(1.0, STEPS)
    for step, sigma in enumerate((0.9, 0.8, 0.6)):
        cache.begin(step, sigma)
        cache.keep(torch.full((1, 1, 1, 1), sigma), torch.full((1, 1, 1, 1), 3 * sigma**2 - sigma + 1))
    assert len(cache.kept) == order + 1
    cache.begin(3, 0.3)
    assert cache.add(torch.full((1, 1, 1, 1), 5.0)).item() == pytest.approx(5 + expected)


def test_the_first_blocks_decide():
    cache = ResidualCache(1.0, STEPS)
    for step, sigma in enumerate((0.9, 0.8, 0.6)):
        cache.begin(step, sigma)
        cache.keep(torch.full((1, 1, 1, 1), sigma), torch.zeros(1, 1, 1, 1))
    cache.begin(3, 0.3)
    # They are expected to give 0.3: 0.27 is off by a ninth.
    for threshold, skips in ((0.12, True), (0.11, False)):
        cache.threshold = threshold
        assert cache.expects(torch.full((1, 1, 1, 1), 0.27)) is skips


def test_a_repeated_pass_replaces_the_first():
    """The guard runs a step again without a lossy switch, and so does the sampler after it made room."""
    cache = ResidualCache(1.0, STEPS)
    for sigma, value in ((0.9, 1.0), (0.8, 7.0), (0.8, 2.0)):
        cache.begin(1, sigma)
        cache.keep(torch.tensor([value]), torch.tensor([value]))
    assert [(kept.sigma, float(kept.others)) for kept in cache.kept] == [(0.9, 1.0), (0.8, 2.0)]


def test_blocks_are_skipped_and_little_changes(network):
    inputs, cache = Inputs(network), ResidualCache(0.2, STEPS)
    ran, handles = count_blocks(network)
    try:
        for step in range(STEPS):
            ran.clear()
            out = run(network, inputs, cache, step)
            # Two in a row at most.
            whole = step < 2 or step % 3 == 1 or step == STEPS - 1
            assert ran == (list(range(CONFIG.depth)) if whole else [0]), step
            assert cache.ran == (1.0 if whole else 1 / 6)
            with torch.no_grad():
                exact = network(*inputs.at(step), inputs.text)
            assert torch.equal(out, exact) if whole else 0 < (out - exact).norm() / exact.norm() < 0.05
    finally:
        for handle in handles:
            handle.remove()


def test_a_tiny_threshold_computes_everything_exactly(network):
    inputs, cache, off = Inputs(network), ResidualCache(1e-12, STEPS), ResidualCache(0.0, STEPS)
    for step in range(6):
        with torch.no_grad():
            exact = network(*inputs.at(step), inputs.text)
        assert torch.equal(run(network, inputs, cache, step), exact)
        assert torch.equal(run(network, inputs, off, step), exact)
    assert len(cache.kept) == 2 and not off.kept


def test_what_belongs_to_other_tokens_is_forgotten(network):
    cache, other = ResidualCache(1e9, STEPS), Inputs(network, batch=2)
    for step in (2, 3, 4):
        run(network, Inputs(network), cache, step)
    assert cache.ran < 1
    run(network, other, cache, 5)
    assert cache.ran == 1 and len(cache.kept) == 1
    # The same shape in another order of tokens, as sparse attention has it.
    cache.belongs((object, cache.kind[1], 0))
    assert not cache.kept


def test_clean_frames_do_not_decide(network):
    inputs, cache = Inputs(network), ResidualCache(1e-3, STEPS)
    seen = []
    cache.expects = lambda found: seen.append(tuple(found.shape)) or False
    x, _ = inputs.at(0)
    timestep = torch.tensor([[0.0, 900.0, 900.0]], device=x.device)
    with torch.no_grad():
        network(x, timestep, inputs.text, num_cond_latents=1, residuals=cache)
    assert seen == [(1, 2, 6, CONFIG.hidden_size)]


def test_gradients_need_every_block(network):
    cache, inputs = ResidualCache(1e9, STEPS), Inputs(network)
    for step in range(4):
        cache.begin(step, 1 - step / STEPS)
        network(*inputs.at(step), inputs.text, residuals=cache)
    assert not cache.kept and cache.ran == 1


def test_skipped_blocks_are_not_fetched(device):
    model = OptimizedTransformer(CONFIG, dtype=torch.float32)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    model.to(device).stream_blocks(device, range(CONFIG.depth))
    fetched, fetch = [], model.stream._fetch
    model.stream._fetch = lambda i, *args, **options: fetched.append(i) or fetch(i, *args, **options)
    cache, inputs = ResidualCache(1e9, STEPS), Inputs(model)
    for step in range(4):
        fetched.clear()
        run(model, inputs, cache, step)
        # The next block is on its way before the decision falls.
        assert set(fetched) == (set(range(CONFIG.depth)) if step < 2 else {0, 1})


def test_compiled_blocks_need_no_further_graphs(network):
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    inputs, before, outs = Inputs(network), (network.requested, network.compiled_block), {}
    network.compiled_block = Regional(run_block, "the block", counted)
    try:
        for mode in ("off", "blocks"):
            network.set_optimizations(Optimizations(compile=mode))
            cache = ResidualCache(0.2, STEPS)
            outs[mode] = [run(network, inputs, cache, step) for step in range(4)]
            assert cache.ran < 1
    finally:
        network.set_optimizations(before[0])
        network.compiled_block = before[1]
    assert len(graphs) == 1
    for one, other in zip(outs["off"], outs["blocks"], strict=True):
        assert (one - other).abs().max() < 1e-4


def test_one_cache_becomes_two_halves():
    caches = ResidualCaches(0.1, STEPS)
    (both,) = [part["residuals"] for part in caches.options(1, True, 0, 1.0)]
    both.belongs((type, (2, 1, 1, 1), 0))
    both.keep(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
    first, second = (part["residuals"] for part in caches.options(2, True, 1, 0.9))
    assert (float(first.kept[0].others), float(second.kept[0].others)) == (3.0, 4.0)
    assert first.kind == (type, (1, 1, 1, 1), 0) and (second.step, second.sigma) == (1, 0.9)
    # Guidance ends: the half of the prompt goes on.
    assert caches.options(1, False, 2, 0.8) == [{"residuals": second}]
    first.ran, second.ran = 0.5, 1.0
    assert caches.ran == 1.0
