"""Official LoRA files: exact on fused layers, removable, refused when they belong to another model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longcat_core.checkpoints.load import load_transformer
from longcat_core.checkpoints.lora import PREFIX, SEPARATOR, merge_lora, read_lora
from longcat_core.checkpoints.safetensors_io import read_tensors, write_safetensors
from longcat_core.errors import CheckpointError
from longcat_core.model.config import ModelConfig
from longcat_core.model.transformer import LongCatTransformer

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
LORA = GOLDEN / "lora.safetensors"
OTHER_BLOCK = PREFIX + SEPARATOR.join(("blocks", "9", "attn", "proj")) + ".alpha_scale"


@pytest.fixture
def model() -> LongCatTransformer:
    return load_transformer(GOLDEN / "dit.safetensors")


def test_slices_of_a_fused_weight_change_by_their_own_product(model):
    before = model.blocks[0].attn.qkv.weight.clone()
    merge_lora(model, LORA, strength=0.5)
    parts = read_lora(LORA)["blocks.0.attn.qkv"]
    for i in range(3):
        down = parts["lora_down.weight"].chunk(3)[i]
        expected = 0.5 * parts["alpha_scale"] * parts[f"lora_up.blocks.{i}.weight"] @ down
        change = (model.blocks[0].attn.qkv.weight - before).chunk(3)[i]
        torch.testing.assert_close(change, expected, atol=1e-6, rtol=1e-4)


def test_gate_and_up_land_in_their_halves(model):
    before = model.blocks[1].ffn.gate_up.weight.clone()
    merge_lora(model, LORA)
    for i, name in enumerate(("w1", "w3")):
        parts = read_lora(LORA)[f"blocks.1.ffn.{name}"]
        expected = parts["alpha_scale"] * parts["lora_up.weight"] @ parts["lora_down.weight"]
        change = (model.blocks[1].ffn.gate_up.weight - before).chunk(2)[i]
        torch.testing.assert_close(change, expected, atol=1e-6, rtol=1e-4)


def test_every_target_changes_and_strength_minus_one_takes_it_out(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    changed = merge_lora(model, LORA)
    assert len(changed) == len(read_lora(LORA)) == 19
    assert sum(not torch.equal(v, before[k]) for k, v in model.state_dict().items()) == 17
    merge_lora(model, LORA, strength=-1)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {OTHER_BLOCK: torch.ones(())}, "modules that the model lacks: blocks.9.attn.proj"),
        (lambda t: t | {"unet.weight": torch.ones(2)}, "no LongCat-Video LoRA"),
        (lambda t: {}, "no LongCat-Video LoRA"),
        (lambda t: {k: v[:, :-1] if k.endswith("proj.lora_up.weight") else v for k, v in t.items()}, "mismatched"),
        (lambda t: {k: v for k, v in t.items() if "final" not in k or "down" not in k}, "broken LoRA for final"),
        (lambda t: {k: v[:-2] if k.endswith("w2.lora_up.weight") else v for k, v in t.items()}, "another size"),
    ],
)
def test_bad_files_change_nothing(model, tmp_path, change, message):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    file = tmp_path / "bad.safetensors"
    write_safetensors(file, change(read_tensors(LORA)))
    with pytest.raises(CheckpointError, match=message):
        merge_lora(model, file)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_lora_of_a_deeper_model_is_refused(model):
    shallow = LongCatTransformer(replace(ModelConfig.from_json(GOLDEN / "config.json"), depth=1))
    with pytest.raises(CheckpointError, match=r"blocks\.1"):
        merge_lora(shallow, LORA)
