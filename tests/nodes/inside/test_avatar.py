"""LongCat-Video-Avatar as a native MODEL: what ComfyUI samples equals what the core samples."""

from __future__ import annotations

import pytest
import torch

from .conftest import version
from .golden_avatar import SEED, TOLERANCE, Avatar, close


@pytest.fixture(scope="module", params=["v1_0", "v1_5"])
def avatar(comfy, request) -> Avatar:
    return Avatar(comfy, request.param)


@pytest.fixture(scope="module")
def newer(comfy) -> Avatar:
    return Avatar(comfy, "v1_5")


@pytest.fixture
def merged_in_fp32(comfy, monkeypatch) -> None:
    """On GPUs ComfyUI merges LoRAs in fp16, which moves these latents by up to 0.005."""
    from comfy import model_management

    monkeypatch.setattr(model_management, "lora_compute_dtype", lambda device: torch.float32)


def test_text_and_image(avatar):
    audio = avatar.audio()
    assert close(avatar.sampled(avatar.conds(audio), avatar.latent()), avatar.expected(audio))
    image = avatar.data["image.latent"]
    got = avatar.sampled(avatar.conds(audio), avatar.latent(image), mode="enhance_hf")
    assert close(got, avatar.expected(audio, image, mode="enhance_hf"))


@pytest.mark.parametrize("kv_cache", ["exact", "off"])
def test_continuation_with_a_reference(avatar, kv_cache):
    audio, clean = avatar.audio(), avatar.data["at2v.tail.latents"]
    for reference in (avatar.reference(4, 1), avatar.reference(-3, 1)):
        got = avatar.sampled(avatar.conds(audio, reference), avatar.latent(clean), kv_cache=kv_cache)
        assert close(got, avatar.expected(audio, clean, reference))
        assert (got[:, :, : clean.shape[2]] - clean).abs().max() < 1e-5


def test_two_people_by_masks(avatar, forwards):
    audio, image = avatar.audio(2), avatar.data["image.latent"]
    got = avatar.sampled(avatar.conds(audio), avatar.latent(image), steps=2)
    # One pass over the image, and three of a batch of 1 a step.
    assert [shape[0] for shape in forwards] == [1] * 7
    assert close(got, avatar.expected(audio, image, steps=2))
    reference = avatar.reference(4, 1)
    got = avatar.sampled(avatar.conds(audio, reference), avatar.latent(image), steps=2)
    assert close(got, avatar.expected(audio, image, reference, steps=2))


def test_parts_of_guidance_that_do_not_count_are_not_computed(newer, forwards):
    for text, sound, parts in ((4.0, 4.0, 2), (3.0, 1.0, 2), (1.0, 3.0, 3), (1.0, 1.0, 1), (3.0, 4.0, 3)):
        forwards.clear()
        audio = newer.audio(scale=sound)
        got = newer.sampled(newer.conds(audio), newer.latent(), steps=2, guidance=text)
        assert [shape[0] for shape in forwards] == [parts] * 2
        assert close(got, newer.expected(audio, steps=2, guidance=text))
    forwards.clear()
    newer.sampled(newer.conds(newer.audio()), newer.latent(), guidance_until=0.5)
    assert [shape[0] for shape in forwards] == [3, 3, 1, 1]


def test_stock_samplers_guide_from_silence(newer, comfy):
    """With a negative that hears silence, plain guidance is that of an avatar with two equal scales."""
    audio = newer.audio(scale=4.0)
    conds = newer.conds(audio)
    conds["negative"][0][1]["longcat_audio"] = comfy.node("comfy_avatar").silent(audio)
    inputs = {"model": newer.model, "seed": SEED, "steps": 4, "cfg": 4.0, "latent_image": newer.latent()}
    out = comfy("KSampler", sampler_name="euler", scheduler="simple", denoise=1.0, **inputs, **conds)["samples"]
    guider = comfy("LongCatGuider", model=newer.model, guidance=4.0, **conds)
    sigmas = comfy("BasicScheduler", model=newer.model, scheduler="simple", steps=4, denoise=1.0)
    assert float(sigmas[1]) == pytest.approx(7 * 0.75 / (1 + 6 * 0.75), abs=1e-3)
    own, _ = comfy(
        "SamplerCustomAdvanced", noise=comfy("RandomNoise", noise_seed=SEED), guider=guider,
        sampler=comfy("KSamplerSelect", sampler_name="euler"), sigmas=sigmas, latent_image=newer.latent(),
    )  # fmt: skip
    assert (out - own["samples"]).abs().max() <= TOLERANCE


