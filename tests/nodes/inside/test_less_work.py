"""Guidance for a share of the steps, beside LongCat Step Cache: what the headless sampler does."""

from __future__ import annotations

import pytest

from . import cases

STEPS = 20


@pytest.fixture
def latent(comfy):
    return comfy("EmptyHunyuanLatentVideo", width=cases.WIDTH, height=cases.HEIGHT, length=9, batch_size=1)


@pytest.fixture
def passes(model):
    """The rows of the input of every pass of the network."""
    seen = []
    first = model.model.diffusion_model.blocks[0]
    handle = first.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    yield seen
    handle.remove()


@pytest.fixture
def headless(comfy, network, prompts):
    def run(shape, **options):
        sampling, schedules = comfy.core("sampling.sampler"), comfy.core("sampling.schedules")
        texts = [prompts[name][0][0] for name in ("positive", "negative")]
        masks = [(text != 0).any(-1) for text in texts]
        computed = []
        noise = comfy.core("sampling.conditioning").seeded_noise(tuple(shape), 2)
        out = sampling.sample(
            network, noise, schedules.make_schedule("base", STEPS), texts[0], masks[0], negative_context=texts[1],
            negative_mask=masks[1], callback=lambda step: computed.append(step.computed), **options,
        )  # fmt: skip
        return out, computed

    return run


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("until", [0.6, 1.0])
def test_equals_the_headless_sampler(comfy, model, latent, sample, headless, passes, until, cached):
    options = {"step_cache": 0.06} if cached else {}
    used = comfy("LongCatStepCache", model=model, threshold=0.06) if cached else model
    got = model.model.process_latent_in(sample(latent, model=used, steps=STEPS, seed=2, guidance_until=until))
    work = [rows / 2 for rows in passes]
    expected, computed = headless(got.shape, guidance_until=until, **options)
    assert work == pytest.approx([share for share in computed if share])
    assert sum(work) < STEPS or (not cached and until == 1)
    assert (got - expected).abs().max() <= 1e-3


def test_the_stock_node_ends_guidance_as_well(comfy, model, latent, sample, passes):
    import nodes

    if "CFGOverride" not in nodes.NODE_CLASS_MAPPINGS:
        pytest.skip("this ComfyUI has no CFG Override")
    override = comfy("CFGOverride", model=model, cfg=1.0, start_percent=0.6, end_percent=1.0)
    sample(latent, model=override, steps=STEPS)
    assert passes == sorted(passes, reverse=True) and set(passes) == {1, 2}
