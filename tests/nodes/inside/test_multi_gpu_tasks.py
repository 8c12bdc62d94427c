"""LongCat Multi-GPU under the tasks of long videos and under other nodes: on two processes they make what one makes."""

from __future__ import annotations

import shutil

import pytest
import torch

from .test_avatar_nodes import encoder, newer, picture, run  # noqa: F401
from .test_long_video import PROMPTS, long, made, output, refine  # noqa: F401
from .test_multi_gpu import STEPS, close, ended, latent  # noqa: F401


@pytest.fixture
def shared(comfy, model):
    return comfy("LongCatMultiGPU", model=model, gpus="2")


@pytest.fixture
def together(comfy, monkeypatch):
    """One entry for every pass that two processes share."""
    division = comfy.core("parallel.division").Division
    passes, plain = [], division.evaluate

    def evaluate(self, *args, **options):
        passes.append(self)
        return plain(self, *args, **options)

    monkeypatch.setattr(division, "evaluate", evaluate)
    return passes


def same_frames(got, wanted):
    """Up to one level of the frames that are kept."""
    assert got.shape == wanted.shape and float((got - wanted).abs().max()) <= 1.01 / 255


def test_long_video_goes_on_where_one_gpu_stopped(comfy, long, made, shared, together):  # noqa: F811
    wanted, _ = long("gpus/one")
    assert not together
    images, report = long("gpus/two", model=shared)
    same_frames(images, wanted)
    assert together and report.count("\n") == 1 and made == [3, 4, 3, 4]
    together.clear()
    shutil.rmtree(output(comfy) / "gpus" / "one" / "segment-002")
    again, report = long("gpus/one", model=shared)
    same_frames(again, wanted)
    assert made[4:] == [4] and together and report.count("already in") == 1


def test_an_interrupted_long_video_resumes(comfy, long, made, shared, monkeypatch):  # noqa: F811
    import comfy.model_management as management

    wanted, _ = long("gpus/whole", model=shared)
    engine, group = comfy.node("engine").ComfyEngine, comfy.node("comfy_ranks").WORKERS._group
    plain = engine._denoise

    def interrupted(self, noise, schedule, prompt, options):
        if prompt == PROMPTS.splitlines()[1]:
            # Found before the next pass, of which the other process has been given nothing.
            management.interrupt_current_processing(True)
        return plain(self, noise, schedule, prompt, options)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_denoise", interrupted)
        with pytest.raises(management.InterruptProcessingException):
            long("gpus/cut", model=shared)
    management.interrupt_current_processing(False)
    assert comfy.node("comfy_ranks").WORKERS._group is group is not None and made == [3, 4, 3, 4]
    images, report = long("gpus/cut", model=shared)
    assert torch.equal(images, wanted) and made[4:] == [4] and report.count("already in") == 1


def test_refining(comfy, frames, refine, model, shared, together):  # noqa: F811
    """Block-sparse attention on every process, and a piece that one process made."""
    wanted, _ = refine("gpus/refined-one", frames[:9])
    assert not together
    same_frames(refine("gpus/refined-two", frames[:9], model=shared)[0], wanted)
    assert together
    shutil.rmtree(output(comfy) / "gpus" / "refined-two" / "segment-002")
    same_frames(refine("gpus/refined-two", frames[:9])[0], wanted)


def test_a_speaking_avatar(comfy, newer, run, together):  # noqa: F811
    """Segments with audio, clean frames and a reference."""
    shared = comfy("LongCatMultiGPU", model=newer.model, gpus="2")
    wanted, report, _ = run(folder="gpus/avatar-one")
    assert not together and len(report.splitlines()) >= 2
    same_frames(run(folder="gpus/avatar-two", model=shared)[0].dense(), wanted.dense())
    assert together


def test_custom_sampler(comfy, model, shared, prompts, latent, together):  # noqa: F811
    def sampled(chosen):
        return comfy(
            "SamplerCustomAdvanced",
            noise=comfy("RandomNoise", noise_seed=5),
            guider=comfy("CFGGuider", model=chosen, cfg=4.0, **prompts),
            sampler=comfy("KSamplerSelect", sampler_name="euler"),
            sigmas=comfy("BasicScheduler", model=chosen, scheduler="simple", steps=STEPS, denoise=1.0),
            latent_image=latent,
        )[0]["samples"]

    wanted = sampled(model)
    assert not together
    close(sampled(shared), wanted)
    assert len(together) == STEPS


@pytest.mark.parametrize(
    ("node", "values"),
    [
        ("LongCatSparseAttention", {"density": 0.3, "dense_steps": 0.3}),
        ("LongCatBlockSparseAttention", {}),
        ("LongCatStepCache", {"threshold": 0.3}),
        ("LongCatOptimizations", {"split_guidance": True}),
    ],
)
def test_other_nodes_before_and_after(comfy, model, shared, latent, sample, node, values, together):  # noqa: F811
    def behind(chosen):
        out = comfy(node, model=chosen, **values)
        return out[0] if isinstance(out, tuple) else out

    settings = {"steps": 8, "seed": 2}
    one = behind(model)
    wanted = sample(latent, model=one, **settings)
    assert not together
    after = sample(latent, model=behind(shared), **settings)
    passes = len(together)
    before = sample(latent, model=comfy("LongCatMultiGPU", model=one, gpus="2"), **settings)
    close(after, wanted)
    close(before, wanted)
    assert 0 < passes == len(together) / 2
    if node == "LongCatStepCache":
        assert passes < 8
