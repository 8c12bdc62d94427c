"""LongCat Calibrate: it finds what the headless search finds, writes one file, and leaves the MODEL as it was."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from .golden_avatar import Avatar

STEPS = 3
SETTINGS = {"seed": 5, "steps": STEPS, "guidance": 4.0, "mode": "base", "budget": 0.2, "dense_steps": 0.3}


@pytest.fixture
def large():
    """Of 1,088 tokens."""
    return {"samples": torch.zeros(1, 16, 17, 16, 16)}


@pytest.fixture
def calibrate(comfy, model, prompts, large):
    def run(**inputs):
        given = {"model": model, "latent_image": large, **prompts, **SETTINGS} | inputs
        path, report = comfy("LongCatCalibrate", **given)
        return comfy.core("generate.calibration").read_calibration(path), Path(path), report

    return run


def headless(comfy, network, sample, frames=65, given=0, budget=0.2):
    """The same search on the headless network. sample: samples a video, given the sampler's callback."""
    core, probe = comfy.core("measure.calibrate"), comfy.core("measure.probe")

    class Subject:
        def __init__(self):
            self.network, self.device = network, torch.device("cpu")

        def probed(self, given):
            return probe.probing(network, given)

        def video(self, number, stepped):
            sample(lambda step: stepped(step.index, step.total))
            return np.empty(0)

    videos = core.Videos("base", STEPS, 4.0, frames, 128, 128, given, 5, 1)
    recipe = core.Recipe(budget, 0.3, video=False)
    progress = comfy.core("generate.progress").Progress(core.Search.parts(videos, recipe))
    return core.Search(videos, recipe, progress).run(Subject())


def agree(found, expected):
    assert found.model == expected.model and found.ends == expected.ends and found.settings == expected.settings
    for one, other in zip(found.curve, expected.curve, strict=True):
        assert one.median == pytest.approx(other.median, rel=0.02) and one.high == pytest.approx(other.high, rel=0.02)
    different = np.mean(np.array(found.densities) != np.array(expected.densities))
    # A head whose error lies at the budget may go either way.
    assert different < 0.1 and len({d for layers in found.densities for row in layers for d in row}) > 2


def test_finds_what_the_headless_search_finds(comfy, model, network, prompts, calibrate):
    sampling, schedules = comfy.core("sampling.sampler"), comfy.core("sampling.schedules")
    noise = comfy.core("sampling.conditioning").seeded_noise((1, 16, 17, 16, 16), 5)
    texts = [prompts[name][0][0] for name in ("positive", "negative")]
    masks = [(text != 0).any(-1) for text in texts]

    def sample(callback):
        sampling.sample(
            network, noise, schedules.make_schedule("base", STEPS), texts[0], masks[0],
            negative_context=texts[1], negative_mask=masks[1], callback=callback,
        )  # fmt: skip

    before = copy.deepcopy(model.model_options)
    found, path, report = calibrate()
    agree(found, headless(comfy, network, sample))
    assert model.model_options == before
    assert path == comfy.folder / "output" / "longcat" / "calibration.json"
    assert f"mean density {found.density:.3f}" in report and report.endswith(str(path))


def test_a_segment_of_an_avatar(comfy, calibrate, prompts):
    """A continuation: attentions with and without the reference frame, and three evaluations of a step."""
    avatar, sampling = Avatar(comfy, "v1_5"), comfy.core("sampling.avatar")
    # 1,088 tokens of noise behind the given frames.
    avatar.shape = (1, 16, 21, 16, 16)
    clean, shown = torch.randn(1, 16, 4, 16, 16), torch.randn(1, 16, 1, 16, 16)
    reference = sampling.ReferenceFrame(shown, comfy.core("model.kv_cache").Reference())
    windows = avatar.voices["one.segment0"].repeat(1, 4, 1, 1, 1)[:, :81]
    audio = sampling.Audio(windows, None, 3.0)
    given = {"model": avatar.model, "latent_image": avatar.latent(clean), **avatar.conds(audio, reference)}
    # Attention of the golden model is even, so that all heads keep a usual budget at the lowest density.
    found, path, _ = calibrate(**given, budget=0.03)
    sample = partial(avatar.expected, audio, clean, reference, steps=STEPS, guidance=4.0, seed=5)
    agree(found, headless(comfy, avatar.network, lambda callback: sample(callback=callback), 81, 13, 0.03))
    sparse = comfy("LongCatSparseAttention", model=avatar.model, density=1.0, calibration=str(path))
    assert sparse.model_options["transformer_options"]["longcat_sparse"].densities.values == found.densities
    with pytest.raises(comfy.core("errors").LongCatError, match="positive has no audio, which LongCat-Video-Avatar"):
        calibrate(**given | prompts)


def test_a_name_that_is_taken_gets_a_number(comfy, calibrate):
    first, second = (calibrate(file="mine.json", steps=2)[1] for _ in range(2))
    assert (first.name, second.name) == ("mine.json", "mine-2.json")
    assert sorted(file.name for file in (comfy.folder / "output").glob("mine*")) == ["mine-2.json", "mine.json"]


def test_given_frames_are_keys_that_stay_exact(calibrate, comfy, vae, frames):
    size = {"width": 128, "height": 128, "length": 69, "resolution": "custom"}
    given = comfy("LongCatImageToVideo", vae=vae, image=frames[:1], **size)
    found = {mode: calibrate(latent_image=given, kv_cache=mode)[0] for mode in ("exact", "off")}
    assert found["exact"].settings.given == 1
    for one, other in zip(*(each.curve for each in found.values()), strict=True):
        assert one.median == pytest.approx(other.median, rel=0.02)


def test_what_is_not_exact_is_refused(comfy, model, calibrate, empty, forwards):
    cached = comfy("LongCatStepCache", model=model, threshold=0.05)
    sparse = comfy("LongCatBlockSparseAttention", model=model, sparsity=0.5, cdf_threshold=0.0, chunk="4x4x4")
    for inputs, said in (
        ({"model": cached}, "a step cache, which leaves steps out"),
        ({"model": sparse}, "with block-sparse attention"),
        ({"latent_image": empty}, "too few for sparse attention"),
        ({"file": "../mine.json"}, "is not inside ComfyUI's output folder"),
    ):
        with pytest.raises(comfy.core("errors").LongCatError, match=said):
            calibrate(**inputs)
    assert not forwards
