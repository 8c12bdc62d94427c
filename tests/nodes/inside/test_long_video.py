"""LongCat Long Video and LongCat Refine Long Video: what single nodes give, resumed, and words for bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from . import cases

SIZE = {"width": cases.WIDTH, "height": cases.HEIGHT, "length": 9, "overlap": 5}
SAMPLING = {"seed": 3, "steps": 2, "guidance": 4.0, "mode": "base", "negative_prompt": ""}
PROMPTS = "a red circle moves right on a blue background\na red circle moves up on a blue background"


@pytest.fixture
def long(comfy, model, clip, vae):
    """Runs the node on the embedded model."""

    def run(folder: str, prompts: str = PROMPTS, **changes):
        inputs = {"model": model, "clip": clip, "vae": vae, "segments": 0, "folder": folder, **SIZE, **SAMPLING}
        images, report, _ = comfy("LongCatLongVideo", prompts=prompts, **inputs | changes)
        # Read at once: tests change the files that the frames lie in.
        return images.clone(), report

    return run


@pytest.fixture
def refine(comfy, model, clip, vae):
    def run(folder: str, video: torch.Tensor, **changes):
        inputs = {"model": model, "clip": clip, "vae": vae, "folder": folder, "resolution": "custom"}
        inputs |= {"width": cases.WIDTH, "height": cases.HEIGHT, "steps": 12, "piece": 5, "overlap": 1, "seed": 4}
        images, fps, _ = comfy("LongCatRefineLongVideo", video=video, **inputs | changes)
        return images.clone(), fps

    return run


@pytest.fixture
def made(comfy, monkeypatch):
    """Seeds of the segments that are really generated."""
    engine = comfy.node("engine").ComfyEngine
    seeds, generate = [], engine.generate
    monkeypatch.setattr(engine, "generate", lambda self, request, *args: (
        seeds.append(request.seed), generate(self, request, *args))[1])  # fmt: skip
    return seeds


def output(comfy) -> Path:
    import folder_paths

    return Path(folder_paths.get_output_directory())


@pytest.mark.parametrize("hand_off", ["frames", "latents"])
def test_equals_sampler_and_continuation_one_after_the_other(comfy, model, clip, vae, long, hand_off):
    images, report = long(f"equal/{hand_off}", hand_off=hand_off)
    encode = lambda text: comfy("CLIPTextEncode", clip=clip, text=text)  # noqa: E731
    conditioning = [{"positive": encode(line), "negative": encode("")} for line in PROMPTS.splitlines()]

    def sample(latent, seed, line):
        inputs = {"seed": seed, "guidance": 4.0, "steps": 2, "mode": "base", **conditioning[line]}
        return comfy("LongCatSampler", model=model, latent_image=latent, **inputs)["samples"]

    latent = comfy("EmptyHunyuanLatentVideo", width=cases.WIDTH, height=cases.HEIGHT, length=9, batch_size=1)
    first = sample(latent, 3, 0)
    frames = rounded(comfy("VAEDecode", samples={"samples": first}, vae=vae))
    size = {"resolution": "custom", "width": cases.WIDTH, "height": cases.HEIGHT, "length": 9}
    latent = comfy("LongCatVideoContinuation", vae=vae, video=frames, cond_frames=5, **size)
    if hand_off == "latents":
        latent["samples"] = torch.cat((latent["samples"][:, :, :1], first[:, :, -1:], latent["samples"][:, :, 2:]), 2)
    second = sample(latent, 4, 1)
    frames = torch.cat((frames, rounded(comfy("VAEDecode", samples={"samples": second}, vae=vae))[5:]))
    assert images.shape == frames.shape == (13, cases.HEIGHT, cases.WIDTH, 3)
    # The first latent of a clip is that of its first frame alone, up to rounding.
    assert (images - frames).abs().max() <= (0 if hand_off == "frames" else 2 / 255)
    assert report.count("\n") == 1 and "at its join the mean color changes by" in report


def rounded(images: torch.Tensor) -> torch.Tensor:
    images = images[0] if images.ndim == 5 else images
    return images.mul(255).round().clamp(0, 255).div(255)


def test_goes_on_from_what_is_there(comfy, long, made):
    three = PROMPTS + "\na red circle moves left on a blue background"
    whole, _ = long("resumed", three)
    assert made == [3, 4, 5]
    folder = output(comfy) / "resumed"
    (folder / "segment-002" / "frames.mkv").write_bytes(b"damaged")
    again, report = long("resumed", three)
    assert made[3:] == [4] and torch.equal(again, whole)
    assert [("already" in line) for line in report.splitlines()] == [True, False, True]
    other, _ = long("resumed", PROMPTS + "\na red circle pulses on a blue background")
    assert made[4:] == [5] and torch.equal(other[:13], whole[:13]) and not torch.equal(other[13:], whole[13:])


def test_progress_and_pictures_of_segments(comfy, long, monkeypatch):
    from comfy import utils

    seen = []
    monkeypatch.setattr(
        utils, "PROGRESS_BAR_HOOK", lambda value, total, preview, **_: seen.append((value, total, preview))
    )
    long("pictures")
    strips = [(value, total, preview[1].size) for value, total, preview in seen if preview and preview[1].width == 1280]
    assert [(value, total) for value, total, _ in strips] == [(1, 2), (2, 2)]
    height = round(1280 * cases.HEIGHT / (5 * cases.WIDTH))
    assert [size for *_, size in strips] == [(1280, height), (1280, 2 * height)]


@pytest.mark.parametrize("count", [1, 9])
def test_begun_with_an_image_or_a_clip(comfy, vae, long, frames, count):
    images, _ = long(f"begun/{count}", "a red circle moves right on a blue background", begin_with=frames[:count])
    fitted = comfy.core("files.media").resize_and_crop
    given = [
        fitted(frame.mul(255).byte().numpy(), cases.HEIGHT, cases.WIDTH) for frame in frames[max(0, count - 5) : count]
    ]
    given = torch.from_numpy(np.stack(given[-1:] if count == 1 else given)) / 255
    assert len(images) == 9
    # Given frames are there again as the VAE sees them.
    assert (images[: len(given)] - given).abs().mean() < 0.03
    with pytest.raises(comfy.core("errors").LongCatError, match=r"given frames .* there, .* now"):
        long(f"begun/{count}", "a red circle moves right on a blue background", begin_with=1 - frames[:count])


def test_a_clip_to_begin_with_is_taken_by_its_time(comfy, long, frames):
    prompt = "a red circle moves right on a blue background"
    one, _ = long("begun/30", prompt, begin_with=frames, begin_fps=30.0)
    two, _ = long("begun/15", prompt, begin_with=frames[::2])
    assert torch.equal(one, two)
    with pytest.raises(comfy.core("errors").LongCatError, match=r"begin_with lasts 0\.20 s at 60 fps, and 5"):
        long("begun/60", prompt, begin_with=frames[:12], begin_fps=60.0)


def test_another_model_or_lora_wants_another_folder(comfy, model, long):
    long("models")
    patched = model.clone()
    name = "diffusion_model.final_layer.linear.weight"
    weight = model.model.state_dict()[name]
    patched.add_patches({name: (torch.full_like(weight, 0.01),)}, 1.0)
    error = comfy.core("errors").LongCatError
    with pytest.raises(error, match=r"other settings \(model .* there, .* now\)"):
        long("models", model=patched)
    other, _ = long("models-patched", model=patched)
    # In force or not, a patch is told by itself and the weights by what was loaded.
    assert torch.equal(long("models-patched", model=patched)[0], other)
    long("models")
    with pytest.raises(error, match=r"optimizations"):
        long("models", model=comfy("LongCatOptimizations", model=model, fused_qkv=False)[0])


def test_the_noise_levels_of_another_sampling_change_nothing(comfy, model, long, made):
    """What ModelSamplingSD3 puts into the model stays there until somebody samples without it."""
    from comfy.model_management import load_models_gpu

    images, _ = long("levels")
    load_models_gpu([comfy("ModelSamplingSD3", model=model, shift=3.0)])
    assert model.model.model_sampling.shift == 3
    assert torch.equal(long("levels")[0], images) and len(made) == 2


def test_refining_equals_piece_by_piece(comfy, vae, frames, sample, refine, prompts):
    video = frames[:9]
    images, fps = refine("refined", video, prompt="a red circle moves right on a blue background")
    before, got = None, []
    size = {"resolution": "custom", "width": cases.WIDTH, "height": cases.HEIGHT}
    for number, start in enumerate((0, 4)):
        more = {} if before is None else {"refined_before": before, "overlap": 1}
        latent, skip, length, _ = comfy(
            "LongCatRefine", vae=vae, video=video[start : start + 5], double_rate=True, **size, **more
        )
        out = sample(latent, seed=4 + number, steps=12, guidance=1.0, mode="refine")
        decoded = rounded(comfy("VAEDecode", samples={"samples": out}, vae=vae))
        before = decoded[: skip + length]
        got.append(decoded[skip : skip + length])
    assert fps == 30 and images.shape == (18, cases.HEIGHT, cases.WIDTH, 3)
    difference = (images - torch.cat(got)).abs()
    assert difference.mean() < 1e-3, "the prompt is the one of `sample`"


def test_refining_goes_on(comfy, frames, refine, monkeypatch):
    module = comfy.core("generate.refine")
    made, piece = [], module.refine_piece
    monkeypatch.setattr(module, "refine_piece", lambda *args: made.append(args[4]) or piece(*args))
    video = frames[:9].clone()
    whole, _ = refine("refined-again", video)
    assert made == [0, 1]
    (output(comfy) / "refined-again" / "segment-001" / "latents.safetensors").unlink()
    assert torch.equal(refine("refined-again", video)[0], whole) and made == [0, 1, 0]
    video[8] = 0.5
    refine("refined-again", video)
    assert made == [0, 1, 0, 1]


def test_what_is_kept_is_for_other_programs_too(comfy, long):
    long("kept")
    record = json.loads((output(comfy) / "kept" / "segment-002" / "segment.json").read_text())
    assert record["settings"]["prompt"] == PROMPTS.splitlines()[1] and record["settings"]["seed"] == 4
    frames, fps = comfy.core("files.media").read_video(output(comfy) / "kept" / "segment-002" / "frames.mkv")
    assert frames.shape == (9, cases.HEIGHT, cases.WIDTH, 3) and frames.dtype == np.uint8 and fps == 15


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompts": " \n "}, "the prompt is empty"),
        ({"segments": 1}, "2 prompts are more than the 1 segments"),
        ({"overlap": 9}, "9 frames that share 9 leave nothing new"),
        ({"overlap": 6}, "overlap: 6 frames are not of the form 4k"),
        ({"width": 100}, "width 100"),
        ({"begin_with": torch.zeros(3, 64, 96, 3)}, r"begin_with lasts 0\.20 s at 15 fps, and 5 frames"),
        ({"folder": "../elsewhere"}, "inside ComfyUI's output folder"),
        ({"folder": "/tmp/elsewhere/../.."}, "inside ComfyUI's output folder"),
        ({"folder": "/elsewhere"}, "inside ComfyUI's output folder"),
        ({"folder": "~/elsewhere"}, "inside ComfyUI's output folder"),
        ({"folder": r"C:\elsewhere"}, "inside ComfyUI's output folder"),
        ({"folder": "x" * 300}, "inside ComfyUI's output folder"),
        ({"folder": "a\0b"}, "inside ComfyUI's output folder"),
        ({"folder": " "}, "inside ComfyUI's output folder"),
    ],
)
def test_bad_input(comfy, long, made, changes, said):
    before = sorted(output(comfy).rglob("*"))
    with pytest.raises(comfy.core("errors").LongCatError, match=said):
        long(**{"folder": "bad"} | changes)
    assert not made and sorted(output(comfy).rglob("*")) == before


def test_other_models_and_vaes_are_refused(comfy, long):
    with pytest.raises(comfy.core("errors").LongCatError, match="connect the Wan"):
        long("bad", vae=type("VAE", (), {"first_stage_model": object()})())


def test_the_engine_refuses_what_the_model_decides(comfy, model, clip, vae):
    engine = comfy.node("engine").ComfyEngine("LongCat Long Video", model, clip, vae, [""])
    schedule = comfy.core("sampling.schedules").make_schedule("base", 2)
    with pytest.raises(comfy.core("errors").LongCatError, match=r"LongCat Long Video takes a step cache .* the MODEL"):
        engine.denoise(torch.zeros(1, 16, 1, 8, 12), schedule, "", step_cache=0.1)
