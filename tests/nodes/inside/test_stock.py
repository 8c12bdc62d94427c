"""Stock nodes on the native model, each shown to do what it is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from . import cases
from .conftest import MODEL, ROUNDING, version

SETTINGS = {"seed": 1, "steps": 4, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}


def difference(one: torch.Tensor, two: torch.Tensor) -> float:
    """Largest difference in units of the latents' spread."""
    return float((one - two).abs().max() / one.std())


@pytest.fixture(scope="session")
def ksample(comfy, model, prompts):
    def run(latent, model=model, cfg=4.0, **values):
        arguments = {"model": model, "latent_image": latent, "cfg": cfg, **prompts, **SETTINGS, **values}
        return comfy("KSampler", **arguments)["samples"]

    return run


@pytest.fixture(scope="session")
def euler(comfy, model, network, prompts):
    """The headless sampler on ComfyUI's noise levels, without guidance; latents as ComfyUI has them."""

    def run(sigmas, cond=None, seed=1, network=network):
        schedule = comfy.core("sampling.schedules").Schedule("base", sigmas[:-1] * 1000, sigmas)
        noise = comfy.core("sampling.conditioning").seeded_noise((1, 16, 9, 8, 12), seed)
        context = prompts["positive"][0][0]
        out = comfy.core("sampling.sampler").sample(
            network,
            noise,
            schedule,
            context,
            (context != 0).any(-1),
            guidance_scale=1.0,
            cond_latents=None if cond is None else model.model.process_latent_in(cond),
        )
        return model.model.process_latent_out(out)

    return run


def sigmas_of(comfy, model, **values):
    return comfy("BasicScheduler", model=model, **{"scheduler": "simple", "steps": 4, "denoise": 1.0, **values})


# --- samplers --------------------------------------------------------------------------------------------------------


def test_ksampler_equals_the_headless_steps(comfy, model, ksample, euler, empty):
    sigmas = sigmas_of(comfy, model)
    assert sigmas[0] == 1 and torch.allclose(sigmas[2], torch.tensor(12 * 0.5 / (1 + 11 * 0.5)), atol=1e-3), "shift 12"
    assert difference(euler(sigmas), ksample(empty, cfg=1.0)) <= 1e-4 * ROUNDING


@pytest.mark.parametrize("given, count", [("image_latent", 1), ("clip_latent", 4)])
def test_ksampler_keeps_given_frames(comfy, model, ksample, euler, request, given, count):
    latent = request.getfixturevalue(given)
    out = ksample(latent, cfg=1.0)
    assert difference(latent["samples"][:, :, :count], out[:, :, :count]) <= 1e-4
    assert difference(euler(sigmas_of(comfy, model), latent["samples"][:, :, :count]), out) <= 1e-4 * ROUNDING


def test_sampler_custom_advanced_with_stock_parts_equals_ksampler(comfy, model, prompts, ksample, empty):
    guider = comfy("CFGGuider", model=model, cfg=4.0, **prompts)
    out, _ = comfy(
        "SamplerCustomAdvanced",
        noise=comfy("RandomNoise", noise_seed=1),
        guider=guider,
        sampler=comfy("KSamplerSelect", sampler_name="euler"),
        sigmas=sigmas_of(comfy, model),
        latent_image=empty,
    )
    assert torch.equal(out["samples"], ksample(empty))
    assert difference(ksample(empty), ksample(empty, cfg=1.0)) > 0.1


def test_stock_empty_latent(comfy, ksample):
    size = {"width": cases.WIDTH, "height": cases.HEIGHT, "length": cases.FRAMES, "batch_size": 1}
    latent = comfy("EmptyHunyuanLatentVideo", **size)
    assert ksample(latent, steps=1).shape == (1, 16, 9, 8, 12)


def test_partial_masks_are_painted_over_alone(ksample, empty):
    """Inpainting: what the mask leaves out stays, and does so without being taken for a given frame."""
    latents = ksample(empty)
    mask = torch.ones(1, 1, 9, 8, 12)
    mask[..., :6] = 0
    out = ksample({"samples": latents, "noise_mask": mask}, seed=2)
    assert difference(latents[..., :6], out[..., :6]) <= 1e-4
    assert difference(latents[..., 6:], out[..., 6:]) > 0.1


