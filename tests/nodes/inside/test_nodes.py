"""The pack's nodes as a person meets them: progress, previews, interrupt, switches, sizes, and words for bad input."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ...nodes.checkout import PACK
from . import cases
from .conftest import ON_CPU

IDS = (
    "LongCatModelLoader",
    "LongCatTextEncoderLoader",
    "LongCatOptimizations",
    "LongCatSampler",
    "LongCatScheduler",
    "LongCatGuider",
    "LongCatEmptyLatent",
    "LongCatSampleClip",
    "LongCatSampleSpeech",
    "LongCatVAEDecode",
    "LongCatImageToVideo",
    "LongCatVideoContinuation",
    "LongCatRefine",
    "LongCatLongVideo",
    "LongCatRefineLongVideo",
    "LongCatBlockSparseAttention",
    "LongCatSparseAttention",
    "LongCatMultiGPU",
    "LongCatMultiGPUTest",
    "LongCatStepCache",
    "LongCatBenchmark",
    "LongCatFidelity",
    "LongCatCalibrate",
)
SIZE = {"resolution": "custom", "width": cases.WIDTH, "height": cases.HEIGHT, "length": cases.FRAMES}


# --- schemas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("node", IDS)
def test_every_node_explains_itself(comfy, node):
    schema = comfy.mappings[node].define_schema()
    assert schema.category.startswith("LongCat/") and "LongCat " in schema.display_name and schema.description
    for field in schema.inputs:
        assert field.tooltip, f"{node}.{field.id} has no tooltip"
        if hasattr(field, "min"):
            assert field.min <= field.default <= field.max
        if getattr(field, "step", None) and isinstance(field.default, float):
            shown = round(field.default, max(0, -math.floor(math.log10(field.step))))
            assert shown == field.default, f"ComfyUI's page shows {shown} for {node}.{field.id}"
    page = PACK / "web" / "docs" / f"{node}.md"
    text = page.read_text(encoding="utf-8")
    for field in schema.inputs:
        assert f"`{field.id}`" in text, f"{page.name} says nothing of {field.id}"


def test_one_input_for_each_optimization(comfy):
    config = comfy.core("optimize.switches")
    fields = comfy.mappings["LongCatOptimizations"].define_schema().inputs[1:]
    assert [field.id for field in fields] == list(config.Optimizations.__dataclass_fields__)
    attention = next(field for field in fields if field.id == "attention")
    assert attention.options == ["auto", "sdpa", "sdpa-math"], "what a machine without GPU has"


# --- sampling --------------------------------------------------------------------------------------------------------


@pytest.fixture
def progress():
    """(value, total, preview picture) of every progress message."""
    from comfy import utils

    messages = []
    previous = utils.PROGRESS_BAR_HOOK
    utils.set_progress_bar_global_hook(lambda value, total, preview, **kwargs: messages.append((value, total, preview)))
    yield messages
    utils.set_progress_bar_global_hook(previous)


@pytest.fixture
def previews(monkeypatch):
    from comfy.cli_args import LatentPreviewMethod, args

    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Latent2RGB)


def test_progress_and_a_moving_preview(model, sample, image_latent, progress, previews, monkeypatch):
    import latent_preview

    shown = []
    decode = latent_preview.Latent2RGBPreviewer.decode_latent_to_preview
    monkeypatch.setattr(
        latent_preview.Latent2RGBPreviewer,
        "decode_latent_to_preview",
        lambda self, x0: shown.append(x0.clone()) or decode(self, x0),
    )
    sample(image_latent, steps=4)
    assert [message[:2] for message in progress] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert all(preview is not None and preview[1].size == (12, 8) for _, _, preview in progress)
    assert all(x0.shape[2] == 1 for x0 in shown)
    given = model.model.process_latent_in(image_latent["samples"])[:, :, :1]
    assert all((x0 - given).abs().max() > 0.1 for x0 in shown), "never the given image"


class Stages:
    """In place of a previewer: shows the number that a latent frame is filled with."""

    def decode_latent_to_preview_image(self, form, x0):
        assert x0.shape[2] == 1
        return form, int(x0[0, 0, 0, 0, 0]), None


def test_the_preview_plays_through_the_generated_frames(comfy, monkeypatch):
    def film(given, form="LongCatLatents"):
        form = getattr(comfy.node("comfy_latents"), form)()
        return comfy.node("previews").Film(Stages(), form, given, comfy.node("progress").NodeProgress())

    # As if each step took long enough to decode all frames.
    monkeypatch.setattr(comfy.node("previews"), "SHARE", 1e9)
    monkeypatch.setattr(comfy.node("previews"), "LONGEST", 1e9)
    x0 = torch.arange(5.0).view(1, 1, 5, 1, 1).expand(1, 16, 5, 2, 2)
    clip, cut = film(2), film(2)
    assert [clip.expose(x0)[1] for _ in range(7)] == [2, 3, 4, 2, 3, 4, 2]
    # Stock nodes that cut a latent leave the mask as it is.
    assert [cut.expose(x0[:, :, :2])[1] for _ in range(2)] == [1, 1]
    nano = film(0, "NanoLatents")
    assert [nano.expose(x0)[1] for _ in range(5)] == [1, 2, 3, 4, 1]
    # At most 16 frames play, spread over the video; the step's time decides how many it decodes.
    long = film(4)
    long.expose(torch.arange(100.0).view(1, 1, 100, 1, 1).expand(1, 16, 100, 2, 2))
    assert list(long.pictures) == list(range(4, 100, 6))
    monkeypatch.setattr(comfy.node("previews"), "SHARE", -1)
    slow = film(0)
    assert [len(slow.pictures) for _ in range(3) if slow.expose(x0)] == [1, 2, 3]


def test_stock_samplers_play_the_generated_frames_too(comfy):
    frames = torch.arange(5.0).view(1, 1, 5, 1, 1).expand(1, 16, 5, 2, 2)
    for name, given, expected in (
        ("LongCatLatents", 0, [0, 1, 2, 3, 4, 0]),
        ("NanoLatents", 0, [1, 2, 3, 4, 1, 2]),
        ("NanoLatents", 3, [3, 4, 3, 4, 3, 4]),
        ("LongCatLatents", 9, [4] * 6),
    ):
        form = getattr(comfy.node("comfy_latents"), name)()
        form.given, pick = given, form.latent_rgb_factors_reshape
        assert [int(pick(frames)[0, 0, 0, 0, 0]) for _ in range(6)] == expected


def test_stock_samplers_leave_out_the_given_image(comfy, model, prompts, image_latent, progress, previews, monkeypatch):
    from comfy import model_management

    # Otherwise ComfyUI reads a preview before it has been copied from the GPU.
    monkeypatch.setattr(model_management, "device_supports_non_blocking", lambda device: False)
    settings = {"seed": 1, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    latents = comfy("KSampler", model=model, latent_image=image_latent, **prompts, **settings)["samples"]
    import latent_preview

    form = model.model.latent_format
    assert form.given == 1
    factors = torch.tensor(form.latent_rgb_factors).T, torch.tensor(form.latent_rgb_factors_bias)
    x0 = model.model.process_latent_in(latents)
    # The second of two steps shows the second generated frame.
    expected = latent_preview.preview_to_image(torch.nn.functional.linear(x0[0, :, 2].movedim(0, -1), *factors))
    shown, wanted = (np.asarray(picture).astype(int) for picture in (progress[-1][2][1], expected))
    assert shown.shape == wanted.shape and wanted.std() > 10
    # Where a GPU multiplies, a level may fall the other way.
    assert np.abs(shown - wanted).max() <= (0 if ON_CPU else 1)


@torch.inference_mode()
def test_previews_of_nano_have_the_colors_of_its_videos(comfy, model, vae, monkeypatch):
    import latent_preview
    from comfy.cli_args import LatentPreviewMethod, args

    form = model.model.latent_format
    wan = comfy.node("comfy_latents").LongCatLatents()
    assert form.taesd_decoder_name is None and wan.taesd_decoder_name
    clip = np.stack([*cases.clip(17, cases.HEIGHT, cases.WIDTH)])
    latents = vae.encode(torch.from_numpy(clip).float() / 255)
    decoded = vae.decode(latents).reshape(17, cases.HEIGHT, cases.WIDTH, 3)
    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Auto)
    x0 = model.model.process_latent_in(latents)

    def error(form, frame):
        previewer = latent_preview.get_previewer(model.load_device, form)
        picture = previewer.decode_latent_to_preview_image("JPEG", x0[:, :, frame : frame + 1])[1]
        mean = 255 * decoded[4 * frame - 3 : 4 * frame + 1].mean(0)
        colors = mean.unflatten(0, (-1, 8)).unflatten(2, (-1, 8)).mean((1, 3))
        return (torch.from_numpy(np.asarray(picture)).float() - colors).square().mean().sqrt()

    for frame in range(1, 5):
        assert error(form, frame) < 2 * comfy.core("nano.colors").ERROR < error(wan, frame) / 2


def test_words_of_work_without_steps(comfy, monkeypatch):
    """As ComfyUI runs it: with a node's id and a server."""
    import sys
    from types import SimpleNamespace

    from comfy_execution.utils import CurrentNodeContext

    said = []
    server = SimpleNamespace(client_id="page", send_progress_text=lambda *message: said.append(message))
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=server)))
    progress = comfy.node("progress")
    with CurrentNodeContext("prompt", "7"):
        with progress.working("encoding"):
            pass
        assert not said, "nobody could read it"
        monkeypatch.setattr(progress, "QUICK", 0)
        with progress.working("encoding"):
            while not said:
                pass
        assert said[0] == ("encoding", "7", "page") and said[1][0].startswith("encoding took ")
        with pytest.raises(ValueError, match="mistake"), progress.NodeProgress([]) as shown:
            shown.task.phase("decoding")
            raise ValueError("mistake")
        assert said[2:] == [("decoding", "7", "page"), ("stopped at decoding", "7", "page")]


