"""A LoRA counts by the alpha that its writer stored, in any place, and by no other file's; what counted is said."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longcat_core.checkpoints.load import load_transformer
from longcat_core.checkpoints.lora import LoraStack, merge_lora, open_loras
from longcat_core.errors import CheckpointError
from longcat_core.files.fingerprints import fingerprint
from longcat_core.files.safetensors_io import write_safetensors
from longcat_core.generate import pipeline

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
RANK = 4
MODULES = ("blocks.0.self_attn.o", "blocks.1.self_attn.o", "blocks.1.cross_attn.o")
SHAPES = {
    f"blocks.{i}.{name}.weight": torch.Size((64, 64)) for i in range(2) for name in ("attn.proj", "cross_attn.proj")
}


def tensors(prefix: str = "diffusion_model.", down: str = "lora_A", up: str = "lora_B", **more: Tensor) -> dict:
    draw = torch.Generator().manual_seed(0)
    found = {}
    for module in MODULES:
        found[f"{prefix}{module}.{down}.weight"] = torch.randn(RANK, 64, generator=draw)
        found[f"{prefix}{module}.{up}.weight"] = torch.randn(64, RANK, generator=draw)
        found |= {f"{prefix}{module}.{name}": tensor for name, tensor in more.items()}
    return found


def kohya(**more: Tensor) -> dict:
    return tensors("lora_unet_", "lora_down", "lora_up", **more)


def scales(path: Path) -> tuple[list[float], list[str]]:
    """The scale of every module, in order, and what was said."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loras = open_loras([(path, 1.0)])
        LoraStack(loras, SHAPES)
    found = [float(parts["alpha_scale"]) for parts in loras[0].layers.values()]
    return found, [str(warning.message) for warning in said]


def diffusers(**config: Any) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({f"transformer.{name}": value for name, value in config.items()})}


