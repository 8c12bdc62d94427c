"""LongCat Sampler gives what the headless pipeline gives, and its parts give what it gives."""

from __future__ import annotations

import pytest
import torch

from . import cases
from .conftest import ROUNDING

EQUAL = 1e-4  # of latents whose standard deviation is about 1
TOLERANCE = EQUAL * ROUNDING


@pytest.fixture
def latents(empty, image_latent, clip_latent):
    return {None: empty, 1: image_latent, 17: clip_latent}


@pytest.mark.parametrize("name", cases.CASES)
def test_sampler_equals_the_headless_pipeline(comfy, model, sample, latents, headless, name):
    case = cases.CASES[name]
    out = sample(
        latents[case.get("given")],
        seed=case["seed"],
        steps=case["steps"],
        guidance=case["guidance_scale"],
        mode=case["schedule"],
        kv_cache=case.get("kv_cache", "exact"),
    )
    normalized = model.model.process_latent_in(out)
    assert normalized.std() > 0.3
    assert (normalized - headless[name]).abs().max() <= TOLERANCE


def test_the_exact_cache_changes_nothing_and_the_official_one_does(headless):
    for name in ("image", "clip"):
        assert (headless[name] - headless[f"{name}_uncached"]).abs().max() <= EQUAL
    assert (headless["clip"] - headless["clip_official"]).abs().max() > 10 * EQUAL


@pytest.mark.parametrize("given", [None, 1, 17])
@pytest.mark.parametrize("mode, guidance", [("base", 4.0), ("distilled", 1.0)])
def test_parts_equal_the_sampler(comfy, model, prompts, sample, latents, given, mode, guidance):
    guider = comfy("LongCatGuider", model=model, guidance=guidance, **prompts)
    out, denoised = comfy(
        "SamplerCustomAdvanced",
        noise=comfy("RandomNoise", noise_seed=9),
        guider=guider,
        sampler=comfy("KSamplerSelect", sampler_name="euler"),
        sigmas=comfy("LongCatScheduler", model=model, mode=mode, steps=3),
        latent_image=latents[given],
    )
    whole = sample(latents[given], seed=9, steps=3, guidance=guidance, mode=mode)
    assert torch.equal(out["samples"], whole)
    assert (denoised["samples"] - whole).abs().max() <= TOLERANCE, "after the last step, the estimate is the result"


def test_seeds_and_batches(comfy, sample, empty):
    one, other = sample(empty, seed=1), sample(empty, seed=2)
    assert torch.equal(one, sample(empty, seed=1)) and not torch.allclose(one, other, atol=0.1)
    batch = {"samples": empty["samples"].repeat(2, 1, 1, 1, 1)}
    two = sample(batch, seed=1)
    # A batch of ComfyUI draws its noise in one go: its first video is the one of a batch of one.
    assert (two[:1] - one).abs().max() <= 10 * TOLERANCE and not torch.allclose(two[0], two[1], atol=0.1)


def test_refine_starts_half_way(comfy, model, prompts, network, sample, clip_latent, empty):
    """z = 0.5 z + 0.5 noise, then 500 and the base timesteps below it."""
    latent = {"samples": sample(empty)}
    clean = model.model.process_latent_in(latent["samples"])
    core = comfy.core("sampling.sampler")
    schedule = comfy.core("sampling.schedules").make_schedule("refine", 30)
    noise = comfy.core("sampling.conditioning").seeded_noise(tuple(clean.shape), 4)
    context = prompts["positive"][0][0]
    mask = (context != 0).any(-1)
    expected = core.sample(network, 0.5 * clean + 0.5 * noise, schedule, context, mask, guidance_scale=1.0)
    out = model.model.process_latent_in(sample(latent, mode="refine", steps=30, seed=4, guidance=1.0))
    assert (out - expected).abs().max() <= TOLERANCE
