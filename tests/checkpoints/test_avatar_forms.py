"""Every form of LongCat-Video-Avatar that is found in the wild gives the golden model; other talking models do not."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longcat_core.checkpoints.convert import convert
from longcat_core.checkpoints.load import load_transformer, open_checkpoint
from longcat_core.checkpoints.lora import merge_lora
from longcat_core.errors import CheckpointError
from longcat_core.files.safetensors_io import read_tensors, write_safetensors
from longcat_core.generate.opened import OpenedModel
from longcat_core.generate.paths import ModelPaths
from longcat_core.model.config import AudioConfig, ModelConfig

from .written_forms import State, comfyui, fp8_scaled, multiplied_out, write_gguf

DATA = Path(__file__).parents[1] / "data" / "golden-avatar"
VERSIONS = ("v1_0", "v1_5")
CONFIGS = {version: ModelConfig.from_json(DATA / version / "config.json") for version in VERSIONS}


def comfyui_with_official_audio(state: State) -> State:
    """As some GGUF files have it."""
    return {name.replace("multitalk_audio_proj", "audio_proj"): tensor for name, tensor in comfyui(state).items()}


NAMES = {"official": dict, "comfyui": comfyui, "audio_proj": comfyui_with_official_audio}


@pytest.fixture(scope="module", params=VERSIONS)
def version(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def state(version) -> State:
    return read_tensors(DATA / version / "dit.safetensors")


@pytest.fixture(scope="module")
def wanted(version) -> State:
    return load_transformer(DATA / version / "dit.safetensors", config=CONFIGS[version]).state_dict()


def saved(folder: Path, state: State, name: str = "x.safetensors") -> Path:
    write_safetensors(folder / name, state)
    return folder / name


def assert_same(given: State, wanted: State) -> None:
    assert given.keys() == wanted.keys()
    assert all(torch.equal(given[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("form", NAMES)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_names_in_fp32_are_exact(tmp_path, version, state, wanted, form, prefix):
    path = saved(tmp_path, {prefix + name: tensor for name, tensor in NAMES[form](state).items()})
    checkpoint = open_checkpoint(path, CONFIGS[version])
    assert checkpoint.config == CONFIGS[version] and "Avatar" in checkpoint.form.model
    assert_same(load_transformer(checkpoint).state_dict(), wanted)


@pytest.mark.parametrize("form", NAMES)
def test_names_in_bf16_are_exact(tmp_path, version, state, wanted, form):
    path = saved(tmp_path, {name: tensor.bfloat16() for name, tensor in NAMES[form](state).items()})
    loaded = load_transformer(path, config=CONFIGS[version]).state_dict()
    assert_same(loaded, {name: value.bfloat16().float() for name, value in wanted.items()})


@pytest.mark.parametrize("form", NAMES)
def test_fp8_weights_are_their_numbers_times_their_scales(tmp_path, version, state, form):
    small = fp8_scaled(NAMES[form](state))
    assert small["blocks.0.audio_cross_attn.q_linear.weight"].dtype == torch.float8_e4m3fn
    given = load_transformer(saved(tmp_path, small), config=CONFIGS[version])
    wide = load_transformer(saved(tmp_path, multiplied_out(small), "wide.safetensors"), config=CONFIGS[version])
    assert_same(given.state_dict(), wide.state_dict())


@pytest.mark.parametrize("form", NAMES)
def test_gguf(tmp_path, version, state, wanted, form):
    pytest.importorskip("gguf")
    named = NAMES[form](state)
    kinds = {n: "Q8_0" for n, t in named.items() if t.ndim == 2 and t.shape[1] % 32 == 0 and "attn" in n}
    write_gguf(tmp_path / "x.gguf", named, kinds, flat_patches=form != "official")
    given = load_transformer(tmp_path / "x.gguf", config=CONFIGS[version]).state_dict()
    assert given.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (given[name] - value).abs().max() <= value.abs().max() / 120, name


@pytest.mark.parametrize("config", [True, False], ids=["its config", "a config without audio"])
def test_a_folder_of_shards(tmp_path, version, state, wanted, config):
    """The config of 1.0 was not seen and may say nothing of audio; what the weights show is taken from them."""
    halves = sorted(state)[::2], sorted(state)[1::2]
    for i, names in enumerate(halves, 1):
        saved(tmp_path, {n: state[n] for n in names}, f"diffusion_pytorch_model-0000{i}-of-00002.safetensors")
    values = json.loads((DATA / version / "config.json").read_text())
    if config:
        values |= {"intermediate_dim": 7, "context_tokens": 9}
    else:
        values = {name: value for name, value in values.items() if not name.startswith(("audio", "class", "context"))}
    (tmp_path / "config.json").write_text(json.dumps(values))
    if config or version == "v1_5":
        model = load_transformer(tmp_path)
        assert_same(model.state_dict(), wanted)
        assert model.config.audio == CONFIGS[version].audio
    else:
        with pytest.raises(CheckpointError, match="shapes that no avatar has"):
            # A tiny 1.0 hears channels that no wav2vec2 has.
            load_transformer(tmp_path)


@pytest.mark.parametrize(
    ("name", "groups", "channels"), [("v1_0", 12, 768), ("v1_5", 5, 1280), ("v1_5", 5, 256), ("v1_5", 5, 768)]
)
def test_the_version_is_read_from_the_columns(tmp_path, name, groups, channels):
    state = read_tensors(DATA / name / "dit.safetensors")
    for module, entries in (("proj1", 5), ("proj1_vf", 8)):
        state[f"audio_proj.{module}.weight"] = torch.zeros(32, entries * groups * channels)
    audio = open_checkpoint(saved(tmp_path, state)).config.audio
    assert audio == AudioConfig(groups=groups, channels=channels, hidden=32, width=40, tokens=6)


def test_the_optional_norm_is_seen(tmp_path):
    state = read_tensors(DATA / "v1_0" / "dit.safetensors")
    found = read_tensors(DATA / "v1_0" / "forward.safetensors")
    norms = {name.removeprefix("prenorm."): t for name, t in found.items() if name.startswith("prenorm.blocks")}
    model = load_transformer(saved(tmp_path, state | norms), config=CONFIGS["v1_0"])
    assert model.config.audio is not None and model.config.audio.prenorm
    assert torch.equal(model.blocks[1].audio_attn.source_norm.bias, norms["blocks.1.pre_audio_crs_attn_norm.bias"])


@pytest.mark.parametrize("to", ["bf16", "comfyui-fp8", "int8"])
def test_converted(tmp_path, version, to):
    source = tmp_path / "avatar"
    source.mkdir()
    for name in ("dit.safetensors", "config.json"):
        shutil.copy(DATA / version / name, source)
    errors = convert(source, tmp_path / "new.safetensors", to)
    assert open_checkpoint(tmp_path / "new.safetensors").config == CONFIGS[version]
    assert 0 < max(error.relative for error in errors) < (0.005 if to == "bf16" else 0.05)
    names = read_tensors(tmp_path / "new.safetensors")
    stored = {"bf16": "audio_proj.proj1.weight", "int8": "audio_proj.proj1.weight_int8"}
    assert stored.get(to, "multitalk_audio_proj.proj1.weight") in names


@pytest.mark.parametrize("form", ["official", "plain"])
def test_the_distilled_lora_in_both_forms(tmp_path, version, form):
    lora = DATA / version / "lora.safetensors"
    tensors = read_tensors(lora)
    if form == "plain":
        # One layer at a time, as other programs write it.
        made: dict[str, Tensor] = {}
        for name in {key.rpartition(".lora_down")[0] for key in tensors if ".lora_down." in key}:
            module = name.removeprefix("lora___lorahyphen___").replace("___lorahyphen___", ".")
            down, scale = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.alpha_scale"]
            ups = [t for k, t in sorted(tensors.items()) if k.startswith(f"{name}.lora_up.")]
            ups = [torch.block_diag(*ups) if len(ups) > 1 else ups[0]]
            made[f"diffusion_model.{module}.lora_A.weight"] = down
            made[f"diffusion_model.{module}.lora_B.weight"] = ups[0]
            made[f"diffusion_model.{module}.alpha"] = scale * len(down)
        tensors = made
    models = [load_transformer(DATA / version / "dit.safetensors", config=CONFIGS[version]) for _ in range(2)]
    merge_lora(models[0], lora)
    merge_lora(models[1], saved(tmp_path, tensors, "lora.safetensors"))
    for (name, one), (_, two) in zip(models[0].state_dict().items(), models[1].state_dict().items(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5, msg=name)


AUDIO_LORAS = {
    "official": "blocks.1.{}.",
    "comfyui": "diffusion_model.blocks.1.{}.",
    "kohya": "lora_unet_blocks_1_{}.",
}
AUDIO_LAYERS = ("audio_cross_attn.q_linear", "audio_cross_attn.kv_linear", "audio_cross_attn.proj",
                "audio_adaLN_modulation.1")  # fmt: skip


def audio_lora(form: str, state: State) -> State:
    """A LoRA of audio layers of the second block."""
    lora, generator = {}, torch.Generator().manual_seed(0)
    for layer in AUDIO_LAYERS:
        rows, columns = state[f"blocks.1.{layer}.weight"].shape
        name = layer.replace("audio_adaLN_modulation", "audio_modulation") if form == "comfyui" else layer
        name = AUDIO_LORAS[form].format(name.replace(".", "_") if form == "kohya" else name)
        lora[f"{name}lora_down.weight"] = torch.randn(2, columns, generator=generator)
        lora[f"{name}lora_up.weight"] = torch.randn(rows, 2, generator=generator)
    return lora


@pytest.mark.parametrize("form", AUDIO_LORAS)
def test_a_lora_of_audio_layers(tmp_path, version, state, wanted, form):
    lora = audio_lora(form, state)
    model = load_transformer(DATA / version / "dit.safetensors", config=CONFIGS[version])
    path = saved(tmp_path, lora, "lora.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_lora(model, path)
    ups, downs = ([t for name, t in lora.items() if part in name] for part in ("lora_up", "lora_down"))
    layers = "audio_attn.q", "audio_attn.kv", "audio_attn.proj", "audio_modulation"
    for layer, up, down in zip(layers, ups, downs, strict=True):
        name = f"blocks.1.{layer}.weight"
        torch.testing.assert_close(model.get_parameter(name), wanted[name] + up @ down)
    base = load_transformer(DATA.parent / "golden" / "dit.safetensors")
    with pytest.raises(CheckpointError, match="matches nothing in LongCat-Video: 0 of its 4 modules"):
        merge_lora(base, path)


def test_a_missing_tensor_is_named(tmp_path, version, state):
    for name in ("audio_proj.proj1_vf.weight", "blocks.1.audio_cross_attn.kv_linear.bias", "x_embedder.proj.bias"):
        left = {key: tensor for key, tensor in state.items() if key != name}
        with pytest.raises(CheckpointError, match=f"lacks.*{name}"):
            load_transformer(saved(tmp_path, left), config=CONFIGS[version])


def test_other_talking_models_are_refused_by_name(tmp_path, state):
    audio = {name: tensor for name, tensor in comfyui(state).items() if "audio" in name or "norm_x" in name}
    wan = {name: torch.zeros(2) for name in ("patch_embedding.weight", "blocks.0.self_attn.q.weight",
           "blocks.0.ffn.0.weight", "blocks.0.ffn.2.weight", "head.head.weight", "time_embedding.0.bias")}  # fmt: skip
    for other in (wan | audio, audio, {f"model.diffusion_model.{name}": t for name, t in (wan | audio).items()}):
        with pytest.raises(CheckpointError, match="holds InfiniteTalk, MultiTalk or SkyReels, not a LongCat-Video"):
            load_transformer(saved(tmp_path, other))


def test_videos_without_audio_refuse_an_avatar(tmp_path, version):
    for name in ("dit.safetensors", "config.json"):
        shutil.copy(DATA / version / name, tmp_path)
    opened = OpenedModel(replace(ModelPaths(), model=tmp_path))
    with pytest.raises(CheckpointError, match="holds LongCat-Video-Avatar, not a LongCat-Video transformer"):
        _ = opened.checkpoint