PLACES: dict[str, tuple[Mapping[str, Tensor], Mapping[str, str], list[float]]] = {
    "a tensor": (tensors(alpha=torch.tensor(8.0)), {}, [2, 2, 2]),
    "a tensor of one whole number": (tensors(alpha=torch.tensor([8])), {}, [2, 2, 2]),
    "FastVideo's tensor": (tensors(lora_alpha=torch.tensor(8.0)), {}, [2, 2, 2]),
    "diffusers' header": (tensors(), diffusers(r=4, lora_alpha=16, target_modules=["o"]), [4, 4, 4]),
    "diffusers' header with root": (tensors(), diffusers(r=4, lora_alpha=16, use_rslora=True), [8, 8, 8]),
    "diffusers' pattern of a name": (
        tensors(),
        diffusers(r=4, lora_alpha=4, alpha_pattern={"blocks.1.self_attn.o": 8}),
        [1, 2, 1],
    ),
    "diffusers' pattern of an end": (
        tensors(),
        diffusers(r=4, lora_alpha=4, alpha_pattern={"self_attn.o": 8}),
        [2, 2, 1],
    ),
    "diffusers' regular expression": (
        tensors(),
        diffusers(lora_alpha=4, alpha_pattern={r"blocks\.1\.(self|cross)_attn\.o": 8}),
        [1, 2, 2],
    ),
    "diffusers' ranks": (
        tensors(),
        diffusers(r=64, lora_alpha=16, rank_pattern={"self_attn.o": 4, "cross_attn.o": 4}),
        [4, 4, 4],
    ),
    "a text encoder beside it": (
        tensors(),
        {"lora_adapter_metadata": json.dumps({"text_encoder.lora_alpha": 2, "transformer.lora_alpha": 16})},
        [4, 4, 4],
    ),
    "parts as objects": (tensors(), {"lora_adapter_metadata": json.dumps({"dit": {"lora_alpha": 16}})}, [4, 4, 4]),
    "finetrainers' header": (tensors(), {"lora_config": json.dumps({"r": 4, "lora_alpha": 16})}, [4, 4, 4]),
    "kohya's header": (kohya(), {"ss_network_dim": "4", "ss_network_alpha": "2.0", "sshs_model_hash": "a"}, [0.5] * 3),
    "kohya's header, other names": (tensors(), {"ss_network_dim": "4", "ss_network_alpha": "16"}, [4, 4, 4]),
    "a plain number": (tensors(), {"rank": "4", "alpha": "16"}, [4, 4, 4]),
    "another plain number": (tensors(), {"networkAlpha": "2"}, [0.5, 0.5, 0.5]),
    "PEFT's name": (tensors(), {"lora_alpha": "16"}, [4, 4, 4]),
    **{f"PEFT's config under {key}": (tensors(), {key: json.dumps({"r": 4, "lora_alpha": 16})}, [4, 4, 4]) for key in (
        "adapter_config.json", "adapter_config", "peft_config", "config", "LoraConfig", "network", "a.b:c/d",
    )},
    "PEFT's config of text": (tensors(), {"config": '{"r": "4", "lora_alpha": " 16 ", "rank_pattern": null}'}, [4] * 3),
    "PEFT's config of fractions": (tensors(), {"config": '{"r": 4.0, "lora_alpha": 1.6e1}'}, [4, 4, 4]),
    "other words": (tensors(), {"lora": '{"rank": 4, "alpha": 16}'}, [4, 4, 4]),
    "alphas of modules": (
        tensors(),
        {"network_alphas": json.dumps({f"transformer.{module}.alpha": 8 + 4 * i for i, module in enumerate(MODULES)})},
        [2, 3, 4],
    ),
    "alphas of modules in another key": (tensors(), {"a": json.dumps({f"{MODULES[1]}.alpha": 8.0})}, [1, 2, 1]),
    "alphas of flat names": (tensors(), {"alphas": '{"lora_unet_blocks_1_self_attn_o": "8"}'}, [1, 2, 1]),
    "a key for each module": (tensors(), {f"{module}.alpha": "8" for module in MODULES}, [2, 2, 2]),
    "a list of one number": (tensors(), {"lora_alpha": "[ 16 ]"}, [4, 4, 4]),
    "a number as JSON text": (tensors(), {"lora_alpha": '"16"'}, [4, 4, 4]),
    "modelspec": (tensors(), {"modelspec.alpha": "16.0", "modelspec.title": "a"}, [4, 4, 4]),
    "kohya's arguments": (kohya(), {"ss_network_args": '{"network_alpha": "16", "conv_alpha": "1"}'}, [4, 4, 4]),
    "kohya's arguments, short": (kohya(), {"ss_network_args": '{"alpha": 16}', "ss_network_alpha": "None"}, [4, 4, 4]),
    "tags": (tensors(), {"ss_tag_frequency": '{"a": {"alpha": 8, "rank": 4}}', "modelspec.alpha": "None"}, [1, 1, 1]),
    "another release": (tensors(), {"version": "alpha", "rank": "64", "workflow": '{"1": {"inputs": {}}}'}, [1, 1, 1]),
    "nowhere": (tensors(), {"format": "pt"}, [1, 1, 1]),
    "kohya's word for several": (kohya(), {"ss_network_alpha": "Dynamic"}, [1, 1, 1]),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_alpha_is_found_where_writers_put_it_and_said(tmp_path, place):
    state, metadata, wanted = PLACES[place]
    write_safetensors(tmp_path / "lora.safetensors", state, metadata)
    found, said = scales(tmp_path / "lora.safetensors")
    assert found == pytest.approx(wanted)
    hidden = "tensor" not in place and wanted != [1, 1, 1]
    assert len(said) == hidden and all("lora.safetensors" in note and "alpha" in note for note in said)


def test_the_weights_change_by_it(tmp_path):
    states = (tensors(), {}), (tensors(), diffusers(r=4, lora_alpha=16))
    base, found = load_transformer(GOLDEN / "dit.safetensors"), []
    for i, (state, metadata) in enumerate(states):
        write_safetensors(tmp_path / f"{i}.safetensors", state, metadata)
        model = load_transformer(GOLDEN / "dit.safetensors")
        merge_lora(model, tmp_path / f"{i}.safetensors")
        found.append(model.blocks[0].attn.proj.weight - base.blocks[0].attn.proj.weight)
    torch.testing.assert_close(found[1], 4 * found[0], atol=1e-4, rtol=1e-4)


def test_kohya_files_that_a_converter_renamed_have_it_in_their_matrices(tmp_path):
    metadata = {"ss_network_dim": "4", "ss_network_alpha": "1", "sshs_model_hash": "0a"}
    write_safetensors(tmp_path / "lora.safetensors", tensors(), metadata)
    found, said = scales(tmp_path / "lora.safetensors")
    assert found == [1, 1, 1] and len(said) == 1 and "was converted from kohya's names; it counts at scale 1" in said[0]


UNREAD = {
    "lora_alpha": "[4, 8]",
    "modelspec.alpha": "four",
    "network_alphas": "{",
    "config": "{'lora_alpha': 16}",
    "lora.json": '{"lora_alpha": 16',
    "training": '{"process": [{"network": {"lora_alpha": 16}}]}',
    "ss_network_args": "network_alpha=16",
    "alpha": "4/4",
}


@pytest.mark.parametrize("key", UNREAD)
def test_an_alpha_that_cannot_be_read_is_named(tmp_path, key):
    for state, times in ((tensors(), 1), (tensors(alpha=torch.tensor(8.0)), 2)):
        write_safetensors(tmp_path / "lora.safetensors", state, {key: UNREAD[key]})
        found, said = scales(tmp_path / "lora.safetensors")
        assert found == [times] * 3 and len(said) == (times == 1)
        assert all(
            f"{key} in the header of" in note and "cannot be read; the LoRA counts without" in note for note in said
        )


@pytest.mark.parametrize(("key", "text"), [("use_rslora", "true"), ("alpha_pattern", '{"o": 8}')])
def test_a_field_outside_its_config_is_named(tmp_path, key, text):
    write_safetensors(tmp_path / "lora.safetensors", tensors(), {"lora_alpha": "4", "r": "4", key: text})
    found, said = scales(tmp_path / "lora.safetensors")
    assert found == [1, 1, 1] and len(said) == 1 and said[0].startswith(f"{key} in the header of")
    write_safetensors(tmp_path / "lora.safetensors", tensors(), {"lora_alpha": "4", "use_rslora": "False"})
    assert scales(tmp_path / "lora.safetensors") == ([1, 1, 1], [])


def test_alphas_of_another_files_modules_are_said(tmp_path):
    write_safetensors(tmp_path / "lora.safetensors", tensors(), {"network_alphas": '{"blocks.7.self_attn.o.alpha": 8}'})
    found, said = scales(tmp_path / "lora.safetensors")
    assert (
        found == [1, 1, 1] and "network_alphas in the header of" in said[0] and "alphas of modules that are" in said[0]
    )


RANKS = ({"ss_network_dim": "8"}, {"rank": "8"}, {"lora_rank": "8.0"}, {"network_dim": "8"}, {"config": '{"r": 8}'})


@pytest.mark.parametrize("ranks", [*RANKS, {"config": '{"lora_alpha": 16, "r": "8"}'}])
def test_a_declared_rank_is_held_against_the_matrices(tmp_path, ranks):
    alpha = {} if "lora_alpha" in str(ranks) else {"lora_alpha": "8"}
    write_safetensors(tmp_path / "lora.safetensors", kohya(), alpha | ranks)
    if "config" in ranks and alpha:
        # PEFT's own alpha is unknown then, and the number counts.
        assert scales(tmp_path / "lora.safetensors")[0] == [2, 2, 2]
        return
    with pytest.raises(CheckpointError, match=r"says rank 8 for .*blocks.0.self_attn.o, whose matrices have rank 4"):
        scales(tmp_path / "lora.safetensors")
    # An alpha that is a tensor belongs to the rank of its matrices, as after a resize.
    write_safetensors(tmp_path / "lora.safetensors", kohya(alpha=torch.tensor(8.0)), ranks)
    assert scales(tmp_path / "lora.safetensors")[0] == [2, 2, 2]


@pytest.mark.parametrize(
    ("state", "metadata", "wanted", "said"),
    [
        (
            tensors(alpha=torch.tensor(4.0)),
            diffusers(lora_alpha=16),
            1,
            "counts 1 times .* alpha tensor; lora_.* says 4",
        ),
        (tensors(), diffusers(lora_alpha=16) | {"alpha": "8"}, 4, "counts 4 times .* by lora_adapter.*; alpha in .* 2"),
    ],
)
def test_a_contradiction_is_said(tmp_path, state, metadata, wanted, said):
    write_safetensors(tmp_path / "lora.safetensors", state, metadata)
    found, notes = scales(tmp_path / "lora.safetensors")
    assert found == [wanted] * 3
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(notes[-1])


# The config beside a file


def folder_of(folder: Path, config: Mapping[str, Any] | str, *names: str) -> list[Path]:
    for name in names:
        write_safetensors(folder / name, tensors("base_model.model."))
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "adapter_config.json").write_text(text)
    return [folder / name for name in names]