def test_interrupt_stops_and_the_next_run_works(sample, empty, progress, previews):
    from comfy import model_management, utils

    expected = sample(empty, steps=3)
    steps = []

    def hook(value, total, preview, **kwargs):
        steps.append(value)
        if value == 2:
            model_management.interrupt_current_processing(True)
        model_management.throw_exception_if_processing_interrupted()

    utils.set_progress_bar_global_hook(hook)
    with pytest.raises(model_management.InterruptProcessingException):
        sample(empty, steps=6)
    assert steps == [1, 2]
    utils.set_progress_bar_global_hook(None)
    assert torch.equal(sample(empty, steps=3), expected)


def test_interrupt_within_a_step(comfy, model, sample, empty, monkeypatch):
    """Not only between steps: every layer asks."""
    from comfy import model_management

    block = model.model.diffusion_model.blocks[1]
    hook = block.register_forward_pre_hook(lambda *args: model_management.interrupt_current_processing(True))
    try:
        with pytest.raises(model_management.InterruptProcessingException):
            sample(empty)
    finally:
        hook.remove()
        model_management.interrupt_current_processing(False)


def test_given_frames_are_computed_once(comfy, model, sample, clip_latent, forwards):
    sample(clip_latent, steps=3)
    shapes = [shape[2] for shape in forwards]
    assert shapes == [4, 5, 5, 5], "4 given latent frames once, then the other 5 at every step"
    forwards.clear()
    sample(clip_latent, steps=3, kv_cache="off")
    assert [shape[2] for shape in forwards] == [9, 9, 9]


