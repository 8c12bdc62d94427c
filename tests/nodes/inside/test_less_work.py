"""Guidance for a share of the steps, and LongCat Step Cache of kind blocks: what the headless sampler does, under
LongCat Sampler and stock ones."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from . import cases

STEPS = 20


@pytest.fixture
def latent(comfy):
    return comfy("EmptyHunyuanLatentVideo", width=cases.WIDTH, height=cases.HEIGHT, length=9, batch_size=1)


@pytest.fixture
def passes(model):
    """[rows of the input, number of blocks that ran] of every pass of the network."""
    seen, blocks = [], model.model.diffusion_model.blocks

    def before(i):
        def hook(_, inputs):
            if i == 0:
                seen.append([len(inputs[0]), 0])
            seen[-1][1] += 1

        return hook

    handles = [block.register_forward_pre_hook(before(i)) for i, block in enumerate(blocks)]
    yield seen
    for handle in handles:
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


@pytest.mark.parametrize("kind", [None, "steps", "blocks"])
@pytest.mark.parametrize("until", [0.6, 1.0])
def test_equals_the_headless_sampler(comfy, model, latent, sample, headless, passes, until, kind):
    options = {} if kind is None else {"step_cache": 0.06, "step_cache_kind": kind}
    used = model if kind is None else comfy("LongCatStepCache", model=model, threshold=0.06, kind=kind)
    got = model.model.process_latent_in(sample(latent, model=used, steps=STEPS, seed=2, guidance_until=until))
    depth = len(model.model.diffusion_model.blocks)
    work = [rows * ran / (2 * depth) for rows, ran in passes]
    expected, computed = headless(got.shape, guidance_until=until, **options)
    assert work == pytest.approx([share for share in computed if share])
    assert sum(work) < STEPS or (kind is None and until == 1)
    assert (got - expected).abs().max() <= 1e-3


@pytest.mark.parametrize("kv_cache", ["exact", "official", "off"])
def test_given_frames_stay(comfy, model, clip_latent, sample, passes, kv_cache):
    cached = comfy("LongCatStepCache", model=model, threshold=0.1, kind="blocks")
    out = sample(clip_latent, model=cached, steps=STEPS, kv_cache=kv_cache, guidance_until=0.5)
    given = clip_latent["noise_mask"].shape[2] and int((clip_latent["noise_mask"][0, 0, :, 0, 0] == 0).sum())
    assert (out[:, :, :given] - clip_latent["samples"][:, :, :given]).abs().max() < 1e-5
    rows = [rows for rows, _ in passes[-STEPS:]]
    assert rows == [2] * 10 + [1] * 10 and any(ran == 1 for _, ran in passes)


def test_stock_samplers_skip_blocks_too(comfy, model, prompts, latent, passes):
    inputs = {"latent_image": latent, **prompts, "seed": 1, "steps": STEPS, "cfg": 4.0, "denoise": 1.0}
    inputs |= {"scheduler": "simple"}
    depth = len(model.model.diffusion_model.blocks)
    cached = comfy("LongCatStepCache", model=model, threshold=0.1, kind="blocks")
    for sampler in ("euler", "dpmpp_2m"):
        every = comfy("KSampler", model=model, sampler_name=sampler, **inputs)["samples"]
        assert {ran for _, ran in passes} == {depth}
        passes.clear()
        some = comfy("KSampler", model=cached, sampler_name=sampler, **inputs)["samples"]
        assert {ran for _, ran in passes} == {1, depth} and passes[-1][1] == depth
        assert 0 < (some - every).norm() / every.norm() < 0.3
        passes.clear()


def test_the_stock_node_ends_guidance_as_well(comfy, model, latent, sample, passes):
    import nodes

    if "CFGOverride" not in nodes.NODE_CLASS_MAPPINGS:
        pytest.skip("this ComfyUI has no CFG Override")
    override = comfy("CFGOverride", model=model, cfg=1.0, start_percent=0.6, end_percent=1.0)
    sample(latent, model=override, steps=STEPS)
    rows = [rows for rows, _ in passes]
    assert rows == sorted(rows, reverse=True) and set(rows) == {1, 2}


def test_the_kind_can_be_changed_and_taken_off(comfy, model, latent, sample, passes):
    depth = len(model.model.diffusion_model.blocks)
    steps = comfy("LongCatStepCache", model=model, threshold=1.0, kind="steps")
    blocks = comfy("LongCatStepCache", model=steps, threshold=1.0, kind="blocks")
    sample(latent, model=blocks, steps=8)
    assert len(passes) == 8 and {ran for _, ran in passes} == {1, depth}
    passes.clear()
    sample(latent, model=comfy("LongCatStepCache", model=blocks, threshold=1.0), steps=8)
    assert len(passes) < 8 and {ran for _, ran in passes} == {depth}
    passes.clear()
    sample(latent, model=comfy("LongCatStepCache", model=blocks, threshold=0.0, kind="blocks"), steps=8)
    assert len(passes) == 8 and {ran for _, ran in passes} == {depth}


def test_what_other_nodes_change_has_caches_of_its_own(comfy):
    """Context windows and passes with patched blocks have the prompts of the plain pass."""
    caches = comfy.node("step_cache")._BlockCaches(0.1, torch.linspace(1, 0, 11), (1, 16, 1, 4, 6), True)
    cpu, sigma = torch.device("cpu"), torch.tensor([1.0])
    options = {"uuids": ["a", "b"], "sigmas": sigma}
    plain = caches.of(cpu, options)
    assert caches.of(cpu, dict(options)) is plain and plain.step == 0
    patched = caches.of(cpu, options | {"patches_replace": {"dit": {("double_block", 1): None}}})
    windows = [caches.of(cpu, options | {"context_window": SimpleNamespace(index_list=[i])}) for i in range(2)]
    assert len({id(cache) for cache in (plain, patched, *windows)}) == 4
    # The prompt alone in the same step is another pass; from a later step on it is a half of the pair.
    plain.belongs((type, (2, 1, 1, 1), 0))
    plain.keep(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
    alone = caches.of(cpu, {"uuids": ["b"], "sigmas": sigma})
    assert not alone.kept
    del caches.caches[next(key for key, cache in caches.caches.items() if cache is alone)]
    later = caches.of(cpu, {"uuids": ["b"], "sigmas": torch.tensor([0.9])})
    assert later.kept[0].others.tolist() == [4.0] and later.step == 1
    assert caches.of(cpu, {"sigmas": sigma}) is None


def test_a_skipped_rest_is_not_fetched(comfy, monkeypatch):
    prefetch = comfy.node("comfy_prefetch")
    taken = []
    pop = lambda queue, device, block: taken.append((queue.pop(0), block))  # noqa: E731
    monkeypatch.setattr(prefetch, "model_prefetch", SimpleNamespace(prefetch_queue_pop=pop))
    blocks = [torch.nn.Linear(1, 1) for _ in range(3)]
    found = prefetch.Prefetch(lambda: [None, *blocks, None], blocks, torch.device("cpu"), torch.float32, ())
    with found(0):
        pass
    found.leave()
    assert found.queue == [None] and taken == [(None, blocks[0]), (blocks[0], None)]
    for i in range(3):
        with found(i):
            pass
    assert found.queue == [None] and [block for _, block in taken[2:]] == [*blocks, None]
