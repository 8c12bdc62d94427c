"""LongCat Long Video and LongCat Refine Long Video: what single nodes give, resumed, and words for bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from . import cases
from .conftest import MODEL

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
    # ComfyUI's own decoder rounds otherwise on some CPUs, and the first latent of a clip is that of its first frame
    # alone, up to rounding.
    assert (images - frames).abs().max() <= (1 if hand_off == "frames" else 2) / 255 + 1e-6
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
    # Two steps, and what ends a segment, count.
    assert [(value, total) for value, total, _ in strips] == [(3, 6), (6, 6)]
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
    _, report = long(f"begun/{count}", "a red circle moves right on a blue background", begin_with=1 - frames[:count])
    assert "take-002, because" in report and "another given frames" in report


def test_a_clip_to_begin_with_is_taken_by_its_time(comfy, long, frames):
    prompt = "a red circle moves right on a blue background"
    one, _ = long("begun/30", prompt, begin_with=frames, begin_fps=30.0)
    two, _ = long("begun/15", prompt, begin_with=frames[::2])
    assert torch.equal(one, two)
    with pytest.raises(comfy.core("errors").LongCatError, match=r"begin_with lasts 0\.20 s at 60 fps, and 5"):
        long("begun/60", prompt, begin_with=frames[:12], begin_fps=60.0)


def test_another_model_or_lora_begins_a_take_of_its_own(comfy, model, long, made):
    plain, _ = long("models")
    patched = model.clone()
    name = "diffusion_model.final_layer.linear.weight"
    weight = model.model.state_dict()[name]
    patched.add_patches({name: (torch.full_like(weight, 0.01),)}, 1.0)
    other, report = long("models", model=patched)
    assert "a new take begins in" in report and "(another model)" in report and "in models/take-002" in report
    assert made == [3, 4, 3, 4] and not torch.equal(plain, other)
    # A patch stands by itself whether in force or not, and the weights are those that were loaded.
    assert torch.equal(long("models", model=patched)[0], other)
    assert torch.equal(long("models")[0], plain) and len(made) == 4


def test_settings_that_change_nothing_resume(comfy, model, long, made):
    """All switches whose results are equal, and nodes that only make it faster."""
    images, _ = long("switches")
    exact = [{"fused_qkv": False, "fused_ffn": False}, {"split_guidance": True}, {"compile": "blocks"}]
    exact += [{"reuse_text": False, "reuse_modulation": False, "fused_step": False}, {"text_mode": "padded"}]
    for changes in exact:
        again, report = long("switches", model=comfy("LongCatOptimizations", model=model, **changes)[0])
        assert torch.equal(again, images) and report.count("already in switches;") == 1, changes
    assert made == [3, 4] and [path.name for path in (output(comfy) / "switches").glob("take-*")] == []


def test_a_lossy_setting_is_said_and_begins_a_take_or_goes_on(comfy, model, long, made):
    images, _ = long("lossy")
    cached = comfy("LongCatStepCache", model=model, threshold=0.05)
    _, report = long("lossy", model=cached)
    assert "step cache none there, 0.05 now" in report and "take-002" in report and made == [3, 4, 3, 4]
    _, report = long("lossy", model=cached, lossy_change="go on", prompts=PROMPTS + "\nand then it stands still")
    assert len(made) == 5 and "take-002" in report
    _, report = long("lossy", model=comfy("LongCatStepCache", model=model, threshold=0.03), lossy_change="go on")
    assert len(made) == 5 and "goes on with other lossy settings" in report
    assert torch.equal(long("lossy")[0], images) and len(made) == 5


def test_weights_stored_in_another_dtype_with_the_same_values_are_the_same(comfy, clip, vae):
    """The embedded weights are bf16: as fp32 they have the same values, and only the precision of the computation
    differs."""
    engine = comfy.node("engine").ComfyEngine
    of = lambda dtype: engine("LongCat", comfy("LongCatModelLoader", model_name=MODEL, weight_dtype=dtype),  # noqa: E731
                              clip, vae, [""])  # fmt: skip
    fp32, bf16, fp8 = of("fp32"), of("bf16"), of("fp8 rowwise")
    assert fp32.settings() == bf16.settings() and fp32.lossy() == {} and fp8.settings() != fp32.settings()
    slow = engine("LongCat", comfy("LongCatOptimizations", model=fp8.model, fp8=False)[0], clip, vae, [""])
    assert slow.lossy() == fp8.lossy() | {"fp8 products": "off"} and slow.settings() == fp8.settings()


def test_folders_of_earlier_versions_are_found_again(comfy, model, clip, vae, long, made):
    """As nodes wrote records before: fingerprints with dtypes, the repr of all switches, and no take.json."""
    images, _ = long("earlier")
    module = comfy.node("engine")
    old = {
        "model": module._hash(model, dtypes=True),
        "text encoder": module._hash(clip.patcher, dtypes=True),
        "vae": module._hash(vae.patcher, dtypes=True),
        "dtype": "float32",
        "optimizations": repr(comfy.core("optimize.switches").Optimizations(fused_qkv=False)),
        "block-sparse": None,
        "step cache": None,
        "wrappers": [],
        "injections": [],
    }
    folder, segments = output(comfy) / "earlier", comfy.core("generate.segments")
    for path in sorted(folder.glob("segment-*/segment.json")):
        record = json.loads(path.read_text())
        record["settings"] |= old
        content = {name: value for name, value in record.items() if name not in ("version", "checksum")}
        record["checksum"] = segments.checksum(json.dumps(content, sort_keys=True, ensure_ascii=True))
        path.write_text(json.dumps(record))
    (folder / "take.json").unlink(missing_ok=True)
    again, report = long("earlier")
    assert torch.equal(again, images) and len(made) == 2 and report.count("already in earlier") == 2, report


def test_distilled_without_its_lora_and_with_guidance_says_so(long, comfy, model, caplog):
    _, report = long("distilled", mode="distilled", guidance=4.0)
    assert "made for guidance 1, not 4" in report and "needs the cfg_step LoRA" in report
    patched = model.clone()
    name = "diffusion_model.final_layer.linear.weight"
    patched.add_patches({name: (torch.zeros_like(model.model.state_dict()[name]),)}, 1.0)
    assert not comfy.node("models").distilled_notes(patched, "distilled", 1.0)
    assert not comfy.node("models").distilled_notes(model, "base", 4.0)


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
    with pytest.raises(comfy.core("errors").LongCatError, match=r"Long Video takes a step cache, .* from the MODEL"):
        engine.denoise(torch.zeros(1, 16, 1, 8, 12), schedule, "", step_cache=0.1)