def test_the_cache_does_not_outlive_the_sampling(comfy, model, sample, clip_latent):
    key = comfy.node("comfy_caches").CONDITIONING_CACHE_KEY
    sample(clip_latent)
    assert key not in model.model_options["transformer_options"]


def test_prompts_of_different_length_run_in_one_batch(comfy, model, clip, sample, empty, forwards, prompts):
    long = comfy("CLIPTextEncode", clip=clip, text=" and ".join([cases.PROMPT] * 4))
    arguments = {"model": model, "latent_image": empty, "seed": 1, "steps": 1, "guidance": 4.0, "mode": "base"}
    both = comfy("LongCatSampler", positive=long, negative=prompts["negative"], **arguments)["samples"]
    assert [shape[0] for shape in forwards] == [2]
    alone = {
        name: comfy("LongCatSampler", positive=text, negative=text, **arguments | {"guidance": 1.0})["samples"]
        for name, text in (("positive", long), ("negative", prompts["negative"]))
    }
    guidance = comfy.core("sampling.guidance")
    process = model.model.process_latent_in
    noise = comfy.core("sampling.conditioning").seeded_noise(tuple(both.shape), 1)
    # One step from sigma 1 to 0: the result is noise - velocity.
    velocity = guidance.cfg_zero(noise - process(alone["positive"]), noise - process(alone["negative"]), 4.0)
    assert (process(both) - (noise - velocity)).abs().max() <= 1e-4