def comfyui_names(official):
    """A LoRA of official names as single files for ComfyUI have it: every part of a stacked weight by itself."""
    stacked = {"attn.qkv": ("q", "k", "v"), "cross_attn.kv_linear": ("k", "v")}
    single = {"attn.proj": "o", "cross_attn.q_linear": "q"}
    found = {}
    for key in official:
        module, _, kind = (
            key.removeprefix("lora___lorahyphen___").replace("___lorahyphen___", ".").partition(".lora_down")
        )
        if kind != ".weight":
            continue
        name = key.removesuffix(".lora_down.weight")
        block, layer = module[: module.index(".", 7)], module[module.index(".", 7) + 1 :]
        kinds = stacked.get(layer)
        ups = (
            [official[f"{name}.lora_up.blocks.{i}.weight"] for i in range(len(kinds))]
            if kinds
            else [official[f"{name}.lora_up.weight"]]
        )
        attention = "cross_attn" if layer.startswith("cross") else "self_attn"
        layers = [f"{attention}.{part}" for part in kinds or ()] or [
            f"{attention}.{single[layer]}" if layer in single else layer
        ]
        for part, up, down in zip(layers, ups, official[key].chunk(len(ups)), strict=True):
            target = f"diffusion_model.{block}.{part}"
            found[f"{target}.lora_up.weight"], found[f"{target}.lora_down.weight"] = up.contiguous(), down.contiguous()
            found[f"{target}.alpha"] = official[f"{name}.alpha_scale"] * len(down)
    return found


@pytest.mark.parametrize("form", ["official", "ComfyUI"])
def test_the_distilled_schedule_and_its_lora(newer, comfy, form):
    from safetensors.torch import load_file

    lora = load_file(newer.folder / "lora.safetensors")
    name = comfy.save("loras", "dmd_lora.safetensors", comfyui_names(lora) if form == "ComfyUI" else lora)
    model = comfy("LoraLoaderModelOnly", model=newer.model, lora_name=name, strength_model=0.5)
    network = comfy.core("checkpoints.load").load_transformer(comfy.folder / "models" / "diffusion_models" / newer.name)
    comfy.core("checkpoints.lora").merge_lora(network, newer.folder / "lora.safetensors", 0.5)
    audio, image = newer.audio(scale=1.0), newer.data["image.latent"]
    given = {"steps": 8, "mode": "distilled", "guidance": 1.0}
    got = newer.sampled(newer.conds(audio), newer.latent(image), model=model, **given)
    assert close(got, newer.expected(audio, image, network=network, **given))
    assert not torch.allclose(got, newer.sampled(newer.conds(audio), newer.latent(image), **given), atol=1e-2)


def test_batches_share_the_audio(newer):
    audio = newer.audio()
    two = newer.sampled(newer.conds(audio), newer.latent(batch=2), steps=2)
    one = newer.sampled(newer.conds(audio), newer.latent(), steps=2)
    assert close(two[:1], one) and not torch.allclose(two[0], two[1], atol=0.1)


@pytest.mark.parametrize("form", ["official", "ComfyUI", "weight_dtype", "int8"])
def test_single_files_in_stock_and_own_loader(newer, comfy, form):
    """config.json is not beside a single file; what shapes do not show stands in its metadata."""
    import json

    from safetensors.torch import load_file

    formats, load = comfy.core("checkpoints.formats"), comfy.core("checkpoints.load")
    metadata = {"config": json.dumps({"audio": newer.network.config.to_dict()["audio"]})}
    if form == "int8":
        state = load_file(newer.folder / "dit_int8.safetensors")
    else:
        state = load.official_state(newer.network, formats.COMFYUI if form == "ComfyUI" else formats.OFFICIAL)
    name = comfy.save("diffusion_models", f"avatar-{form}.safetensors", state, metadata)
    dtype = "fp8_e4m3fn" if form == "weight_dtype" else "default"
    own = comfy("LongCatModelLoader", model_name=name, weight_dtype=dtype)
    stock = comfy("UNETLoader", unet_name=name, weight_dtype=dtype)
    audio = newer.audio()
    one, other = (newer.sampled(newer.conds(audio), newer.latent(), model, steps=2) for model in (own, stock))
    assert torch.equal(one, other)
    wanted = newer.expected(audio, steps=2)
    assert (one - wanted).norm() <= (0.3 if form in ("weight_dtype", "int8") else 0.05) * wanted.norm()


def test_8_bits_row_by_row(newer, comfy):
    model = comfy("LongCatModelLoader", model_name=newer.name, weight_dtype="fp8 rowwise")
    layers = comfy.node("comfy_fp8").layers(model.model.diffusion_model)
    assert {"blocks.0.audio_attn.q", "blocks.1.audio_attn.proj", "blocks.1.ffn.down"} <= set(layers)
    policy = comfy.core("optimize.quantization").Policy()
    load = comfy.core("checkpoints.load").load_transformer
    network = load(comfy.folder / "models" / "diffusion_models" / newer.name, fp8=policy)
    audio = newer.audio()
    got = newer.sampled(newer.conds(audio), newer.latent(), model, steps=2)
    wanted = newer.expected(audio, network=network, steps=2)
    assert (got - wanted).norm() <= 0.1 * wanted.norm()


