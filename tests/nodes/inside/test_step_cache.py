"""LongCat Step Cache: what the headless step cache does, under LongCat Sampler and stock ones."""

from __future__ import annotations

import pytest
import torch

from . import cases

STEPS = 24


@pytest.fixture
def latent(comfy):
    return comfy("EmptyHunyuanLatentVideo", width=cases.WIDTH, height=cases.HEIGHT, length=9, batch_size=1)


@pytest.fixture
def calls(model, monkeypatch):
    """Forwards of the network."""
    seen = []
    network = model.model.diffusion_model
    forward = network.forward
    monkeypatch.setattr(network, "forward", lambda *args, **kwargs: seen.append(1) or forward(*args, **kwargs))
    return seen


def test_equals_the_headless_cache(comfy, model, network, prompts, latent, sample, calls):
    cached = comfy("LongCatStepCache", model=model, threshold=0.06)
    got = model.model.process_latent_in(sample(latent, model=cached, steps=STEPS, seed=2))
    assert 3 < len(calls) < STEPS - 3
    sampling, schedules = comfy.core("sampling.sampler"), comfy.core("sampling.schedules")
    noise = comfy.core("sampling.conditioning").seeded_noise(tuple(got.shape), 2)
    texts = [prompts[name][0][0] for name in ("positive", "negative")]
    masks = [(text != 0).any(-1) for text in texts]
    computed = []
    expected = sampling.sample(
        network, noise, schedules.make_schedule("base", STEPS), texts[0], masks[0], negative_context=texts[1],
        negative_mask=masks[1], step_cache=0.06, callback=lambda step: computed.append(not step.reused),
    )  # fmt: skip
    assert sum(computed) == len(calls)
    assert (got - expected).abs().max() <= 1e-3


def test_stock_samplers_leave_steps_out_too(comfy, model, prompts, latent, calls):
    inputs = {"latent_image": latent, **prompts, "seed": 1, "steps": STEPS, "cfg": 4.0, "denoise": 1.0}
    inputs |= {"sampler_name": "euler", "scheduler": "simple"}
    every = comfy("KSampler", model=model, **inputs)["samples"]
    whole = len(calls)
    calls.clear()
    some = comfy("KSampler", model=comfy("LongCatStepCache", model=model, threshold=0.06), **inputs)["samples"]
    assert whole == STEPS and 3 < len(calls) < STEPS - 3
    assert 0 < (some - every).norm() / every.norm() < 0.3
    calls.clear()
    assert torch.equal(comfy("KSampler", model=model, **inputs)["samples"], every), (
        "the MODEL that came in is as it was"
    )


def test_given_frames_stay(comfy, model, vae, frames, sample, calls):
    size = {"resolution": "custom", "width": cases.WIDTH, "height": cases.HEIGHT, "length": 17}
    given = comfy("LongCatVideoContinuation", vae=vae, video=frames, cond_frames=5, **size)
    cached = comfy("LongCatStepCache", model=model, threshold=0.1)
    out = sample(given, model=cached, steps=STEPS)
    # One of the calls fills the cache of the given frames.
    assert 3 < len(calls) < STEPS - 3
    assert (out[:, :, :2] - given["samples"][:, :, :2]).abs().max() < 1e-5


def test_zero_takes_it_off_again(comfy, model, latent, sample, calls):
    cached = comfy("LongCatStepCache", model=comfy("LongCatStepCache", model=model, threshold=0.2), threshold=0.0)
    sample(latent, model=cached, steps=STEPS)
    assert len(calls) == STEPS
