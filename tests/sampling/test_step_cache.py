"""Steps that are not computed: when, what stands in for them, and that given frames and guidance are not in the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from longcat_core.checkpoints.load import load_transformer
from longcat_core.errors import LongCatError
from longcat_core.generate.request import NANO, GenerateRequest
from longcat_core.sampling.sampler import sample
from longcat_core.sampling.schedules import make_schedule
from longcat_core.sampling.step_cache import StepCache

GOLDEN = Path(__file__).parent.parent / "data" / "golden"
SHAPE = (1, 16, 3, 4, 6)


def latents(value: float) -> torch.Tensor:
    return torch.full(SHAPE, float(value))


def test_the_rate_is_learned_and_the_change_added_up():
    cache = StepCache(0.25, steps=20)
    assert cache.find(0, latents(0), 1.0) is None
    cache.keep(latents(0), latents(10), 1.0)
    assert cache.find(1, latents(1), 0.9) is None, "there is no rate yet"
    cache.keep(latents(1), latents(12), 0.9)
    # The output changes by 2 for 1 of the latents: by 2/12 of itself a step. Half of the line on: 12 + 1.
    assert torch.allclose(cache.find(2, latents(2), 0.8), latents(13))
    assert cache.find(3, latents(3), 0.7) is None, "4/12 are more than a quarter"
    cache.keep(latents(3), latents(13), 0.7)
    # Now by 1/2 for 1: by 1/52 of itself for half a step, back or forth. The line falls by 1 in 0.2.
    for step, value in enumerate((3.5, 4.0, 4.5, 4.0, 3.5), 4):
        assert torch.allclose(cache.find(step, latents(value), 0.3), latents(14))
    assert cache.find(9, latents(-4), 0.2) is None


def test_first_and_last_steps_are_computed():
    cache = StepCache(1e9, steps=40)
    computed = []
    for step in range(40):
        if cache.find(step, latents(step), 1 - step / 40) is None:
            computed.append(step)
            cache.keep(latents(step), latents(1 + step), 1 - step / 40)
    assert computed == [0, 1, 2, 3, 39]
    few = StepCache(1e9, steps=4)
    assert (few.first, few.last) == (2, 3)


def test_nothing_is_kept_without_a_threshold():
    cache = StepCache(0.0, steps=20)
    for step in range(20):
        assert cache.find(step, latents(step), 1.0) is None
        cache.keep(latents(step), latents(1), 1.0)
    assert cache.out is None and cache.computed is None


def test_given_frames_do_not_count():
    noisy, out = torch.randn(SHAPE), torch.randn(SHAPE)
    alone, beside = StepCache(1e9, 20), StepCache(1e9, 20, num_cond=2)
    given = torch.randn(1, 16, 2, 4, 6)
    for step in range(5):
        for cache, x in ((alone, noisy + step), (beside, torch.cat((given, noisy + step), dim=2))):
            found = cache.find(step, x, 1 - step / 20)
            assert (found is None) == (step < 2)
            if found is None:
                more = (1 + step) * out
                cache.keep(x, torch.cat((given, more), dim=2) if cache is beside else more, 1 - step / 20)
    assert beside.accumulated == pytest.approx(alone.accumulated, rel=1e-6) and alone.accumulated > 0


@pytest.fixture(scope="module")
def setting():
    golden = load_file(GOLDEN / "generate.safetensors")
    model = load_transformer(GOLDEN / "dit.safetensors")
    text = {"context": golden["pos.embeds"], "mask": golden["pos.mask"]}
    negative = {"negative_context": golden["neg.embeds"], "negative_mask": golden["neg.mask"]}
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    return model, noise, text, negative


def run(setting, threshold, **changes):
    model, noise, text, negative = setting
    calls, steps = [], []
    forward = model.forward
    model.forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    try:
        schedule = make_schedule("base", 20)
        options = {**text, **negative, "callback": steps.append, "step_cache": threshold} | changes
        out = sample(model, noise, schedule, **options)
    finally:
        del model.forward
    return out, len(calls), [step.index for step in steps if not step.reused]


@pytest.mark.parametrize("kv_cache", ["exact", "official", "off"])
@pytest.mark.parametrize("given", [0, 1])
def test_sampling_leaves_steps_out(setting, kv_cache, given):
    cond = torch.randn(1, 16, 1, 4, 6, generator=torch.Generator().manual_seed(1)) if given else None
    options = {"cond_latents": cond, "kv_cache": kv_cache}
    every, calls, computed = run(setting, 0.0, **options)
    extra = calls - 20
    assert computed == list(range(20))
    some, calls, computed = run(setting, 0.1, **options)
    assert calls - extra == len(computed) < 20 and computed[:2] == [0, 1] and computed[-1] == 19
    fewer, fewest, _ = run(setting, 0.5, **options)
    assert fewest < calls
    if given:
        assert torch.equal(some[:, :, :1], cond)
    near, far = ((x - every).norm() / every.norm() for x in (some, fewer))
    assert 0 < near < far < 0.5


def test_kept_and_computed_given_frames_leave_out_the_same_steps(setting):
    cond = torch.randn(1, 16, 1, 4, 6, generator=torch.Generator().manual_seed(1))
    once, _, computed = run(setting, 0.1, cond_latents=cond, kv_cache="exact")
    every, _, also = run(setting, 0.1, cond_latents=cond, kv_cache="off")
    assert computed == also and (once - every).abs().max() < 1e-4


def test_what_a_request_may_ask_for():
    assert GenerateRequest("x", step_cache=0.05).filled(NANO).step_cache == 0.05
    for value in (-0.1, 1.5, float("nan")):
        with pytest.raises(LongCatError, match="step cache"):
            GenerateRequest("x", step_cache=value).filled(NANO)