@pytest.mark.parametrize("rank_root", [False, True])
def test_peft_keeps_its_alpha_beside_the_file(tmp_path, rank_root):
    config = {"peft_type": "LORA", "lora_alpha": 6, "r": RANK, "use_rslora": rank_root, "alpha_pattern": None}
    folder_of(tmp_path, config, "adapter_model.safetensors")
    wanted = 6 / (math.sqrt(RANK) if rank_root else RANK)
    # The folder stands for its file.
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        found, said = scales(path)
        assert found == pytest.approx([wanted] * 3)
        assert len(said) == 1 and "alpha 6 at rank 4" in said[0] and "adapter_config.json" in said[0]


def test_a_renamed_file_alone_beside_its_config_takes_it(tmp_path):
    (path,) = folder_of(tmp_path, {"lora_alpha": 8}, "style.safetensors")
    assert scales(path)[0] == [2, 2, 2]


@pytest.mark.parametrize("names", [
    ("adapter_model.safetensors", "b.safetensors"), ("a.safetensors", "b.safetensors"), ("a.sft", "b.safetensors"),
    ("a.SafeTensors", "b.safetensors"),
])  # fmt: skip
def test_another_files_config_is_left_alone(tmp_path, names):
    *_, path = folder_of(tmp_path, {"lora_alpha": 16}, *names)
    found, said = scales(path)
    assert found == [1, 1, 1] and len(said) == 1 and "b.safetensors counts without it" in said[0]
    # An alpha of its own needs no word about the config.
    write_safetensors(path, tensors(alpha=torch.tensor(8.0)))
    assert scales(path) == ([2, 2, 2], [])


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no JSON": (lambda folder: folder_of(folder, "{", "adapter_model.safetensors"), "is not a PEFT config"),
    "use_rslora as text": (
        lambda folder: folder_of(folder, {"lora_alpha": 4, "use_rslora": "false"}, "adapter_model.safetensors"),
        r"adapter_config.json is not a PEFT config \(use_rslora: .*valid boolean",
    ),
    "alpha as words": (
        lambda folder: folder_of(folder, {"lora_alpha": "four"}, "adapter_model.safetensors"),
        r"not a PEFT config \(lora_alpha: 'four' is not a finite number",
    ),
    "half a rank": (
        lambda folder: folder_of(folder, {"lora_alpha": 4, "r": 8.5}, "adapter_model.safetensors"),
        r"not a PEFT config \(r: 8.5 is not a whole number",
    ),
    "a pattern of words": (
        lambda folder: folder_of(folder, {"alpha_pattern": {"o": []}}, "adapter_model.safetensors"),
        r"not a PEFT config \(alpha_pattern.o: \[\] is not a finite number",
    ),
    "a broken alpha of a module": (
        lambda folder: write_safetensors(folder / "a.safetensors", tensors(), {"network_alphas": '{"a.alpha": [1]}'}),
        "network_alphas in the header of .* has a broken alpha for a.alpha",
    ),
    "alpha is infinite": (
        lambda folder: folder_of(folder, '{"lora_alpha": 1e999}', "adapter_model.safetensors"),
        r"not a PEFT config \(lora_alpha",
    ),
    "a list": (lambda folder: folder_of(folder, "[1]", "adapter_model.safetensors"), "not a PEFT config"),
    "nested": (lambda folder: folder_of(folder, "[" * 100_000, "adapter_model.safetensors"), "not a PEFT config"),
    "DoRA": (lambda folder: folder_of(folder, {"use_dora": True}, "adapter_model.safetensors"), "asks for DoRA"),
    "another rank": (
        lambda folder: folder_of(folder, {"lora_alpha": 4, "r": 8}, "adapter_model.safetensors"),
        "says rank 8 for blocks.0.self_attn.o, whose matrices have rank 4",
    ),
    "a pattern that takes forever": (
        lambda folder: folder_of(folder, {"alpha_pattern": {"(a+)+$": 1}}, "adapter_model.safetensors"),
        "a pattern that is too complex",
    ),
    "a broken pattern": (
        lambda folder: folder_of(folder, {"alpha_pattern": {"(a": 1}}, "adapter_model.safetensors"),
        "a broken pattern",
    ),
    "header without JSON": (
        lambda folder: write_safetensors(folder / "a.safetensors", tensors(), {"lora_adapter_metadata": "none"}),
        "lora_adapter_metadata in the header of .*a.safetensors is not a PEFT config",
    ),
    "header with alpha as a list": (
        lambda folder: write_safetensors(folder / "a.safetensors", tensors(), diffusers(lora_alpha=[4])),
        r"is not a PEFT config \(lora_alpha",
    ),
    "NaN in a header": (
        lambda folder: write_safetensors(folder / "a.safetensors", tensors(), {"alpha": "nan"}),
        "alpha in the header of .*a.safetensors is nan",
    ),
    "several files": (
        lambda folder: [write_safetensors(folder / f"{name}.safetensors", tensors()) for name in "ab"],
        r"holds 2 LoRAs \(a.safetensors, b.safetensors\); give one LoRA file",
    ),
    "an empty folder": (lambda folder: None, "holds no .safetensors file; give one LoRA file"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_place_is_one_sentence(tmp_path, fault):
    write, message = BROKEN[fault]
    write(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_loras([(tmp_path, 1.0)])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_alphas_from_elsewhere_are_part_of_a_loras_fingerprint(tmp_path):
    """Or a folder of segments would go on with another strength after its config changed."""
    found = []
    for alpha in (4, 8, 16):
        (path,) = folder_of(tmp_path, {"lora_alpha": alpha}, "adapter_model.safetensors")
        found.append(open_loras([(tmp_path, 1.0)])[0].fingerprint)
    assert len(set(found)) == 3 and found[0] == fingerprint(path)
    (tmp_path / "adapter_config.json").unlink()
    assert open_loras([(path, 1.0)])[0].fingerprint == found[0]


@pytest.mark.parametrize("mode", ["merged", "runtime"])
def test_a_lora_of_another_model_is_found_before_anything_is_loaded(tmp_path, monkeypatch, mode):
    """In runtime mode too, where LoRAs are applied last."""
    monkeypatch.setattr(pipeline, "load_vae", lambda *_, **__: pytest.fail("the VAE was loaded"))
    for name, state in (("size", tensors()), ("names", {"single.0.lora_A.weight": torch.ones(2, 2)})):
        write_safetensors(tmp_path / f"{name}.safetensors", state)
        with pytest.raises(CheckpointError, match=r"belongs to (a|another) model"):
            pipeline.Pipeline.load(lora=tmp_path / f"{name}.safetensors", lora_mode=mode)
