"""Sampling with audio: three evaluations instead of two, and a reference frame that the result does not have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longcat_core.checkpoints.load import load_transformer
from longcat_core.errors import LongCatError
from longcat_core.files.safetensors_io import read_tensors
from longcat_core.model.config import ModelConfig
from longcat_core.model.kv_cache import KV_MODES, Reference
from longcat_core.optimize.optimized import OptimizedTransformer
from longcat_core.optimize.switches import Optimizations
from longcat_core.sampling import sampler
from longcat_core.sampling.avatar import (
    LEFT,
    RIGHT,
    Audio,
    ReferenceFrame,
    audio_windows,
    box_mask,
    class_tokens,
    fit_masks,
    with_background,
)
from longcat_core.sampling.sampler import Step, sample
from longcat_core.sampling.schedules import make_schedule

GOLDEN = Path(__file__).parents[1] / "data" / "golden-avatar" / "v1_5"
STEPS = 3


@pytest.fixture
def model() -> OptimizedTransformer:
    config = ModelConfig.from_json(GOLDEN / "config.json")
    return load_transformer(GOLDEN / "dit.safetensors", config=config, optimizations=Optimizations(attention="sdpa"))


@pytest.fixture(scope="module")
def data() -> dict[str, Tensor]:
    names = ("generate", "audio", "forward")
    return {k: tensor for name in names for k, tensor in read_tensors(GOLDEN / f"{name}.safetensors").items()}


def run(model: OptimizedTransformer, data: dict[str, Tensor], steps: int = STEPS, **options: object) -> Tensor:
    given = {
        "negative_context": data["neg.embeds"],
        "negative_mask": data["neg.mask"],
        "guidance_scale": 3.0,
        "audio": Audio(data["one.segment0"], None, 4.5),
    }
    noise = options.pop("noise", data["noise0"])
    return sample(model, noise, make_schedule("base", steps), data["pos.embeds"], data["pos.mask"], **given | options)


def of_two(data: dict[str, Tensor]) -> Audio:
    windows = torch.cat((data["one.segment0"], data["two.segment0"]))
    return Audio(windows, class_tokens(data["duo.masks"], 4, 6), 4.5)


def batches(model: OptimizedTransformer) -> list[int]:
    """The number of videos in each evaluation from now on."""
    seen: list[int] = []
    model.final_layer.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    return seen


def error(got: Tensor, wanted: Tensor) -> float:
    return ((got - wanted).abs().max() / wanted.std()).item()


def test_parts_of_guidance_together_or_one_after_the_other(model, data):
    seen = batches(model)
    together = run(model, data)
    assert seen == [3] * STEPS
    model.set_optimizations(replace(model.optimizations, split_guidance=True))
    assert error(run(model, data), together) < 1e-5
    assert seen[STEPS:] == [1, 1, 1] * STEPS


def test_several_people_are_one_evaluation_at_a_time(model, data):
    seen = batches(model)
    run(model, data, audio=of_two(data), cond_latents=data["image.latent"], kv_cache="off")
    assert seen == [1, 1, 1] * STEPS


def test_masks_need_a_first_frame(model, data):
    with pytest.raises(LongCatError, match="none is given; give an image"):
        run(model, data, audio=of_two(data))


@pytest.mark.parametrize("people", [1, 2])
def test_without_guidance_only_the_prompt_is_evaluated(model, data, people):
    audio = replace(of_two(data) if people == 2 else Audio(data["one.segment0"]), guidance_scale=1.0)
    seen = batches(model)
    options = {"cond_latents": data["image.latent"], "kv_cache": "off"}
    run(model, data, audio=audio, guidance_scale=1.0, negative_context=None, negative_mask=None, **options)
    assert seen == [1] * STEPS


def test_outputs_without_a_weight_are_not_evaluated(model, data, monkeypatch):
    """Scales -> which of silence, negative text and prompt run; the result is that of all three."""
    seen, audio = batches(model), Audio(data["one.segment0"])
    scales = {(2.0, 1.0): 2, (1.0, 2.0): 3, (3.0, 3.0): 2, (0.0, 2.0): 3}

    def runs() -> list[Tensor]:
        return [run(model, data, audio=replace(audio, guidance_scale=a), guidance_scale=t) for t, a in scales]

    found = runs()
    assert seen == [count for count in scales.values() for _ in range(STEPS)]
    monkeypatch.setattr(sampler, "audio_parts", lambda *scales: ((True, True), scales))
    for one, other in zip(found, runs(), strict=True):
        assert error(one, other) < 1e-5
    with pytest.raises(LongCatError, match="needs a negative prompt"):
        run(model, data, negative_context=None, negative_mask=None, guidance_scale=1.0)


@pytest.mark.parametrize("split", [False, True])
def test_guidance_that_ends_and_a_step_cache(model, data, split):
    """A threshold that skips nothing changes nothing, also where the parts are cut at the end of guidance."""
    model.set_optimizations(replace(model.optimizations, split_guidance=split))
    seen = batches(model)
    plain = run(model, data, 6, guidance_until=0.5)
    assert seen == ([1, 1, 1] if split else [3]) * 3 + [1] * 3
    shares: list[float] = []
    cached = run(
        model, data, 6, guidance_until=0.5, step_cache=1e-9,
        callback=lambda step: shares.append(step.computed),
    )  # fmt: skip
    assert error(cached, plain) < 1e-5
    assert shares == pytest.approx([1.0] * 3 + [1 / 3] * 3)
    assert error(run(model, data, 12, step_cache=0.5), run(model, data, 12)) > 1e-6


@pytest.mark.parametrize("cache", KV_MODES)
def test_the_reference_frame_stays_inside(model, data, cache):
    reference = ReferenceFrame(data["image.latent"], Reference(4, 1))
    tail, steps = data["at2v.tail.latents"], []
    seen = batches(model)

    def keep(step: Step) -> None:
        steps.append((step.latents.shape, step.denoised.shape))

    out = run(model, data, noise=data["noise1"], cond_latents=tail, reference=reference, kv_cache=cache, callback=keep)
    assert out.shape == data["noise1"].shape and steps == [(out.shape, out.shape)] * STEPS
    assert torch.equal(out[:, :, : tail.shape[2]], tail)
    assert seen == ([1] if cache != "off" else []) + [3] * STEPS
    options = {"noise": data["noise1"], "cond_latents": tail, "kv_cache": cache}
    other = run(model, data, **options, reference=replace(reference, latents=data["noise0"][:, :, :1]))
    assert error(other, out) > 1e-3
    uncached = run(model, data, **options | {"kv_cache": "off"}, reference=reference)
    assert error(out, uncached) < 1e-5


def test_windows_repeat_the_ends():
    embeddings = torch.arange(10.0)[:, None, None]
    windows = audio_windows(embeddings, 4, 4, 2)[0, :, :, 0, 0]
    assert windows.tolist() == [[2, 3, 4, 5, 6], [4, 5, 6, 7, 8], [6, 7, 8, 9, 9], [8, 9, 9, 9, 9]]
    assert audio_windows(embeddings, 0, 1, 1)[0, 0, :, 0, 0].tolist() == [0, 0, 0, 1, 2]
    with pytest.raises(LongCatError, match="no embeddings"):
        audio_windows(embeddings[:0], 0, 1, 1)


@pytest.mark.parametrize("size", [(75, 110), (110, 75), (1, 50), (480, 832), (7, 7)])
def test_masks_cover_the_video(size):
    fitted = fit_masks(torch.ones(3, *size), 64, 96)
    assert fitted.shape == (3, 64, 96) and fitted.min() > 0.999
    assert class_tokens(fitted, 4, 6).shape == (24, 3)


def test_a_mask_without_a_token_is_named():
    masks = torch.zeros(3, 64, 96)
    masks[0, :8], masks[2, 20:] = 1, 1
    with pytest.raises(LongCatError, match="mask of person 2 covers no token"):
        class_tokens(masks, 4, 6)


def test_boxes_and_the_background():
    """The public demo's default boxes, and masks in its order."""
    left, right = (box_mask(box, 70, 110) for box in (LEFT, RIGHT))
    for mask, columns in ((left, (5, 49)), (right, (60, 104))):
        expected = torch.zeros(70, 110)
        expected[7:63, slice(*columns)] = 1
        assert torch.equal(mask, expected)
    third = box_mask((0.0, 0.0, 0.5, 1.0), 70, 110)
    masks = with_background([left, right, third])
    assert torch.equal(masks[2], 1 - left - right) and torch.equal(masks[3], third)
    for box in ((0.5, 0.0, 0.5, 1.0), (0.0, 0.0, 1.1, 1.0), (0.0, 0.9, 1.0, 0.2)):
        with pytest.raises(LongCatError, match="the box of Ann reaches from"):
            box_mask(box, 70, 110, "the box of Ann")