# --- model patches ---------------------------------------------------------------------------------------------------


def test_model_sampling_sd3_sets_the_shift(comfy, model, ksample, euler, empty):
    patched = comfy("ModelSamplingSD3", model=model, shift=3.0)
    sigmas = sigmas_of(comfy, patched)
    assert torch.allclose(sigmas[2], torch.tensor(3 * 0.5 / (1 + 2 * 0.5)), atol=1e-3)
    assert difference(euler(sigmas), ksample(empty, patched, cfg=1.0)) <= 1e-4 * ROUNDING
    assert difference(ksample(empty), ksample(empty, patched)) > 0.1


def test_cfg_zero_star_acts_but_is_not_longcats_guidance(comfy, model, prompts, ksample, sample, empty):
    patched = comfy("CFGZeroStar", model=model)
    assert difference(ksample(empty), ksample(empty, patched)) > 0.01
    guided = {
        name: comfy(
            "SamplerCustomAdvanced",
            noise=comfy("RandomNoise", noise_seed=1),
            guider=guider,
            sampler=comfy("KSamplerSelect", sampler_name="euler"),
            sigmas=comfy("LongCatScheduler", model=model, mode="base", steps=3),
            latent_image=empty,
        )[0]["samples"]
        for name, guider in (
            ("stock", comfy("CFGGuider", model=patched, cfg=4.0, **prompts)),
            ("longcat", comfy("LongCatGuider", model=model, guidance=4.0, **prompts)),
        )
    }
    assert difference(guided["longcat"], guided["stock"]) > 0.01


@pytest.mark.parametrize("node", ["EasyCache", "LazyCache"])
@pytest.mark.parametrize("latent", ["empty", "image_latent"])
@pytest.mark.parametrize("sampler", ["KSampler", "LongCatSampler"])
def test_step_caches_skip_passes(comfy, model, ksample, sample, forwards, request, node, latent, sampler):
    latent = request.getfixturevalue(latent)
    options = {"reuse_threshold": 0.3, "start_percent": 0.15, "end_percent": 1.0, "verbose": False}
    patched = comfy(node, model=model, **options)
    run = ksample if sampler == "KSampler" else sample
    plain = run(latent, steps=10)
    count = len(forwards)
    forwards.clear()
    out = run(latent, patched, steps=10)
    assert len(forwards) < count, "some steps came from the cache"
    assert 0 < (plain - out).abs().mean() < plain.std(), "coarser, not broken"
    forwards.clear()
    careful = comfy(node, model=model, **{**options, "reuse_threshold": 0.0})
    assert difference(plain, run(latent, careful, steps=10)) <= 1e-5, "with nothing to reuse it changes nothing"


WINDOWS = {
    "context_length": 5,
    "context_overlap": 2,
    "context_schedule": "standard_static",
    "context_stride": 1,
    "closed_loop": False,
    "fuse_method": "pyramid",
    "dim": 2,
    "freenoise": False,
}


def test_context_windows(comfy, model, ksample, sample, forwards, empty):
    patched = comfy("ContextWindowsManual", model=model, **WINDOWS)
    plain = ksample(empty, steps=2)
    assert {shape[2] for shape in forwards} == {9}
    forwards.clear()
    out = ksample(empty, patched, steps=2)
    assert {shape[2] for shape in forwards} <= {5, 6} and len(forwards) >= 4
    assert out.shape == plain.shape and difference(plain, out) > 0.01
    assert difference(plain, sample(empty, patched, steps=2)) > 0.01


