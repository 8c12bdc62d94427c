"""Transformer checkpoints: every form gives the same network, and what does not fit is named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longcat_core.checkpoints import reader
from longcat_core.checkpoints.formats import OFFICIAL, detect
from longcat_core.checkpoints.load import (
    load_transformer,
    official_state,
    open_checkpoint,
    read_parameter,
)
from longcat_core.checkpoints.stored import Part
from longcat_core.errors import CheckpointError, LongCatError
from longcat_core.files.safetensors_io import read_tensors, write_safetensors
from longcat_core.model.config import ModelConfig

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
CONFIG = ModelConfig.from_json(GOLDEN / "config.json")
SHARDS = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
INDEX = "diffusion_pytorch_model.safetensors.index.json"

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    return read_tensors(GOLDEN / "dit.safetensors")


@pytest.fixture(scope="module")
def wanted() -> State:
    return load_transformer(GOLDEN / "dit.safetensors", config=CONFIG).state_dict()


@pytest.fixture
def folder(tmp_path: Path, state: State) -> Path:
    """The official folder form: dit/config.json, two shards and their index."""
    dit = tmp_path / "LongCat-Video" / "dit"
    dit.mkdir(parents=True)
    shutil.copy(GOLDEN / "config.json", dit)
    names = sorted(state)
    parts = names[: len(names) // 2], names[len(names) // 2 :]
    weight_map = {}
    for shard, part in zip(SHARDS, parts, strict=True):
        write_safetensors(dit / shard, {name: state[name] for name in part})
        weight_map |= dict.fromkeys(part, shard)
    (dit / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    return dit


def assert_same(model: torch.nn.Module, wanted: State) -> None:
    given = model.state_dict()
    assert given.keys() == wanted.keys()
    assert all(torch.equal(given[name], value) for name, value in wanted.items())


# Forms


def test_one_parameter_is_read_again(folder, wanted):
    checkpoint = open_checkpoint(folder)
    for name in ("blocks.0.ffn.gate_up.weight", "blocks.1.attn.qkv.bias", "patch_embed.weight"):
        assert torch.equal(read_parameter(checkpoint, name), wanted[name])
    (folder / SHARDS[0]).unlink()
    with pytest.raises(CheckpointError, match=r"cannot be read again.*put the file back"):
        read_parameter(checkpoint, "blocks.0.ffn.gate_up.weight")


def test_single_file(state, wanted):
    model = load_transformer(GOLDEN / "dit.safetensors")
    assert_same(model, wanted)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert model.dtype == torch.float32
    assert torch.equal(model.blocks[1].attn.qkv.weight, state["blocks.1.attn.qkv.weight"])
    gate_up = torch.cat([state[f"blocks.0.ffn.w{i}.weight"] for i in (1, 3)])
    assert torch.equal(model.blocks[0].ffn.gate_up.weight, gate_up)


def test_official_folder_by_either_name(folder, wanted):
    for path in (folder, folder.parent, str(folder)):
        assert_same(load_transformer(path), wanted)


def test_shards_without_an_index(folder, wanted):
    (folder / INDEX).unlink()
    assert_same(load_transformer(folder), wanted)


def test_files_that_the_index_does_not_name_are_left_alone(folder, wanted):
    write_safetensors(folder / "other.safetensors", {"other.weight": torch.ones(2)})
    assert_same(load_transformer(folder), wanted)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "transformer."])
def test_prefixes_are_removed_and_other_tensors_ignored(tmp_path, state, wanted, prefix):
    file = tmp_path / "prefixed.safetensors"
    write_safetensors(file, {prefix + k: v for k, v in state.items()} | {"first_stage_model.x": torch.ones(2)})
    assert_same(load_transformer(file), wanted)
    assert open_checkpoint(file).prefix == prefix


def test_the_config_is_inferred_from_shapes(tmp_path):
    shutil.copy(GOLDEN / "dit.safetensors", tmp_path)
    assert open_checkpoint(tmp_path / "dit.safetensors").config == CONFIG
    assert open_checkpoint(GOLDEN / "dit_int8.safetensors").config == CONFIG


def test_config_json_takes_precedence_over_shapes(folder):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"text_tokens_zero_pad": False}))
    assert not load_transformer(folder).config.text_tokens_zero_pad


@pytest.mark.parametrize("flag", [True, False])
def test_metadata_adds_what_shapes_do_not_show(tmp_path, state, flag):
    file = tmp_path / "one.safetensors"
    write_safetensors(file, state, {"config": json.dumps({"text_tokens_zero_pad": flag})})
    assert open_checkpoint(file).config.text_tokens_zero_pad is flag


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 9000, '{"text_tokens_zero_pad": "false"}'])
def test_unreadable_metadata_is_named(tmp_path, state, text):
    file = tmp_path / "one.safetensors"
    write_safetensors(file, state, {"config": text})
    with pytest.raises(CheckpointError, match=r"one\.safetensors has unreadable config metadata"):
        load_transformer(file)


def test_int8_weights_are_scaled_by_row(state, wanted):
    stored = read_tensors(GOLDEN / "dit_int8.safetensors")
    model = load_transformer(GOLDEN / "dit_int8.safetensors", config=CONFIG)
    name = "blocks.1.cross_attn.kv_linear.weight"
    expected = stored[f"{name}_int8"].float() * stored[f"{name}_scale"][:, None]
    assert torch.equal(model.blocks[1].cross_attn.kv.weight, expected)
    assert torch.equal(model.final_layer.linear.weight, state["final_layer.linear.weight"])
    for key, value in model.state_dict().items():
        # Half a step of 127 per row, of the largest weight.
        assert (value - wanted[key]).abs().max() <= wanted[key].abs().max() / 250


def test_weights_are_cast(wanted):
    model = load_transformer(GOLDEN / "dit.safetensors", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert_same(model, {name: value.bfloat16() for name, value in wanted.items()})


def test_loaded_weights_do_not_depend_on_the_file(tmp_path, wanted):
    file = Path(shutil.copy(GOLDEN / "dit.safetensors", tmp_path))
    model = load_transformer(file)
    file.write_bytes(b"\0" * file.stat().st_size)
    assert_same(model, wanted)


def test_official_names_round_trip(tmp_path, state):
    written = official_state(load_transformer(GOLDEN / "dit.safetensors"), OFFICIAL)
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], value) for name, value in state.items())
    write_safetensors(tmp_path / "again.safetensors", written)
    assert_same(
        load_transformer(tmp_path / "again.safetensors"), load_transformer(GOLDEN / "dit.safetensors").state_dict()
    )


# What does not fit


def without(*names: str) -> Callable[[State], State]:
    return lambda state: {k: v for k, v in state.items() if k not in names}


def with_shape(name: str, *shape: int) -> Callable[[State], State]:
    return lambda state: state | {name: torch.zeros(shape)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("blocks.1.ffn.w3.weight"), ("lacks", "blocks.1.ffn.w3.weight", "download")),
        (without("x_embedder.proj.weight"), ("x_embedder.proj.weight",)),
        (without("blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias"), ("lacks", "blocks.0.attn.qkv.weight", "bias")),
        (with_shape("blocks.2.extra.weight", 2), ("blocks.2",)),
        (with_shape("blocks.0.attn.extra.weight", 2), ("unknown tensors", "blocks.0.attn.extra.weight")),
        (with_shape("blocks.0.attn.proj.weight", 64, 63), ("blocks.0.attn.proj.weight", "[64, 63]", "[64, 64]")),
        (with_shape("blocks.1.ffn.w1.weight", 255, 64), ("blocks.1.ffn.w1.weight", "[255, 64]", "[256, 64]")),
        (with_shape("blocks.1.cross_attn.q_norm.weight"), ("blocks.1.cross_attn.q_norm.weight", "[]", "[32]")),
        (with_shape("y_embedder.y_proj.0.bias", 1), ("y_embedder.y_proj.0.bias", "[1]", "[64]")),
    ],
)
def test_missing_extra_and_misshapen_tensors_are_named(tmp_path, state, change, said):
    file = tmp_path / "bad.safetensors"
    write_safetensors(file, change(state))
    with pytest.raises(CheckpointError) as caught:
        load_transformer(file)
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in ("bad.safetensors", *said)), message


def test_a_config_of_another_model_is_recognized(folder):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"caption_channels": 40}))
    with pytest.raises(
        CheckpointError, match=r"y_proj\.0\.weight has shape \[64, 48\].*wants \[64, 40\].*config\.json"
    ):
        load_transformer(folder)


def test_many_faults_are_counted(tmp_path, state):
    file = tmp_path / "bad.safetensors"
    lost = [name for name in state if name.startswith("blocks.1.") and name != "blocks.1.attn.proj.bias"]
    write_safetensors(file, without(*lost)(state))
    with pytest.raises(CheckpointError, match=rf"blocks\.1\.adaLN_modulation.* and {len(lost) - 3} more; download"):
        load_transformer(file)


def test_a_quantized_weight_without_its_scale(tmp_path):
    tensors = read_tensors(GOLDEN / "dit_int8.safetensors")
    del tensors["blocks.0.ffn.w2.weight_scale"]
    file = tmp_path / "bad.safetensors"
    write_safetensors(file, tensors)
    with pytest.raises(CheckpointError, match=r"lacks: blocks\.0\.ffn\.w2\.weight_scale"):
        load_transformer(file)


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_truncated_files(tmp_path, kept):
    content = (GOLDEN / "dit.safetensors").read_bytes()
    file = tmp_path / "short.safetensors"
    file.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(CheckpointError, match=r"short\.safetensors is (empty|truncated).*download it again"):
        load_transformer(file)


def test_a_truncated_shard_is_named(folder):
    shard = folder / SHARDS[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"{SHARDS[1]} is truncated"):
        load_transformer(folder)


def change_index(folder: Path, change: Callable[[dict], dict]) -> None:
    (folder / INDEX).write_text(json.dumps(change(json.loads((folder / INDEX).read_text()))))


def test_bad_indices(folder):
    (folder / SHARDS[1]).rename(folder / "elsewhere.bin")
    with pytest.raises(CheckpointError, match=f"names {SHARDS[1]}, which is missing"):
        load_transformer(folder)
    change_index(folder, lambda index: {"weight_map": dict.fromkeys(index["weight_map"], "../../secret.safetensors")})
    with pytest.raises(CheckpointError, match=r"'\.\./\.\./secret\.safetensors' outside its folder"):
        load_transformer(folder)
    for text in ("{", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}'):
        (folder / INDEX).write_text(text)
        with pytest.raises(CheckpointError, match=INDEX):
            load_transformer(folder)
    (folder / f"b.{INDEX}").write_text("{}")
    with pytest.raises(CheckpointError, match="2 index files"):
        load_transformer(folder)


def test_a_tensor_in_two_shards(folder):
    (folder / INDEX).unlink()
    shutil.copy(folder / SHARDS[0], folder / "copy.safetensors")
    with pytest.raises(CheckpointError, match=r"is in both copy\.safetensors and"):
        load_transformer(folder)


def test_bad_paths(tmp_path):
    with pytest.raises(CheckpointError, match="nothing does not exist; give"):
        load_transformer(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"holds no \.safetensors file; give"):
        load_transformer(tmp_path)


def test_bad_config_files(folder):
    sizes = ("wide", None, 0, 63, float("inf"))
    texts = [json.dumps({"hidden_size": size, "num_heads": 2}) for size in sizes]
    patches = [json.dumps({"patch_size": patch}) for patch in (2, [], [1, 2], [1, 2, "2"], [2, 2, 2])]
    for text in ("{", "[]", '{"mlp_ratio": null}', *texts, *patches):
        (folder / "config.json").write_text(text)
        with pytest.raises(LongCatError, match="config"):
            load_transformer(folder)


# Other models


WAN = ("patch_embedding.weight", "blocks.0.self_attn.q.weight", "blocks.0.ffn.0.weight", "head.head.weight")
PIXART = (
    "x_embedder.proj.weight",
    "t_embedder.mlp.0.weight",
    "blocks.0.attn.qkv.weight",
    "blocks.0.cross_attn.kv_linear.weight",
    "blocks.0.mlp.fc1.weight",
)
FLUX = ("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight", "img_in.weight")
LONGCAT_IMAGE = (
    "x_embedder.weight",
    "transformer_blocks.0.attn.to_q.weight",
    "single_transformer_blocks.0.attn.to_q.weight",
)
LORA = ("lora___lorahyphen___blocks___lorahyphen___0___lorahyphen___attn___lorahyphen___qkv.lora_down.weight",)
VAE = ("encoder.conv_in.weight", "decoder.conv_in.weight", "quant_conv.weight")
UMT5 = ("shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight", "encoder.final_layer_norm.weight")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (WAN, "holds Wan, not"),
        (PIXART, "holds PixArt, not"),
        (("patch_embedding.weight", "blocks.0.attn1.to_q.weight", "blocks.0.ffn.net.0.proj.weight"), "holds Wan"),
        (FLUX, "FLUX"),
        (LONGCAT_IMAGE, "holds LongCat-Image"),
        (LORA, "holds LoRA"),
        (VAE, "holds VAE"),
        (UMT5, "holds UMT5 text encoder"),
        (("lora_unet_blocks_0_attn_qkv.lora_down.weight",), "holds LoRA"),
        (("blocks.0.self_attn.to_q.lora_A",), "holds LoRA"),
        (("model.layers.0.weight",), "not a known LongCat-Video checkpoint (it holds model.layers.0.weight)"),
        ((), "it holds no tensors"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_other_models_are_called_by_their_name(tmp_path, names, said, prefix):
    file = tmp_path / "other.safetensors"
    write_safetensors(file, {prefix + name: torch.zeros(2) for name in names})
    with pytest.raises(CheckpointError) as caught:
        load_transformer(file)
    message = str(caught.value)
    assert said.replace("holds model.", f"holds {prefix}model.") in message, message
    assert "other.safetensors" in message and "give the dit folder of LongCat-Video" in message


@pytest.mark.parametrize(("name", "what"), [("lora", "LoRA"), ("vae", "VAE")])
def test_golden_files_of_another_kind(name, what):
    with pytest.raises(CheckpointError, match=rf"{name}\.safetensors holds {what}, not a LongCat-Video transformer"):
        load_transformer(GOLDEN / f"{name}.safetensors")


def test_a_form_is_known_with_one_mark_missing(state):
    assert detect(state, "x") == (OFFICIAL, "")
    damaged = [name for name in state if not name.startswith("t_embedder.")]
    assert detect(damaged, "x") == (OFFICIAL, "")


# Names and configs that stand for more than there is


def beside(name: str) -> Callable[[State], State]:
    return lambda state: state | {name: torch.zeros(0)}


SETTING = torch.tensor(list(b'{"attention": "comfy_kitchen_int8"}'), dtype=torch.uint8)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_settings_that_comfyui_keeps_in_a_file_are_not_weights(tmp_path, state, prefix):
    """Those of its attention, and what newer versions may add."""
    names = ("blocks.0.attn.comfy_attention.config", "blocks.1.cross_attn.comfy_attention.config", "comfy_later.v2")
    file, plain = tmp_path / "settings.safetensors", tmp_path / "plain.safetensors"
    for path, extra in ((file, dict.fromkeys(names, SETTING)), (plain, {})):
        write_safetensors(path, {prefix + name: tensor for name, tensor in (state | extra).items()})
    found, wanted = (load_transformer(path).state_dict() for path in (file, plain))
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("blocks.0.attn.comfy_attention.config", SETTING.float()),
        ("blocks.0.attn.comfy_attention.config", SETTING[None]),
        ("blocks.0.attn.attention.config", SETTING),
    ],
)
def test_what_may_be_weights_is_not_taken_for_a_setting(tmp_path, state, name, tensor):
    write_safetensors(tmp_path / "bad.safetensors", state | {name: tensor})
    with pytest.raises(CheckpointError, match=f"holds unknown tensors: {name}"):
        load_transformer(tmp_path / "bad.safetensors")


@pytest.mark.parametrize("number", ["99999999", "9" * 5000, "x", "-1", "00", "٣"])
def test_a_block_of_any_number_is_an_unknown_tensor(tmp_path, state, number):
    file = tmp_path / "bad.safetensors"
    write_safetensors(file, beside(f"blocks.{number}.z")(state))
    with pytest.raises(CheckpointError, match=r"bad\.safetensors holds unknown tensors: blocks"):
        load_transformer(file)


def test_more_blocks_than_any_model_has(tmp_path, state):
    file = tmp_path / "bad.safetensors"
    write_safetensors(file, state | {f"blocks.{i}.z": torch.zeros(0) for i in range(2000)})
    with pytest.raises(CheckpointError, match="has 2000 blocks, more than any LongCat-Video transformer"):
        load_transformer(file)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_shape("x_embedder.proj.weight", 2048), r"x_embedder\.proj\.weight of shape \[2048\].* 5-dimensional"),
        (with_shape("x_embedder.proj.weight", 64, 16, 1, 2, 0), "shapes that no network has"),
        (with_shape("blocks.0.attn.q_norm.weight", 4, 8), r"q_norm\.weight of shape .* 1-dimensional"),
        (with_shape("blocks.0.attn.q_norm.weight", 0), "shapes that no network has"),
        (with_shape("t_embedder.mlp.0.weight"), r"t_embedder\.mlp\.0\.weight of shape \[\].* 2-dimensional"),
    ],
)
def test_shapes_from_which_no_network_follows(tmp_path, state, change, said):
    file = tmp_path / "bad.safetensors"
    write_safetensors(file, change(state))
    with pytest.raises(CheckpointError, match=said):
        load_transformer(file)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"depth": 10**9}, "depth is 1000000000; it must be a whole number from 1 to"),
        ({"depth": 200_000}, "has 2 blocks, its config 200000"),
        ({"hidden_size": 1 << 40}, "hidden_size"),
        ({"num_heads": True}, "num_heads is True"),
        ({"patch_size": [[1], 2, 2]}, "patch_size"),
        ({"patch_size": [1, 10**6, 10**6]}, "patch_size"),
        ({"text_tokens_zero_pad": "false"}, "text_tokens_zero_pad is 'false'"),
    ],
)
def test_config_values_of_any_kind(folder, values, said):
    given = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(given | values))
    with pytest.raises(CheckpointError, match=said) as caught:
        load_transformer(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"depth":' + b"9" * 5000 + b"}", b"\xff\xfe{}", b'{"mlp_ratio": NaN}']
)
def test_configs_that_are_not_json_objects(folder, content):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_transformer(folder)


def test_what_is_not_a_regular_file(folder, tmp_path):
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    os.mkfifo(tmp_path / "pipe.safetensors")
    for path in (folder, tmp_path / "pipe.safetensors", Path("/dev/zero")):
        with pytest.raises(CheckpointError, match="is a pipe or a device; give a regular file"):
            load_transformer(path)


def test_two_transformers_in_a_folder(folder):
    shutil.copytree(folder, folder.with_name("transformer"))
    with pytest.raises(CheckpointError, match="holds dit and transformer; give one of the two folders"):
        load_transformer(folder.parent)


def test_a_file_of_another_model_beside_prefixed_shards(tmp_path, state):
    write_safetensors(tmp_path / "a.safetensors", {f"model.diffusion_model.{name}": t for name, t in state.items()})
    write_safetensors(
        tmp_path / "lora.safetensors", {"diffusion_model.blocks.0.ffn.w1.lora_A.weight": torch.ones(2, 2)}
    )
    with pytest.raises(CheckpointError, match=r"lora\.safetensors holds nothing of"):
        load_transformer(tmp_path)


def test_parts_are_read_to_their_places(state, monkeypatch):
    """In pieces of a few rows, and without a copy; the others pass through buffers."""
    monkeypatch.setattr(reader, "PIECE", 100)
    read = reader.Reader(open_checkpoint(GOLDEN / "dit.safetensors", CONFIG))
    parts = [Part("blocks.0.ffn.w1.weight"), Part("blocks.0.ffn.w3.weight"), Part("blocks.1.attn.proj.bias")]
    there = torch.empty_like(state[parts[1].name])
    with read.ahead(parts, places={parts[1].name: there}):
        for part in parts:
            pieces = [(piece.data_ptr(), piece.clone()) for _, piece in read.pieces(part)]
            assert torch.equal(torch.cat([piece for _, piece in pieces]), state[part.name])
            assert len(pieces) > 3 or part.name.endswith("bias")
            inside = [there.data_ptr() <= at < there.data_ptr() + there.nbytes for at, _ in pieces]
            assert inside == [part is parts[1]] * len(pieces)
    assert torch.equal(there, state[parts[1].name])
