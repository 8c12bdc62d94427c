"""What the loaders read, what ComfyUI's own detection answers, and what they say to the wrong file."""

from __future__ import annotations

import json

import pytest
import torch

from . import cases
from .conftest import MODEL, TEXT_ENCODER, version


@pytest.fixture(scope="module")
def nano(comfy) -> dict[str, torch.Tensor]:
    """The embedded model's tensors in official names."""
    from safetensors.torch import load_file

    return load_file(comfy.core("generate.paths").NANO_MODEL)


def save_folder(comfy, name: str, nano, zero_pad: bool, int8: bool = False) -> str:
    """The official folder form: shards in two files, an index and a config."""
    folder = comfy.folder / "models" / "diffusion_models" / name / "dit"
    folder.mkdir(parents=True)
    tensors = dict(nano)
    if int8:
        for key in [key for key in nano if key.endswith(".weight") and nano[key].ndim == 2 and "final" not in key]:
            weight = tensors.pop(key).float()
            scale = weight.abs().amax(1) / 127
            tensors[f"{key}_int8"] = (weight / scale[:, None]).round().to(torch.int8)
            tensors[f"{key}_scale"] = scale
    from safetensors.torch import save_file

    names, stem = sorted(tensors), "quantized_model" if int8 else "diffusion_pytorch_model"
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"{stem}-{i:05}-of-00002.safetensors"
        save_file({key: tensors[key] for key in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = comfy.core("checkpoints.load").open_checkpoint(comfy.core("generate.paths").NANO_MODEL).config
    values = config.to_dict() | {"text_tokens_zero_pad": zero_pad, "adaln_tembed_dim": config.adaln_dim}
    (folder / "config.json").write_text(json.dumps(values))
    return str(folder.relative_to(comfy.folder / "models" / "diffusion_models"))


def names_of(comfy, node: str, widget: str) -> list[str]:
    return comfy.mappings[node].INPUT_TYPES()["required"][widget][1]["options"]


def test_the_embedded_model_is_in_the_lists(comfy):
    assert MODEL in names_of(comfy, "LongCatModelLoader", "model_name")
    assert TEXT_ENCODER in names_of(comfy, "LongCatTextEncoderLoader", "text_encoder_name")
    assert MODEL in comfy.mappings["UNETLoader"].INPUT_TYPES()["required"]["unet_name"][0]
    assert "longcat_nano_vae_bf16.safetensors" in comfy.mappings["VAELoader"].INPUT_TYPES()["required"]["vae_name"][0]


def test_folders_of_shards(comfy, nano, model, sample, empty):
    name = save_folder(comfy, "LongCat-Video", nano, zero_pad=True)
    listed = names_of(comfy, "LongCatModelLoader", "model_name")
    assert name in listed and not any("-of-" in entry for entry in listed), "the folder stands for its shards"
    loaded = comfy("LongCatModelLoader", model_name=name, weight_dtype="fp32")
    assert torch.equal(sample(empty), sample(empty, loaded))
    load, arguments = loaded.cached_patcher_init
    again = load(*arguments, **({"disable_dynamic": True} if version() >= (0, 33) else {}))
    assert torch.equal(sample(empty), sample(empty, again)), "ComfyUI can make an independent copy"


def test_config_of_a_folder_is_kept(comfy, nano):
    name = save_folder(comfy, "OtherPadding", nano, zero_pad=False)
    loaded = comfy("LongCatModelLoader", model_name=name, weight_dtype="fp32")
    assert loaded.model.diffusion_model.config.text_tokens_zero_pad is False


def test_official_int8(comfy, nano, model, sample, empty):
    name = save_folder(comfy, "Quantized", nano, zero_pad=True, int8=True)
    loaded = comfy("LongCatModelLoader", model_name=name, weight_dtype="fp32")
    plain, out = sample(empty), sample(empty, loaded)
    assert 0 < (plain - out).abs().mean() < 0.3 * plain.std()


def test_scaled_fp8(comfy, nano, sample, empty):
    """Official names with a scale for each weight, as ComfyUI's own quantized files have: also in fp32 layers."""
    tensors = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for key, value in nano.items():
        module = key.removesuffix(".weight")
        if key.endswith(".weight") and value.ndim == 2:
            scale = value.float().abs().max() / 448
            tensors[f"{module}.scale_weight"] = scale
            value = (value.float() / scale).to(torch.float8_e4m3fn)
        tensors[key] = value
    name = comfy.save("diffusion_models", "scaled.safetensors", tensors)
    loaded = comfy("LongCatModelLoader", model_name=name, weight_dtype="default")
    network = loaded.model.diffusion_model
    assert not isinstance(network.blocks[0].modulation, torch.nn.Linear), "a quantized layer of ComfyUI"
    plain = sample(empty)
    assert 0 < (plain - sample(empty, loaded)).abs().mean() < 0.3 * plain.std()


def test_linked_files(comfy, tmp_path, sample, empty):
    """A link that leads out of the model folder, as download caches make them."""
    blob = tmp_path / "blob"
    blob.write_bytes(comfy.core("generate.paths").NANO_MODEL.read_bytes())
    (comfy.folder / "models" / "diffusion_models" / "linked.safetensors").symlink_to(blob)
    loaded = comfy("LongCatModelLoader", model_name="linked.safetensors", weight_dtype="fp32")
    assert torch.equal(sample(empty), sample(empty, loaded))


def test_dtypes(comfy):
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        loaded = comfy("LongCatModelLoader", model_name=MODEL, weight_dtype=name)
        assert {p.dtype for p in loaded.model.diffusion_model.parameters()} == {dtype}


def test_bf16_weights_and_activations(comfy, sample, empty, monkeypatch):
    """Layers that do not cast, the usual case on a GPU: none meets an input of a dtype that it does not take."""
    from comfy import model_management, ops

    monkeypatch.setattr(model_management, "unet_manual_cast", lambda *args, **kwargs: None)
    loaded = comfy("LongCatModelLoader", model_name=MODEL, weight_dtype="bf16")
    assert isinstance(loaded.model.diffusion_model.blocks[0].attn.qkv, ops.disable_weight_init.Linear)
    assert not loaded.model.diffusion_model.blocks[0].attn.qkv.comfy_cast_weights
    seen = []
    network = loaded.model.diffusion_model
    hook = network.blocks[0].attn.qkv.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    out = sample(empty, loaded)
    hook.remove()
    assert set(seen) == {torch.bfloat16} and network.dtype == torch.bfloat16
    plain = sample(empty)
    assert (plain - out).abs().mean() < plain.std()


# --- detection -------------------------------------------------------------------------------------------------------


def shell(*names: str, **shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shapes.get(name.replace(".", "_"), (8, 8)), device="meta") for name in names}


FOREIGN = {
    "PixArt": shell(
        "x_embedder.proj.weight",
        "t_embedder.mlp.0.weight",
        "blocks.0.attn.qkv.weight",
        "blocks.0.cross_attn.kv_linear.weight",
        "blocks.0.mlp.fc1.weight",
        x_embedder_proj_weight=(8, 4, 2, 2),
    ),
    "LongCat-Image": shell(
        "x_embedder.weight",
        "context_embedder.weight",
        "transformer_blocks.0.attn.to_q.weight",
        "single_transformer_blocks.0.proj_mlp.weight",
    ),
    "Wan": shell(
        "patch_embedding.weight",
        "blocks.0.self_attn.q.weight",
        "blocks.0.ffn.0.weight",
        "head.modulation",
        patch_embedding_weight=(8, 16, 1, 2, 2),
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_models_are_not_answered_for(comfy, name):
    assert comfy.node("registration").detect(FOREIGN[name]) is None


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_official_files_are_answered_for(comfy, nano, prefix):
    found = comfy.node("registration").detect({prefix + key: value for key, value in nano.items()}, prefix)
    assert found["image_model"] == "longcat_video" and found["patch_size"] == (1, 2, 2)


def test_registering_again_replaces(comfy):
    from comfy import model_detection, supported_models

    bridge = comfy.node("registration")
    before = model_detection.detect_unet_config.longcat_wraps
    bridge.register()
    assert model_detection.detect_unet_config.longcat_wraps is before
    assert sum(m.__name__ == "LongCatConfig" for m in supported_models.models) == 1


# --- wrong files -----------------------------------------------------------------------------------------------------


def test_another_models_file_is_named(comfy):
    name = comfy.save(
        "diffusion_models", "wan.safetensors", {k: torch.zeros(v.shape) for k, v in FOREIGN["Wan"].items()}
    )
    with pytest.raises(ValueError, match=r"wan.safetensors holds Wan, not a LongCat-Video transformer"):
        comfy("LongCatModelLoader", model_name=name, weight_dtype="default")


@pytest.mark.parametrize("loader, widget", [("LongCatModelLoader", "model_name"), ("UNETLoader", "unet_name")])
def test_a_missing_tensor_is_named(comfy, nano, loader, widget):
    tensors = {key: value for key, value in nano.items() if key != "blocks.1.ffn.w3.weight"}
    name = comfy.save("diffusion_models", f"hole_{loader}.safetensors", tensors)
    with pytest.raises(ValueError, match=r"lacks: blocks.1.ffn.w3.weight; download it again"):
        comfy(loader, **{widget: name}, weight_dtype="default")


def test_a_wrongly_shaped_tensor_is_named(comfy, nano):
    tensors = nano | {"blocks.1.attn.proj.weight": torch.zeros(8, 8)}
    name = comfy.save("diffusion_models", "bent.safetensors", tensors)
    with pytest.raises(ValueError, match=r"blocks.1.attn.proj.weight has shape \[8, 8\], the network wants"):
        comfy("LongCatModelLoader", model_name=name, weight_dtype="default")


@pytest.mark.parametrize("name", ["missing.safetensors", "../loras/secret.safetensors", "/etc/hostname"])
def test_names_outside_the_folders_are_refused(comfy, name):
    comfy.save("loras", "secret.safetensors", {"a": torch.zeros(1)})
    with pytest.raises(ValueError, match="is not in ComfyUI's diffusion_models folders"):
        comfy("LongCatModelLoader", model_name=name, weight_dtype="default")


def test_a_truncated_file_is_named(comfy):
    path = comfy.folder / "models" / "diffusion_models" / "cut.safetensors"
    path.write_bytes(comfy.core("generate.paths").NANO_MODEL.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"cut.safetensors is truncated.*download it again"):
        comfy("LongCatModelLoader", model_name=path.name, weight_dtype="default")


def test_text_encoders_of_other_kinds_are_named(comfy):
    name = comfy.save("text_encoders", "clip.safetensors", {"text_model.embeddings.weight": torch.zeros(4, 4)})
    with pytest.raises(ValueError, match=r"clip.safetensors is not a UMT5 encoder.* choose umt5_xxl"):
        comfy("LongCatTextEncoderLoader", text_encoder_name=name, device="default")


def test_a_text_encoder_without_vocabulary_is_named(comfy):
    from safetensors.torch import load_file

    tensors = load_file(comfy.core("generate.paths").NANO_TEXT_ENCODER)
    tensors.pop("spiece_model")
    name = comfy.save("text_encoders", "mute.safetensors", tensors)
    with pytest.raises(ValueError, match=r"mute.safetensors carries no SentencePiece model"):
        comfy("LongCatTextEncoderLoader", text_encoder_name=name, device="default")


# --- text encoder ----------------------------------------------------------------------------------------------------


def test_text_encoder_equals_the_headless_one(prompts, headless):
    ours, theirs = prompts["positive"][0][0], headless["prompt"]
    assert ours.shape == theirs.shape
    assert torch.equal((ours != 0).any(-1), (theirs != 0).any(-1)), "the same tokens, the same padding"
    assert (ours - theirs).abs().max() <= 1e-4


def vocabulary_of(comfy) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(comfy.core("generate.paths").NANO_TEXT_ENCODER)["spiece_model"]


def test_a_vocabulary_larger_than_the_embedding_is_named(comfy):
    from safetensors.torch import load_file

    state = load_file(comfy.core("generate.paths").NANO_TEXT_ENCODER)
    state["shared.weight"] = state["shared.weight"][:64].clone()
    name = comfy.save("text_encoders", "few.safetensors", state)
    with pytest.raises(ValueError, match=r"384 pieces, the embedding of .*few.safetensors has 64 rows"):
        comfy("LongCatTextEncoderLoader", text_encoder_name=name, device="default")


BLOCK = "encoder.block.0.layer"
XXL = {
    "shared": (384, 4096),
    "encoder.final_layer_norm": (4096,),
    f"{BLOCK}.0.layer_norm": (4096,),
    f"{BLOCK}.0.SelfAttention.relative_attention_bias": (32, 2),
    **{f"{BLOCK}.0.SelfAttention.{name}": (4, 4096) for name in "qkv"},
    f"{BLOCK}.0.SelfAttention.o": (4096, 4),
    f"{BLOCK}.1.layer_norm": (4096,),
    f"{BLOCK}.1.DenseReluDense.wi_0": (2, 4096),
    f"{BLOCK}.1.DenseReluDense.wi_1": (2, 4096),
    f"{BLOCK}.1.DenseReluDense.wo": (4096, 2),
}


def save_xxl(comfy, prefix: str) -> str:
    tensors = {f"{prefix}{name}.weight": torch.ones(shape) for name, shape in XXL.items()}
    return comfy.save("text_encoders", f"{prefix}xxl.safetensors", tensors | {"spiece_model": vocabulary_of(comfy)})


def test_xxl_goes_to_comfyuis_own_loader(comfy, monkeypatch):
    from comfy import sd

    name = save_xxl(comfy, "")
    monkeypatch.setattr(sd, "load_clip", lambda paths, folders, kind, options: (paths, kind, options))
    paths, kind, options = comfy("LongCatTextEncoderLoader", text_encoder_name=name, device="cpu")
    assert paths[0].endswith(name) and kind == sd.CLIPType.WAN and options["load_device"].type == "cpu"


def test_xxl_under_a_prefix_goes_there_by_the_names_that_comfyui_knows(comfy, clip, monkeypatch):
    from comfy import sd

    given = []
    monkeypatch.setattr(sd, "load_text_encoder_state_dicts", lambda states, *rest: given.extend((states, rest)) or clip)
    monkeypatch.setattr(clip.patcher, "cached_patcher_init", None)
    name = save_xxl(comfy, "text_encoder.")
    assert comfy("LongCatTextEncoderLoader", text_encoder_name=name, device="default") is clip
    (state,), (_, kind, _) = given
    assert kind == sd.CLIPType.WAN
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        **{f"{name}.weight": shape for name, shape in XXL.items()},
        "spiece_model": tuple(vocabulary_of(comfy).shape),
    }


WAN = (
    ("encoder.final_layer_norm", "norm"), ("shared", "token_embedding"), ("encoder.block.", "blocks."),
    ("layer.0.SelfAttention.relative_attention_bias", "pos_embedding.embedding"), ("layer.0.SelfAttention", "attn"),
    ("layer.0.layer_norm", "norm1"), ("layer.1.layer_norm", "norm2"), ("layer.1.DenseReluDense.wi_0", "ffn.gate.0"),
    ("layer.1.DenseReluDense.wi_1", "ffn.fc1"), ("layer.1.DenseReluDense.wo", "ffn.fc2"),
)  # fmt: skip


@pytest.mark.parametrize("form", ["wan", "prefix", "int8"])
def test_text_encoders_in_forms_that_comfyui_does_not_know(comfy, prompts, form):
    from safetensors.torch import load_file

    state = load_file(comfy.core("generate.paths").NANO_TEXT_ENCODER)
    vocabulary = {"spiece_model": state.pop("spiece_model")}
    for theirs, ours in WAN if form == "wan" else ():
        state = {name.replace(theirs, ours): tensor for name, tensor in state.items()}
    if form == "prefix":
        state = {f"text_encoder.{name}": tensor for name, tensor in state.items()}
    if form == "int8":
        for name in [name for name in state if name.endswith((".q.weight", ".wo.weight"))]:
            weight = state.pop(name).float()
            scale = weight.abs().amax(1) / 127
            state |= {f"{name}_int8": (weight / scale[:, None]).round().to(torch.int8), f"{name}_scale": scale}
    name = comfy.save("text_encoders", f"{form}.safetensors", state | vocabulary)
    clip = comfy("LongCatTextEncoderLoader", text_encoder_name=name, device="default")
    found = comfy("CLIPTextEncode", clip=clip, text=cases.PROMPT)[0][0]
    error = (found - prompts["positive"][0][0]).abs().max()
    assert error < 0.1 if form == "int8" else error == 0
    load, arguments = clip.patcher.cached_patcher_init
    assert type(load(*arguments)) is type(clip.patcher)


def test_text_encoder_on_the_cpu(comfy, clip):
    on_cpu = comfy("LongCatTextEncoderLoader", text_encoder_name=TEXT_ENCODER, device="cpu")
    assert on_cpu.patcher.load_device == torch.device("cpu")
    load, arguments = clip.patcher.cached_patcher_init
    assert type(load(*arguments)) is type(clip.patcher)