def test_context_windows_keep_given_frames_to_their_window(comfy, model, ksample, image_latent, monkeypatch):
    bridge = comfy.node("comfy_model")
    counts = []
    original = bridge.DiffusionModel.forward

    def forward(self, x, *args, num_cond_latents=0, **kwargs):
        counts.append(num_cond_latents)
        return original(self, x, *args, num_cond_latents=num_cond_latents, **kwargs)

    monkeypatch.setattr(bridge.DiffusionModel, "forward", forward)
    patched = comfy("ContextWindowsManual", model=model, **WINDOWS)
    out = ksample(image_latent, patched, steps=2)
    assert difference(image_latent["samples"][:, :, :1], out[:, :, :1]) <= 1e-4
    assert counts.count(1) == 2 and counts.count(0) >= 2, "the first window of each step has the image, others do not"
    if version() >= (0, 33):
        counts.clear()
        kept = {"latent_retain_index_list": "0", "cond_retain_index_list": "0"}
        ksample(image_latent, comfy("ContextWindowsManual", model=model, **WINDOWS, **kept), steps=2)
        assert set(counts) == {1}, "with index 0 retained, every window has it"


def test_skip_layer_guidance(comfy, model, ksample, sample, forwards, empty):
    def patched(layers, **values):
        options = {"scale": 3.0, "start_percent": 0.0, "end_percent": 1.0, "rescaling_scale": 0.0, **values}
        return comfy("SkipLayerGuidanceDiT", model=model, double_layers=layers, single_layers="", **options)

    plain = ksample(empty, steps=2)
    two, three = ksample(empty, patched("2"), steps=2), ksample(empty, patched("3"), steps=2)
    assert difference(plain, two) > 0.01 and difference(two, three) > 0.01, "each layer its own effect"
    assert difference(sample(empty), sample(empty, patched("2"))) > 0.01, "under LongCat Guider too"
    assert difference(plain, ksample(empty, patched("2", scale=0.0), steps=2)) == 0


def test_a_replaced_block_may_call_the_original(comfy, model, ksample, empty):
    """patches_replace, the hook of many packs: calling the block changes nothing, tokens are [B, N, C]."""
    patched = model.clone()
    seen = []

    def replacement(args, extra):
        seen.append(args["img"].shape)
        return extra["original_block"](args)

    patched.set_model_patch_replace(replacement, "dit", "double_block", 1)
    assert torch.equal(ksample(empty, patched, steps=1), ksample(empty, steps=1))
    assert seen[0][1:] == (9 * 4 * 6, model.model.diffusion_model.config.hidden_size)


def test_attention_override_is_honored(comfy, model, ksample, empty):
    patched = model.clone()
    calls = []

    def override(attention, q, k, v, heads, **kwargs):
        calls.append(q.shape)
        return attention(q, k, v, heads, **kwargs)

    patched.model_options["transformer_options"]["optimized_attention_override"] = override
    assert difference(ksample(empty, steps=1), ksample(empty, patched, steps=1)) <= 1e-4
    config = model.model.diffusion_model.config
    assert len(calls) == config.depth and calls[0][1:] == (9 * 4 * 6, config.hidden_size)


# --- loading and saving ----------------------------------------------------------------------------------------------


def test_unet_loader_recognizes_the_model(comfy, sample, empty):
    for dtype, name in (("default", "default"), ("fp8_e4m3fn", "fp8_e4m3fn")):
        stock = comfy("UNETLoader", unet_name=MODEL, weight_dtype=dtype)
        own = comfy("LongCatModelLoader", model_name=MODEL, weight_dtype=name)
        assert torch.equal(sample(empty, stock), sample(empty, own))


def test_fp8_weights(comfy, model, sample, empty):
    loaded = comfy("UNETLoader", unet_name=MODEL, weight_dtype="fp8_e4m3fn")
    kinds = {parameter.dtype for parameter in loaded.model.diffusion_model.parameters()}
    assert kinds == {torch.float8_e4m3fn}
    error = difference(sample(empty), sample(empty, loaded))
    assert 1e-3 < error < 3, "coarser weights, the same video"