def test_training_after_sampling(comfy, model, sample, prompts, image_latent, empty):
    """The stock training node; nothing that sampling keeps is unfit for gradients."""
    sample(empty, steps=1)
    fields = comfy.mappings["TrainLoraNode"].define_schema().inputs
    settings = {field.id: [field.default] for field in fields if getattr(field, "default", None) is not None}
    settings |= {"training_dtype": ["fp32"], "lora_dtype": ["fp32"], "steps": [2], "learning_rate": [0.01]}
    latent = {**image_latent, "samples": sample(image_latent, steps=1)}
    out = comfy("TrainLoraNode", model=[model], latents=[latent], positive=[prompts["positive"]], **settings)
    lora, losses = out[-3:-1]  # ComfyUI 0.8 gives a model before them
    assert len(losses["loss"]) == 2 and lora
    patched = {name: tensor for name, tensor in lora.items() if "attn.qkv" in name}
    assert patched and any(tensor.float().abs().sum() > 0 for tensor in patched.values())


# --- switches --------------------------------------------------------------------------------------------------------

SWITCHES = {
    "fused_qkv": True,
    "fused_ffn": True,
    "text_mode": "exact",
    "attention": "auto",
    "compile": "off",
    "explicit_fp32": True,
    "gradient_checkpointing": False,
}
ADDED = ("reuse_text", "reuse_modulation", "fused_step", "fp8", "fused_kernels")


@pytest.mark.parametrize(
    "switch, value",
    [
        ("fused_qkv", False),
        ("fused_ffn", False),
        ("text_mode", "padded"),
        ("attention", "sdpa-math"),
        ("explicit_fp32", False),
        ("gradient_checkpointing", True),
        ("split_guidance", True),
        ("fused_text", False),
        *((name, False) for name in ADDED),
    ],
)
def test_exact_switches_change_nothing(comfy, model, sample, empty, switch, value):
    switched, report = comfy("LongCatOptimizations", model=model, **SWITCHES | {switch: value})
    shown = {True: "on", False: "off"}.get(value, value)
    assert f"{switch}: {shown}" in report
    plain = sample(empty, steps=2)
    assert (plain - sample(empty, switched, steps=2)).abs().max() <= 1e-4 * plain.std()


def test_switches_reach_the_network(comfy, model, sample, empty, monkeypatch):
    ops = comfy.core("optimize.fused").TorchOps
    fused = []
    project = ops.project

    def seen(self, *args):
        fused.append(self.switches.fused_qkv)
        return project(self, *args)

    monkeypatch.setattr(ops, "project", seen)
    switched, _ = comfy("LongCatOptimizations", model=model, **SWITCHES | {"fused_qkv": False})
    sample(empty, switched, steps=1)
    assert fused and not any(fused)
    fused.clear()
    sample(empty, steps=1)
    assert fused and all(fused), "the model that went in is as it was"


@pytest.mark.parametrize("stock", [False, True])
def test_halves_of_guidance_in_turn(comfy, model, sample, prompts, empty, stock):
    """Under every sampler; and switched off again it is off."""
    sizes = []
    network = model.model.diffusion_model
    split, _ = comfy("LongCatOptimizations", model=model, **SWITCHES | {"split_guidance": True})
    again, _ = comfy("LongCatOptimizations", model=split, **SWITCHES)
    hook = network.final_layer.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    try:
        for patched, wanted in ((split, [1, 1]), (again, [2])):
            sizes.clear()
            if stock:
                settings = {"seed": 0, "steps": 1, "cfg": 4.0, "sampler_name": "euler", "scheduler": "simple"}
                comfy("KSampler", model=patched, latent_image=empty, denoise=1.0, **settings, **prompts)
            else:
                sample(empty, patched, steps=1)
            assert sizes == wanted
    finally:
        hook.remove()


