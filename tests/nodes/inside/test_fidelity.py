"""LongCat Fidelity: what it samples, by which kernels, what it says and shows, and what it leaves behind."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

STEPS = 3


@pytest.fixture
def small(empty):
    return {"samples": empty["samples"][:, :, :3]}


@pytest.fixture
def fidelity(comfy, model, vae, prompts, small):
    """The node on three steps of nine frames: (plot, side_by_side, images_a, images_b, report)."""

    def run(**inputs):
        settings = {"seed": 5, "steps": STEPS, "guidance": 4.0, "mode": "base", "vae": vae, "latent_image": small}
        return comfy("LongCatFidelity", **{"model": model, "model_b": model} | prompts | settings | inputs)

    return run


@pytest.fixture
def kernels(model, monkeypatch):
    """The self-attention kernel of every forward, by its backend's name."""
    seen = []
    network = model.model.diffusion_model
    original = network.prepare

    def prepare(device, dtype, options, compilers=None):
        chosen = original(device, dtype, options, compilers)
        seen.append(chosen.kernels.attend)
        return chosen

    monkeypatch.setattr(network, "prepare", prepare)
    return seen


def test_b_is_what_the_sampler_gives_and_the_floor_another_kernel(comfy, model, vae, small, fidelity, kernels, sample):
    other, _ = comfy("LongCatOptimizations", model=model, text_mode="packed")
    before = copy.deepcopy(model.model_options)
    plot, side, a, b, report = fidelity(model_b=other)
    backends = comfy.core("optimize.attention")
    names = {backend.attend: backend.name for backend in backends.BACKENDS}
    assert [names[kernel] for kernel in kernels] == ["sdpa"] * 2 * STEPS + ["sdpa-math"] * STEPS
    for patcher, images in ((model, a), (other, b)):
        alone = comfy("VAEDecode", vae=vae, samples={"samples": sample(small, model=patcher, seed=5, steps=STEPS)})
        assert torch.equal(images, alone)
    assert model.model_options == before
    error = (a.mul(255).round() - b.mul(255).round()).square().mean().item()
    said = f"B differs from A by {10 * torch.log10(torch.tensor(255**2 / error)).item():.1f} dB"
    assert (
        error > 0 and said in report and "two exact kernels differ by" in report and "beyond the noise floor" in report
    )
    assert "| B: text_mode packed |" in report and "| noise floor: attention sdpa-math |" in report
    assert "One video of 9 frames of 64x96, 3 steps, guidance 4" in report and "seed 5" in report
    charts = comfy.core("measure.charts")
    flat = (plot * 255).round().int().reshape(-1, 3)
    for color in (charts.COLORS[0], charts.FLOOR_COLOR):
        assert (flat == torch.tensor(color)).all(1).sum() > 100
    assert side.ndim == 4 and 0 <= side.min() < side.max() <= 1
    # The first frame of A stands in it, pixel by pixel twice as large.
    margin, label = charts.MARGIN, charts.ROW_LABEL
    shown = side[0, margin + label : margin + label + 128 : 2, margin : margin + 192 : 2]
    assert (shown - a[0]).abs().max() < 1 / 255


def test_same_settings_are_identical(fidelity, kernels):
    plot, _, a, b, report = fidelity(noise_floor=False)
    assert torch.equal(a, b) and "B is identical to A" in report and "No noise floor: it is switched off" in report
    assert len(kernels) == 2 * STEPS and plot.shape[1] > 300


def test_attention_of_another_node_gives_no_floor(comfy, model, fidelity):
    patched = model.clone()
    patched.model_options["transformer_options"]["optimized_attention_override"] = lambda kernel, *args, **kwargs: (
        kernel(*args, **kwargs)
    )
    report = fidelity(model=patched, steps=1)[4]
    assert "an attention override set by another node chooses A's attention" in report


def test_given_frames_are_not_compared(comfy, model, clip_latent, fidelity, forwards):
    cached = comfy("LongCatStepCache", model=model, threshold=0.3)
    *_, a, b, report = fidelity(model_b=cached, latent_image=clip_latent, steps=8, noise_floor=False)
    assert "generated frames only, from frame 13 on" in report and "step cache 0.3" in report
    assert (a[:13] - b[:13]).abs().max() < 0.02 < (a[13:] - b[13:]).abs().max()
    sizes = {shape[2] for shape in forwards}
    assert len(a) == 33 and sizes == {4, 5}, "given frames once, by the KV cache; then generated ones alone"


def test_progress_runs_over_all_samplings(comfy, fidelity, monkeypatch):
    import comfy.utils as utils

    seen = []
    monkeypatch.setattr(utils.ProgressBar, "update_absolute", lambda bar, *values: seen.append(values))
    fidelity(steps=2)
    # Without a preview, which would hide the plot.
    assert seen == [(i, 9, None) for i in range(1, 10)], "two steps and the decoding of each of three runs"


def test_interruption_leaves_the_model_as_it_was(comfy, model, small, fidelity, sample, monkeypatch):
    import comfy.model_management as management

    expected = sample(small, seed=5, steps=STEPS)
    network = model.model.diffusion_model
    calls, original = [], network.prepare

    def prepare(*args):
        calls.append(1)
        if len(calls) == 2 * STEPS + 2:
            raise management.InterruptProcessingException
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(network, "prepare", prepare)
        with pytest.raises(management.InterruptProcessingException):
            fidelity()
    asked = [execution.requested.attention for execution in network.executions.values()]
    assert asked[-1] == "sdpa-math", "the noise floor was being sampled"
    assert torch.equal(sample(small, seed=5, steps=STEPS), expected)


def test_bad_input(comfy, model, one_block, vae, fidelity, monkeypatch):
    error = comfy.core("errors").LongCatError
    with pytest.raises(error, match="different sizes as A and B"):
        fidelity(model_b=one_block)
    with pytest.raises(error, match="connect the Wan 2"):
        fidelity(vae=type("Vae", (), {"first_stage_model": torch.nn.Identity()})())
    fp8 = comfy.core("optimize.attention")
    monkeypatch.setattr(fp8, "BACKENDS", tuple(replace(b, exact=b.name == "sdpa") for b in fp8.BACKENDS))
    assert "no second exact attention kernel" in fidelity(steps=1)[4]
