"""LongCat Benchmark: what it times, what it shows, what it says."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def small(empty):
    return {"samples": empty["samples"][:, :, :3]}


def test_a_against_everything_off(comfy, model, prompts, small):
    seen = []
    network = model.model.diffusion_model
    original = network.prepare

    def prepare(device, dtype, options, compilers=None):
        seen.append(dict(options))
        return original(device, dtype, options, compilers)

    network.prepare = prepare
    try:
        plot, report = comfy("LongCatBenchmark", model=model, latent_image=small, steps=2, guidance=4.0, **prompts)
    finally:
        del network.prepare
    assert plot.ndim == 4 and plot.shape[0] == 1 and plot.shape[3] == 3 and 0 <= plot.min() < plot.max() <= 1
    # Bars of both colors.
    flat = (plot * 255).round().int().reshape(-1, 3)
    for color in comfy.core("measure.charts").COLORS[:2]:
        assert (flat == torch.tensor(color)).all(1).sum() > 500
    key = comfy.node("comfy_network").OPTIMIZATIONS_KEY
    ran = [options.get(key) for options in seen]
    config = comfy.core("optimize.switches")
    off = config.Optimizations(**comfy.core("measure.speed").plain(torch.device("cpu"), torch.float32), fp8=False)
    # A, B, B, A: each turn has a step of its own before the timed ones.
    assert ran == [None] * 2 + [off] * 3 + [None] * 2
    assert "| a step (ms) |" in report and "| least to most (ms) |" in report
    assert (
        "not distinguishable by fewer than 3 steps" in report
        and "| fused_qkv | on | off |" in report
        and "96x64, 9 frames" in report
    )
    assert "B is A with every optimization off" in report and "peak memory" not in report, "no peak on a CPU"


def test_two_models_of_other_switches_and_random_text(comfy, model, small):
    other, _ = comfy("LongCatOptimizations", model=model, text_mode="packed")
    plot, report = comfy("LongCatBenchmark", model=model, model_b=other, latent_image=small, steps=1, guidance=1.0)
    assert "| text_mode | exact | packed |" in report and "without guidance" in report
    assert "everything" not in report and "fused_qkv" not in report
    same = comfy("LongCatBenchmark", model=model, model_b=model, latent_image=small, steps=1, guidance=1.0)[1]
    assert "A and B give the same numbers" in same and plot.shape[1] > 300


def test_turns_follow_what_switching_costs(comfy, model, one_block, empty):
    """Options share weights; a LoRA on one of two clones, or another model on a GPU, makes ComfyUI move weights."""
    cheaply = comfy.node("benchmark").switch_cheaply
    other, _ = comfy("LongCatOptimizations", model=model, text_mode="packed")
    assert cheaply(model, other) and cheaply(model, one_block), "two models in the memory of a CPU"
    patched = model.clone()
    patched.add_patches({"diffusion_model.blocks.0.attn.proj.weight": (torch.zeros(1, 1),)})
    assert not cheaply(model, patched)
    on_gpu = one_block.clone()
    on_gpu.load_device = torch.device("cuda")
    assert not cheaply(model, on_gpu)


def test_an_estimate_is_compared_with_that_of_the_same_step(comfy, model, small):
    """Turns of A and B differ in length; equal settings must give equal numbers all the same."""
    for steps in (2, 3):
        _, report = comfy("LongCatBenchmark", model=model, model_b=model, latent_image=small, steps=steps, guidance=1.0)
        assert "A and B give the same numbers" in report


def test_given_frames_are_kept(comfy, model, image_latent):
    _, report = comfy("LongCatBenchmark", model=model, model_b=model, latent_image=image_latent, steps=1, guidance=1.0)
    assert "96x64, 33 frames" in report and "give the same numbers" in report


def test_bad_input(comfy, model, one_block, small):
    error = comfy.core("errors").LongCatError
    with pytest.raises(error, match="different sizes as A and B"):
        comfy("LongCatBenchmark", model=model, model_b=one_block, latent_image=small, steps=1, guidance=1.0)
