"""Steps without guidance: for every way in which given frames and guidance are computed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from longcat_core.checkpoints.load import load_transformer
from longcat_core.errors import LongCatError
from longcat_core.generate.request import NANO, GenerateRequest
from longcat_core.sampling.guidance import guided_steps
from longcat_core.sampling.sampler import sample
from longcat_core.sampling.schedules import make_schedule
from longcat_core.sampling.step_cache import StepCache

GOLDEN = Path(__file__).parent.parent / "data" / "golden"
SHAPE = (1, 16, 3, 4, 6)
STEPS = 20
GIVEN = [(0, "exact"), (1, "exact"), (1, "official"), (1, "off")]


@pytest.fixture(scope="module")
def setting():
    golden = load_file(GOLDEN / "generate.safetensors")
    model = load_transformer(GOLDEN / "dit.safetensors")
    text = {"context": golden["pos.embeds"], "mask": golden["pos.mask"]}
    negative = {"negative_context": golden["neg.embeds"], "negative_mask": golden["neg.mask"]}
    return model, text | negative


class Run:
    """One sampling. rows: of every evaluation's input; computed: of every step."""

    def __init__(self, setting, given: int = 0, batch: int = 1, split: bool = False, **options) -> None:
        model, text = setting
        noise = torch.randn(batch, *SHAPE[1:], generator=torch.Generator().manual_seed(0))
        cond = torch.randn(1, 16, given, 4, 6, generator=torch.Generator().manual_seed(1)) if given else None
        self.rows, self.steps, self.latents = [], [], []
        forward, before = model.forward, model.requested

        def watched(x, *args, **kwargs):
            if kwargs.get("fill") is None:
                self.rows.append(len(x))
            return forward(x, *args, **kwargs)

        def after(step) -> None:
            self.steps.append(step)
            self.latents.append(step.latents.clone())

        model.forward = watched
        model.set_optimizations(replace(before, split_guidance=split))
        try:
            self.out = sample(
                model, noise, make_schedule("base", STEPS), **text, cond_latents=cond, callback=after, **options
            )
        finally:
            del model.forward
            model.set_optimizations(before)

    @property
    def computed(self) -> list[float]:
        return [step.computed for step in self.steps]


def distance(one, other):
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize(
    "until, steps, guided", [(1.0, 50, 50), (0.6, 50, 30), (0.0, 16, 0), (0.5, 5, 2), (0.99, 10, 10)]
)
def test_how_many_steps_have_guidance(until, steps, guided):
    assert guided_steps(until, steps) == guided


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("given, kv_cache", GIVEN)
def test_guidance_ends_after_its_share(setting, given, kv_cache, split):
    every = Run(setting, given, split=split, kv_cache=kv_cache)
    some = Run(setting, given, split=split, kv_cache=kv_cache, guidance_until=0.6)
    assert some.rows == ([1, 1] * 12 if split else [2] * 12) + [1] * 8
    assert some.computed == [1.0] * 12 + [0.5] * 8 and every.computed == [1.0] * 20
    for step in range(12):
        assert torch.equal(some.latents[step], every.latents[step])
    assert not torch.equal(some.latents[12], every.latents[12])
    # What follows is the prompt alone, from the same latents on.
    assert distance(some.out, every.out) < 1


@pytest.mark.parametrize("given, kv_cache", GIVEN)
def test_no_step_with_guidance_is_no_guidance(setting, given, kv_cache):
    none = Run(setting, given, kv_cache=kv_cache, guidance_until=0.0)
    plain = Run(setting, given, kv_cache=kv_cache, guidance_scale=1.0)
    assert (none.out - plain.out).abs().max() < 1e-5 and none.rows == plain.rows
    assert Run(setting, given, kv_cache=kv_cache, guidance_scale=1.0, guidance_until=0.5).out.equal(plain.out)


def test_several_videos_leave_guidance_together(setting):
    both = Run(setting, batch=2, guidance_until=0.5)
    one = Run(setting, guidance_until=0.5)
    assert both.rows == [4] * 10 + [2] * 10
    # Noise of the first video is the same.
    assert both.out.shape[0] == 2 and one.out.shape[0] == 1


def test_the_step_cache_goes_on_with_the_prompts_half():
    cache = StepCache(1e9, STEPS)
    pairs = [(torch.full(SHAPE, float(a)), torch.full(SHAPE, float(b))) for a, b in ((100, 1), (200, 3))]
    for step, pair in enumerate(pairs):
        cache.keep(torch.full(SHAPE, float(step)), torch.cat(pair), 1 - 0.1 * step)
    assert cache.rate == pytest.approx(51)
    cache.keep_last(2)
    assert cache.rate == pytest.approx(2)
    found = cache.find(2, torch.full(SHAPE, 2.0), 0.8)
    assert found.shape == SHAPE and torch.allclose(found, torch.tensor(4.0))
    early = StepCache(1e9, STEPS)
    early.keep_last(2)
    assert early.out is None


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("given, kv_cache", GIVEN)
def test_the_step_cache_works_where_guidance_ends(setting, given, kv_cache, split):
    options = {"kv_cache": kv_cache, "guidance_until": 0.6, "split": split}
    every = Run(setting, given, **options)
    cached = Run(setting, given, step_cache=0.1, **options)
    assert sum(cached.computed) < sum(every.computed) and distance(cached.out, every.out) < 0.3
    assert all(torch.isfinite(latents).all() for latents in cached.latents)
    if given:
        assert torch.equal(cached.out[:, :, :1], every.out[:, :, :1])


def test_what_a_request_may_ask_for():
    assert GenerateRequest("x", guidance_until=0.5).filled(NANO).guidance_until == 0.5
    for value in (-0.1, 1.5, float("nan"), "half"):
        with pytest.raises(LongCatError, match=r"guidance until .* is out of range"):
            GenerateRequest("x", guidance_until=value).filled(NANO)
    (note,) = GenerateRequest("x", guidance_until=0.001).filled(NANO).notes()
    assert "out of every step" in note
    assert not GenerateRequest("x", guidance_until=0.001, guidance_scale=1.0).filled(NANO).notes()