def test_text_is_read_once_under_the_guider(comfy, model, sample, prompts, empty, monkeypatch):
    """Keys of the text: once for all steps of a sampling, then forgotten; stock samplers compute them at each."""
    key = comfy.node("comfy_caches").TEXT_CACHE_KEY
    calls = []
    layer = model.model.diffusion_model.blocks[0].cross_attn
    keys_values = layer.keys_values
    monkeypatch.setattr(layer, "keys_values", lambda *args: calls.append(1) or keys_values(*args))
    out = sample(empty, steps=3, guidance=4.0)
    assert len(calls) == 1 and key not in model.model_options["transformer_options"]
    sample(empty, steps=3, guidance=4.0)
    assert len(calls) == 2, "another sampling may have other weights"
    switched, _ = comfy("LongCatOptimizations", model=model, **SWITCHES | {"reuse_text": False})
    calls.clear()
    assert (out - sample(empty, switched, steps=3, guidance=4.0)).abs().max() <= 1e-4 * out.std()
    assert len(calls) == 3
    calls.clear()
    settings = {"seed": 1, "steps": 3, "cfg": 4.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    comfy("KSampler", model=model, latent_image=empty, **settings, **prompts)
    assert len(calls) == 3


def test_timesteps_are_worked_up_once(comfy, model, sample, empty, image_latent, monkeypatch):
    rows = []
    network = model.model.diffusion_model
    embed = network.embed_time
    monkeypatch.setattr(network, "embed_time", lambda *args: rows.append(embed(*args).shape[:2]) or embed(*args))
    sample(empty, steps=1, guidance=4.0)
    sample(image_latent, steps=1, guidance=4.0, kv_cache="off")
    assert rows == [(1, 1), (1, 9)], "one for both halves of guidance"


def test_packed_text_changes_the_result(comfy, model, sample, empty):
    switched, _ = comfy("LongCatOptimizations", model=model, **SWITCHES | {"text_mode": "packed"})
    assert not torch.allclose(sample(empty), sample(empty, switched), atol=1e-2)


def test_compiled_blocks_side_by_side_with_plain_ones(comfy, one_block, sample, empty):
    """An A/B graph: two MODELs share one network, and switching between them compiles nothing again."""
    from torch._dynamo.utils import counters

    compiled, report = comfy("LongCatOptimizations", model=one_block, **SWITCHES | {"compile": "blocks"})
    assert "compile: blocks" in report
    plain = sample(empty, one_block, steps=2, guidance=1.0)
    counters.clear()
    out = sample(empty, compiled, steps=2, guidance=1.0)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs >= 1 and (plain - out).abs().max() <= 1e-3 * plain.std()
    assert torch.equal(plain, sample(empty, one_block, steps=2, guidance=1.0))
    assert torch.equal(out, sample(empty, compiled, steps=2, guidance=1.0))
    assert counters["stats"]["unique_graphs"] == graphs
    assert not comfy.core("optimize.compiled_blocks").COMPILED_BLOCK._failed


def test_compile_without_a_compiler_is_said(comfy, model, monkeypatch):
    monkeypatch.setattr(comfy.core("optimize.compilation").shutil, "which", lambda name: None)
    switched, report = comfy("LongCatOptimizations", model=model, **SWITCHES | {"compile": "blocks"})
    assert "compile: off (blocks is not available: there is no C++ compiler)" in report
    key = comfy.node("comfy_network").OPTIMIZATIONS_KEY
    assert switched.model_options["transformer_options"][key].compile == "off"


def test_missing_backends_are_said(comfy, model):
    _, report = comfy("LongCatOptimizations", model=model, **SWITCHES)
    assert "flash2: " in report and "sage: " in report
    with pytest.raises(ValueError, match="attention backend 'flash2' is unavailable"):
        comfy("LongCatOptimizations", model=model, **SWITCHES | {"attention": "flash2"})


def test_an_override_is_reported(comfy, model):
    overridden = model.clone()
    overridden.model_options["transformer_options"]["optimized_attention_override"] = lambda f, *a, **k: f(*a, **k)
    _, report = comfy("LongCatOptimizations", model=overridden, **SWITCHES | {"attention": "sdpa"})
    assert "attention: sdpa (not used: an attention override set by another node decides)" in report


# --- conditioning ----------------------------------------------------------------------------------------------------


def test_image_latent(image_latent, vae, frames, comfy):
    assert image_latent["samples"].shape == (1, 16, 9, 8, 12)
    mask = image_latent["noise_mask"]
    assert mask.shape == (1, 1, 9, 8, 12) and not mask[:, :, 0].any() and mask[:, :, 1:].all()
    assert image_latent["samples"][:, :, 0].any() and not image_latent["samples"][:, :, 1:].any()


def test_clip_latent_takes_the_last_frames(comfy, vae, frames, clip_latent):
    mask = clip_latent["noise_mask"]
    assert not mask[:, :, :4].any() and mask[:, :, 4:].all()
    same = comfy("LongCatVideoContinuation", vae=vae, video=frames[4:], cond_frames=13, **SIZE)
    other = comfy("LongCatVideoContinuation", vae=vae, video=frames[:13], cond_frames=13, **SIZE)
    assert torch.equal(same["samples"], clip_latent["samples"])
    assert not torch.allclose(other["samples"], clip_latent["samples"])


@pytest.mark.parametrize("fps", [15.0, 29.97, 30.0, 60.0])
def test_a_clip_is_taken_by_its_time(comfy, vae, frames, fps):
    """As a file of this rate: the last frame, and those before it at 15 per second."""
    clip = torch.cat([frames, 1 - frames, frames])
    by_time = comfy("LongCatVideoContinuation", vae=vae, video=clip, cond_frames=9, fps=fps, **SIZE)
    same = clip[len(clip) - 1 - 8 * round(fps / 15) :: round(fps / 15)]
    by_number = comfy("LongCatVideoContinuation", vae=vae, video=same, cond_frames=9, **SIZE)
    assert torch.equal(by_time["samples"], by_number["samples"])


@pytest.mark.parametrize("resolution, shape", [("480p", (12, 60, 104)), ("720p", (12, 88, 164))])
def test_buckets(comfy, vae, monkeypatch, resolution, shape):
    """The nearest trained size, whatever width and height say. The encoder is left out: the size is the matter."""
    shapes = []
    monkeypatch.setattr(
        comfy.node("conditioning"),
        "encoded",
        lambda vae, pixels: shapes.append(pixels.shape) or torch.zeros(1, 16, 1, *(s // 8 for s in pixels.shape[1:3])),
    )
    image = torch.rand(1, 900, 1600, 3)
    out = comfy("LongCatImageToVideo", vae=vae, image=image, **SIZE | {"resolution": resolution, "length": 45})
    assert out["samples"].shape[2:] == shape
    assert shapes == [(1, 8 * shape[1], 8 * shape[2], 3)]


def test_batch_of_conditioned_videos(comfy, vae, frames, sample):
    out = comfy("LongCatImageToVideo", vae=vae, image=frames[:1], **SIZE, batch_size=2)
    videos = sample(out)
    assert videos.shape[0] == 2 and not torch.allclose(videos[0], videos[1], atol=0.1)
    assert (videos[:, :, :1] - out["samples"][:, :, :1]).abs().max() <= 1e-4


# --- bad input -------------------------------------------------------------------------------------------------------


class OtherModel:
    """A MODEL of another kind."""

    model = torch.nn.Linear(1, 1)
    model_options: dict = {}  # noqa: RUF012


@pytest.mark.parametrize("node", ["LongCatSampler", "LongCatGuider", "LongCatScheduler", "LongCatOptimizations"])
def test_models_of_another_kind_are_refused(comfy, prompts, empty, node):
    inputs = {"model": OtherModel(), "latent_image": empty, "seed": 0, "steps": 1, "guidance": 1.0, "mode": "base"}
    known = {field.id for field in comfy.mappings[node].define_schema().inputs}
    inputs = {name: value for name, value in (inputs | prompts | SWITCHES).items() if name in known}
    with pytest.raises(ValueError, match=r"got a Linear model; connect LongCat-Video"):
        comfy(node, **inputs)


@pytest.mark.parametrize(
    "samples, words",
    [
        (torch.rand(1, 4, 9, 8, 12), r"latent is \[1, 4, 9, 8, 12\] .* 16, T"),
        (torch.rand(1, 48, 9, 4, 6), r"latent is \[1, 48"),
        (torch.rand(1, 64, 100), r"latent is \[1, 64, 100\]"),
        (torch.zeros(1, 16, 9, 8, 13), r"64x104 \(height x width\) pixels; give multiples of 16"),
    ],
)
@pytest.mark.parametrize("sampler", ["LongCatSampler", "KSampler"])
def test_latents_of_another_model_are_refused(comfy, model, prompts, sample, samples, words, sampler):
    settings = {"cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    if sampler == "LongCatSampler":
        settings = {"guidance": 1.0, "mode": "base"}
    with pytest.raises(ValueError, match=words):
        comfy(sampler, model=model, latent_image={"samples": samples}, seed=0, steps=1, **prompts, **settings)


def test_text_of_another_encoder_is_refused(comfy, model, prompts, empty):
    text = [[torch.rand(1, 77, 768), {}]]
    arguments = {"model": model, "latent_image": empty, "seed": 0, "steps": 1, "guidance": 4.0, "mode": "base"}
    with pytest.raises(ValueError, match=r"text of 768 channels, this model reads \d+; encode the prompts with"):
        comfy("LongCatSampler", positive=text, negative=prompts["negative"], **arguments)


@pytest.mark.parametrize(
    "inputs, words",
    [
        ({"length": 32}, "length: 32 frames are not of the form 4k"),
        ({"length": 1}, "length 1 leaves nothing to generate after 1 given frames; ask for at least 5"),
        ({"width": 100}, "width 100 is not a multiple of 16; the nearest one is 96"),
        ({"height": 0}, "height 0 is out of range"),
        ({"resolution": "1080p"}, "unknown resolution '1080p'"),
        ({"image": torch.rand(1, 4, 4, 1)}, r"image is \[1, 4, 4, 1\]; connect an IMAGE"),
        ({"image": torch.rand(3, 4, 4, 3)}, r"image holds 3 images, but a video starts with one; take one out"),
    ],
)
def test_bad_conditioning_is_refused(comfy, vae, frames, inputs, words):
    with pytest.raises(ValueError, match=words):
        comfy("LongCatImageToVideo", **{"vae": vae, "image": frames[:1], **SIZE, **inputs})


@pytest.mark.parametrize(
    "inputs, words",
    [
        ({"cond_frames": 21}, "video lasts 1.13 s at 15 fps, and 21 frames to continue from last 1.40 s at 15 fps"),
        ({"fps": 30.0}, "video lasts 0.57 s at 30 fps, and 13 frames to continue from last 0.87 s at 15 fps"),
        ({"fps": 0.0}, "fps 0.0 is out of range"),
        ({"cond_frames": 12}, "cond_frames: 12 frames are not of the form 4k"),
        ({"length": 13}, "length 13 leaves nothing to generate after 13 given frames; ask for at least 17"),
    ],
)
def test_bad_continuation_is_refused(comfy, vae, frames, inputs, words):
    with pytest.raises(ValueError, match=words):
        comfy("LongCatVideoContinuation", **{"vae": vae, "video": frames, "cond_frames": 13, **SIZE, **inputs})


def test_a_vae_of_another_kind_is_refused(comfy, frames):
    class Vae:
        first_stage_model = torch.nn.Linear(1, 1)

    with pytest.raises(ValueError, match=r"the VAE is of class Linear; connect the Wan 2.1 VAE"):
        comfy("LongCatImageToVideo", vae=Vae(), image=frames[:1], **SIZE)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_first_step_that_is_not_finite_is_the_last(comfy, model, prompts, empty, forwards, guidance):
    spoiled = {name: [[torch.full_like(text, torch.nan), extra]] for name, [[text, extra]] in prompts.items()}
    settings = {"seed": 1, "steps": 8, "guidance": guidance, "mode": "base"}
    with pytest.raises(ValueError, match=r"is not finite.*weight_dtype bf16 or fp32"):
        comfy("LongCatSampler", model=model, latent_image=empty, **spoiled, **settings)
    assert len(forwards) == 1


def test_steps_and_refine_without_a_video_are_refused(sample, empty, image_latent):
    with pytest.raises(ValueError, match="60 steps are out of range; the distilled schedule takes 1 to 50"):
        sample(empty, mode="distilled", steps=60)
    # LongCat Image to Video's latent is empty behind the given frame.
    for latent in (empty, image_latent):
        with pytest.raises(ValueError, match="refine got an empty latent"):
            sample(latent, mode="refine", steps=10)


def test_after_bad_input_the_next_run_works(comfy, model, sample, empty):
    expected = sample(empty)
    with pytest.raises(ValueError):
        sample({"samples": torch.rand(1, 4, 9, 8, 12)})
    assert torch.equal(sample(empty), expected)


def test_files_are_not_left_behind(comfy):
    assert not list(Path(comfy.folder, "models").rglob("*.tmp"))