def test_other_nodes_on_an_avatar(newer, comfy):
    """A step cache, and context windows."""
    audio, image = newer.audio(), newer.data["image.latent"]
    given = newer.conds(audio), newer.latent(image)
    plain = newer.sampled(*given, steps=8)
    cached = comfy("LongCatStepCache", model=newer.model, threshold=0.3)
    out = newer.sampled(*given, cached, steps=8, guidance_until=0.6)
    whole = newer.sampled(*given, steps=8, guidance_until=0.6)
    assert 0 < (out - whole).norm() < 0.3 * whole.norm()
    windows = comfy(
        "ContextWindowsManual", model=newer.model, context_length=5, context_overlap=2, context_stride=1,
        context_schedule="standard_static", closed_loop=False, fuse_method="pyramid", dim=2, freenoise=False,
    )  # fmt: skip
    if hasattr(windows.model, "resize_cond_for_context_window") and version() >= (0, 9):
        out = newer.sampled(*given, windows, steps=2)
        assert out.isfinite().all() and out.shape == plain.shape
    else:
        with pytest.raises(comfy.core("errors").LongCatError, match="need a newer ComfyUI"):
            newer.sampled(*given, windows, steps=2)


def test_memory_counts_the_audio(newer):
    model, shape = newer.model.model, [2, 16, 7, 8, 12]
    plain = model.memory_required(shape, {"c_crossattn": [[1, 16, 48]]})
    heard = model.memory_required(shape, {"c_crossattn": [[1, 16, 48]], "heard": [[1, 7]]})
    # Keys and values of 6 tokens of 64 numbers for each of 7 frames in 2 blocks, of 2 videos.
    assert heard - plain == 2 * 2 * 2 * 6 * 7 * 64 * 4
    shapes = {"c_crossattn": [[1, 16, 48]], "heard": [[2, 7]], "reference": [[1, 16, 1, 8, 12]]}
    two = model.memory_required(shape, shapes)
    assert two - heard > heard - plain


def test_refusals(newer, model, comfy, prompts, empty, avatar):
    audio, image = newer.audio(), newer.data["image.latent"]
    people, core = newer.audio(2), comfy.core("sampling.avatar")
    bare = [[newer.texts[0], {}]]

    def refused(match, conds, latent, **values):
        with pytest.raises(comfy.core("errors").LongCatError, match=match):
            newer.sampled(conds, latent, **values)

    refused("positive has no audio", {**newer.conds(audio), "positive": bare}, newer.latent())
    refused("negative has no audio", {**newer.conds(audio), "negative": bare}, newer.latent())
    other = core.Audio(torch.zeros(1, 25, 5, 12, 768))
    refused("use the audio encoder that belongs to it", newer.conds(other), newer.latent())
    short = core.Audio(audio.windows[:, :21])
    refused("the audio is of 21 frames and the latent of 25", newer.conds(short), newer.latent())
    refused("masks say where people are in the first frame", newer.conds(people), newer.latent())
    refused("one video at a time", newer.conds(people), newer.latent(image, batch=2))
    refused("several voices need a mask", newer.conds(core.Audio(people.windows)), newer.latent())
    refused("has exactly 8 steps", newer.conds(audio), newer.latent(), mode="distilled", guidance=1.0)
    refused("no refine stage", newer.conds(audio), newer.latent(), mode="refine")
    with pytest.raises(comfy.core("errors").LongCatError, match="does not hear audio"):
        conds = {name: [[cond[0][0], {"longcat_audio": audio}]] for name, cond in prompts.items()}
        comfy("LongCatSampler", model=model, latent_image=empty, seed=1, steps=2, guidance=4.0, mode="base", **conds)
    with pytest.raises(comfy.core("errors").LongCatError, match="LongCat Calibrate has no audio"):
        comfy.node("models").require_soundless(newer.model, "LongCat Calibrate")


def test_keys_of_audio_are_computed_once(newer, comfy, monkeypatch):
    attention, calls = comfy.core("model.audio_block").AudioAttention, []
    original = attention.frame_keys
    monkeypatch.setattr(attention, "frame_keys", lambda self, *args: calls.append(self) or original(self, *args))
    newer.sampled(newer.conds(newer.audio()), newer.latent(), steps=4)
    assert len(calls) == len(set(calls)) == newer.network.config.depth