def test_model_save(comfy, model, sample, empty, tmp_path):
    import folder_paths

    comfy("ModelSave", model=model, filename_prefix="diffusion_models/saved")
    (path,) = Path(folder_paths.get_output_directory(), "diffusion_models").glob("saved*.safetensors")
    checkpoint = comfy.core("checkpoints.load").open_checkpoint(path)
    assert checkpoint.prefix == "model.diffusion_model." and "blocks.0.ffn.w3.weight" in checkpoint.where
    (comfy.folder / "models" / "diffusion_models" / path.name).symlink_to(path)
    for node, name in (("UNETLoader", "unet_name"), ("LongCatModelLoader", "model_name")):
        dtype = "default"
        again = comfy(node, **{name: path.name}, weight_dtype=dtype)
        assert difference(sample(empty), sample(empty, again)) <= 1e-4 * ROUNDING


def test_checkpoints(comfy, model, clip, vae, sample, empty, prompts, clip_latent):
    """A MODEL with its text encoder and VAE in one file, and alone."""
    import folder_paths

    folder = Path(folder_paths.get_output_directory(), "checkpoints")
    # As ComfyUI does when it starts.
    folder_paths.add_model_folder_path("checkpoints", str(folder))

    def saved(node: str, **parts: Any) -> tuple:
        comfy(node, model=model, filename_prefix=f"checkpoints/{node}", **parts)
        (path,) = folder.glob(f"{node}*.safetensors")
        return comfy("CheckpointLoaderSimple", ckpt_name=path.name)

    again, text, decoder = saved("CheckpointSave", clip=clip, vae=vae)
    (encoded, _), *_ = comfy("CLIPTextEncode", clip=text, text=cases.PROMPT)
    assert torch.equal(encoded, prompts["positive"][0][0])
    latents = {"samples": clip_latent["samples"][:, :, :2]}
    wanted = comfy("VAEDecode", samples=latents, vae=vae)
    assert torch.equal(comfy("VAEDecode", samples=latents, vae=decoder), wanted)
    alone, text, _ = saved("ModelSave")
    assert text is None
    for loaded in (again, alone):
        assert difference(sample(empty), sample(empty, loaded)) <= 1e-4 * ROUNDING


# --- VAE and files ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def video(comfy, vae, clip_latent):
    """The given clip, encoded and decoded again: IMAGE [F, H, W, 3]."""
    latents = {"samples": clip_latent["samples"][:, :, :4]}
    images = comfy("VAEDecode", samples=latents, vae=vae)
    return images[0] if images.ndim == 5 else images


def test_vae_decode_shows_the_clip(comfy, video, frames):
    media = comfy.core("files.media")
    given = media.resize_and_crop(cases.clip()[-13:], cases.HEIGHT, cases.WIDTH) / 255
    assert video.shape == (13, cases.HEIGHT, cases.WIDTH, 3)
    assert (video - torch.from_numpy(given).float()).abs().mean() < 0.05


def test_vae_decode_tiled(comfy, vae, clip_latent, video):
    latents = {"samples": clip_latent["samples"][:, :, :4]}
    tiles = {"tile_size": 64, "overlap": 32, "temporal_size": 64, "temporal_overlap": 8}
    tiled = comfy("VAEDecodeTiled", samples=latents, vae=vae, **tiles)
    tiled = tiled[0] if tiled.ndim == 5 else tiled
    assert tiled.shape == video.shape
    assert 0 < (tiled - video).abs().mean() < 0.02, "nearly the same, seams apart"


def test_save_animated_webp(comfy, video):
    import folder_paths
    from PIL import Image

    options = {"fps": 15.0, "lossless": True, "quality": 80, "method": "default"}
    comfy("SaveAnimatedWEBP", images=video, filename_prefix="stock", **options)
    (path,) = Path(folder_paths.get_output_directory()).glob("stock*.webp")
    with Image.open(path) as picture:
        assert (picture.size, picture.n_frames) == ((cases.WIDTH, cases.HEIGHT), 13)


def test_create_and_save_video(comfy, video):
    import av
    import folder_paths

    clip = comfy("CreateVideo", images=video, fps=15.0)
    comfy("SaveVideo", video=clip, filename_prefix="stock", format="mp4")
    (path,) = Path(folder_paths.get_output_directory()).glob("stock*.mp4")
    with av.open(str(path)) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(decoded) == 13
    assert abs(torch.from_numpy(decoded[-1] / 255).float() - video[-1]).mean() < 0.05