def test_saved_under_official_names(newer, comfy):
    from safetensors.torch import load_file

    state = newer.model.model.diffusion_model.state_dict()
    saved = comfy.node("comfy_weights").to_official(state, newer.network.config)
    official = load_file(newer.folder / "dit.safetensors")
    assert saved.keys() == official.keys()
    assert all(torch.equal(saved[name].cpu(), tensor) for name, tensor in official.items())


def test_a_saved_avatar_loads_again(newer, comfy):
    """ModelSave keeps no metadata; what the avatar hears is read off its weights."""
    from pathlib import Path

    import folder_paths

    lora = comfy.save("loras", "audio_lora.safetensors", audio_lora())
    model = comfy("LoraLoaderModelOnly", model=newer.model, lora_name=lora, strength_model=0.5)
    comfy("ModelSave", model=model, filename_prefix="diffusion_models/avatar")
    (path,) = Path(folder_paths.get_output_directory(), "diffusion_models").glob("avatar*.safetensors")
    (comfy.folder / "models" / "diffusion_models" / path.name).symlink_to(path)
    audio = newer.audio()
    wanted = newer.sampled(newer.conds(audio), newer.latent(), model, steps=2)
    for node, name in (("UNETLoader", "unet_name"), ("LongCatModelLoader", "model_name")):
        again = comfy(node, **{name: path.name}, weight_dtype="default")
        assert again.model.network.config == newer.network.config
        assert close(newer.sampled(newer.conds(audio), newer.latent(), again, steps=2), wanted)
    assert comfy.core("checkpoints.load").open_checkpoint(path).config == newer.network.config


def audio_lora():
    """A LoRA of audio layers under official names."""
    generator, sizes = torch.Generator().manual_seed(0), {"q_linear": (64, 64), "kv_linear": (128, 40)}
    return {
        f"diffusion_model.blocks.{i}.audio_cross_attn.{layer}.lora_{half}.weight": torch.randn(
            (rows, 2) if half == "up" else (2, columns), generator=generator
        )
        for i in range(2)
        for layer, (rows, columns) in sizes.items()
        for half in ("up", "down")
    }


@pytest.mark.usefixtures("merged_in_fp32")
@pytest.mark.parametrize("node", ["LoraLoaderModelOnly", "LoraLoaderBypassModelOnly"])
def test_a_lora_of_audio_layers(newer, model, comfy, caplog, node):
    import nodes

    if node not in nodes.NODE_CLASS_MAPPINGS:
        pytest.skip("this ComfyUI has no such node")
    name = comfy.save("loras", "audio_lora.safetensors", audio_lora())
    patched = comfy(node, model=newer.model, lora_name=name, strength_model=0.5)
    network = comfy.core("checkpoints.load").load_transformer(comfy.folder / "models" / "diffusion_models" / newer.name)
    comfy.core("checkpoints.lora").merge_lora(network, comfy.folder / "models" / "loras" / name, 0.5)
    audio = newer.audio()
    got = newer.sampled(newer.conds(audio), newer.latent(), model=patched, steps=2)
    assert close(got, newer.expected(audio, network=network, steps=2)) and "not matched" not in caplog.text
    assert (got - newer.expected(audio, steps=2)).abs().max() > 0.1
    with pytest.raises(comfy.core("errors").LongCatError, match=r"matches nothing .*audio_cross_attn"):
        comfy(node, model=model, lora_name=name, strength_model=0.5)


@pytest.mark.usefixtures("merged_in_fp32")
def test_weights_that_stay_in_ram_are_cast_at_use(newer, comfy, monkeypatch):
    """Audio layers and norms too; forced here on the CPU, as in test_lora."""
    from comfy import model_management
    from safetensors.torch import load_file

    name = comfy.save("loras", "dmd_lora.safetensors", load_file(newer.folder / "lora.safetensors"))
    patched = comfy("LoraLoaderModelOnly", model=newer.model, lora_name=name, strength_model=1.0)
    audio, image = newer.audio(), newer.data["image.latent"]
    given = newer.conds(audio), newer.latent(image), patched.clone()
    whole, loading, lowered = newer.sampled(*given, steps=2), type(patched).load, []

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
        if type(self.model).__name__ != "LongCatVideo":
            return loading(self, device_to, lowvram_model_memory, force_patch_weights, full_load)
        out = loading(self, device_to, 1024, force_patch_weights, False)
        lowered.append(
            {name for name, module in self.model.named_modules() if getattr(module, "comfy_cast_weights", 0)}
        )
        return out

    monkeypatch.setattr(type(patched), "load", load)
    model_management.unload_all_models()
    out = newer.sampled(*given[:2], patched.clone(), steps=2)
    model_management.unload_all_models()
    assert {f"diffusion_model.blocks.0.audio_attn.{layer}" for layer in ("q", "kv", "proj")} <= lowered[-1]
    assert close(out, whole)
