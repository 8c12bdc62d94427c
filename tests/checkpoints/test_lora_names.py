"""LoRAs under the names of every trainer are found; kinds that cannot be merged and broken files are one sentence."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longcat_core.checkpoints.formats import targets
from longcat_core.checkpoints.lora import LoraStack, lora_of, open_loras
from longcat_core.checkpoints.lora_names import PREFIX, PREFIXES, SEPARATOR, flat, targets_by_flat_name
from longcat_core.errors import CheckpointError
from longcat_core.files.safetensors_io import write_safetensors

from .test_lora_alpha import MODULES, SHAPES, kohya, tensors

FIRST = "diffusion_model.blocks.0.self_attn.o"


def test_flat_names_are_unique_and_keep_no_prefix():
    for depth in (1, 2, 12, 48):
        assert len(targets_by_flat_name(depth)) == len({name.replace(".", "_") for name in targets(depth)})
        assert not [name for name in targets_by_flat_name(depth) if name != flat(name)]
    assert not [
        name for name in targets(2) if name.replace(".", "_").startswith(tuple(p.replace(".", "_") for p in PREFIXES))
    ]


def renamed(change: Callable[[str], str], state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    return {change(name): tensor for name, tensor in (state or tensors("")).items()}


def parts(down: str, up: str) -> Callable[[str], str]:
    return lambda name: name.replace("lora_A.weight", down).replace("lora_B.weight", up)


def official(name: str) -> str:
    module, _, part = name.replace("self_attn.o", "attn.proj").replace("attn.o", "attn.proj").partition(".lora_")
    return PREFIX + module.replace(".", SEPARATOR) + {"A": ".lora_down.weight", "B": ".lora_up.weight"}[part[0]]


SPELLINGS: dict[str, dict[str, Tensor]] = {
    **{prefix: tensors(prefix) for prefix in (
        "", "diffusion_model.", "transformer.", "base_model.model.", "model.diffusion_model.", "pipe.dit.", "dit.",
        "base_model.model.diffusion_model.", "module.", "pipe.", "lora_unet_", "lora_transformer_", "unet.",
        "net.", "pipeline.dit.", "denoiser.", "generator.", "student.", "model_ema.", "_fsdp_wrapped_module.",
        "_orig_mod.", "module._orig_mod.", "_checkpoint_wrapped_module.", "generator_ema.", "my.own.network_v2.",
        "lora_net_", "base_model.model.net._fsdp_wrapped_module.", "model.a-b.1.",
    )},
    "wrapped blocks": renamed(lambda name: re.sub(r"(blocks\.\d\.)", r"\1_checkpoint_wrapped_module.", name)),
    "wrapped twice": renamed(lambda name: re.sub(r"(blocks\.\d\.)", r"\1_fsdp_wrapped_module._orig_mod.", name)),
    "wrapped layers": renamed(lambda name: name.replace("self_attn.o", "self_attn.module.o.module")),
    "wrapped and flat": renamed(
        lambda name: "lora_unet_"
        + re.sub(r"\.(?!lora|weight)", "_", re.sub(r"(blocks\.\d\.)", r"\1_checkpoint_wrapped_module.", name)),
        kohya(),
    ),
    "an adapter's name with a dot": renamed(parts("lora_A.v1.0.weight", "lora_B.v1.0.weight")),
    "parts of an object": renamed(parts("lora.A.weight", "lora.B.weight")),
    "small letters": renamed(parts("lora_a.weight", "lora_b.weight")),
    "kohya, flat": renamed(lambda name: "lora_unet_" + re.sub(r"\.(?!lora|weight)", "_", name), kohya()),
    "kohya, flat to the block": renamed(lambda name: name.replace("blocks.", "lora_unet_blocks_"), tensors("")),
    "kohya, flat to the layer": renamed(lambda name: re.sub(r"blocks\.(\d)\.", r"lora_unet_blocks_\1_", name)),
    "kohya, two underscores": renamed(lambda name: "lora_unet__" + re.sub(r"\.(?!lora|weight)", "_", name)),
    "LyCORIS": renamed(lambda name: "lycoris_" + re.sub(r"\.(?!lora|weight)", "_", name)),
    "a named adapter": renamed(parts("lora_A.default.weight", "lora_B.default.weight")),
    "kohya's parts": renamed(parts("lora_down.weight", "lora_up.weight")),
    "old diffusers' parts": renamed(parts("lora.down.weight", "lora.up.weight")),
    "older diffusers' parts": renamed(parts("lora_linear_layer.down.weight", "lora_linear_layer.up.weight")),
    "parts without an ending": renamed(parts("lora_A", "lora_B")),
    "kohya's parts without an ending": renamed(parts("lora_down", "lora_up")),
    "FastVideo": renamed(lambda name: name.replace("attn.o", "attn.to_out")),
    "diffusers' layer in a list": renamed(lambda name: name.replace("attn.o", "attn.to_out.0")),
    "official": renamed(official),
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_changes_the_same_weights(spelling):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wanted, found = (LoraStack([lora_of(t, "a LoRA")], SHAPES) for t in (tensors(), SPELLINGS[spelling]))
    assert wanted.weights == found.weights and len(found.weights) == len(MODULES)
    for weight in wanted.weights:
        assert torch.equal(wanted.add(weight, torch.zeros(64, 64)), found.add(weight, torch.zeros(64, 64)))


KINDS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lora_magnitude_vector.default.weight": "DoRA",
    "hada_w1_a": "LoHa",
    "lokr_w2": "LoKr",
    "lokr_w1.default": "LoKr",
    "oft_blocks": "OFT",
    "boft_R": "OFT",
    "a1.weight": "GLoRA",
    "diff": "differences of whole weights",
    "diff_b": "differences of whole weights",
    "lora_mid.weight": "a LoRA with a Tucker core",
    "lora_B.bias": "a LoRA with biases",
    "lora_b.v1.0.bias": "a LoRA with biases",
    "lora_up.scale_weight": "a quantized LoRA",
    "lora_A.comfy_quant": "a quantized LoRA",
}


@pytest.mark.parametrize("part", KINDS)
def test_other_kinds_are_refused_by_name(part):
    """Also beside layers that could be merged: without them the result would be another's."""
    for state in (tensors(), {}):
        with pytest.raises(CheckpointError, match=rf"cannot be merged here \({re.escape(KINDS[part])}\); give a plain"):
            lora_of(state | {f"{FIRST}.{part}": torch.ones(4)}, "a LoRA")


def test_one_layer_under_two_names_is_not_added_twice():
    with pytest.raises(CheckpointError, match=r"changes blocks.0.self_attn.o twice, also as lora_unet_blocks"):
        LoraStack([lora_of(tensors() | kohya(), "a LoRA")], SHAPES)


def test_networks_under_several_prefixes_are_not_guessed():
    with pytest.raises(CheckpointError, match=r"holds LoRAs under one\., two\.; give a file with one LoRA"):
        LoraStack([lora_of(tensors("one.") | tensors("two."), "a LoRA")], SHAPES)
    for prefix in ("single_", "double_"):
        with pytest.raises(CheckpointError, match="matches nothing"):
            LoraStack([lora_of(tensors(prefix), "a LoRA")], SHAPES)
    with pytest.warns(UserWarning, match="3 of its 6 modules; not matched: critic.blocks"):
        LoraStack([lora_of(tensors("generator.") | tensors("critic."), "a LoRA")], SHAPES)


def test_half_of_the_modules_matching_nothing_is_said():
    other = renamed(lambda name: name.replace("blocks.", "single_blocks."), tensors())
    with pytest.warns(UserWarning, match=r"matches 3 of its 6 modules; not matched: single_blocks\.0\.self_attn\.o, "):
        LoraStack([lora_of(tensors() | other, "a LoRA")], SHAPES)


Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]
BROKEN: dict[str, tuple[Change, str]] = {
    "alpha is two numbers": (lambda t: t | {f"{FIRST}.alpha": torch.ones(2)}, r"a broken alpha for .*float32 \[2\]"),
    "alpha is empty": (lambda t: t | {f"{FIRST}.alpha": torch.ones(0)}, r"a broken alpha for .*float32 \[0\]"),
    "alpha is text": (lambda t: t | {f"{FIRST}.alpha": torch.tensor(list(b"8.0"))}, "a broken alpha for"),
    "alpha is true": (lambda t: t | {f"{FIRST}.alpha": torch.tensor(True)}, "a broken alpha for .*bool"),
    "alpha is NaN": (lambda t: t | {f"{FIRST}.alpha": torch.tensor(torch.nan)}, r"NaN or infinite values in .*\(alpha"),
    "scale is two numbers": (lambda t: t | {f"{FIRST}.alpha_scale": torch.ones(2)}, "a broken alpha_scale for blocks"),
    "scale is infinite": (lambda t: t | {f"{FIRST}.alpha_scale": torch.tensor(torch.inf)}, "NaN or infinite values in"),
    "alpha is enormous": (lambda t: t | {f"{FIRST}.alpha": torch.tensor(1e38)}, r"by which it counts 2.5e\+37 times"),
    "no up": (lambda t: {k: v for k, v in t.items() if "0.self_attn.o.lora_B" not in k}, "broken LoRA for blocks.0"),
    "no down": (lambda t: {k: v for k, v in t.items() if "0.self_attn.o.lora_A" not in k}, "broken LoRA for blocks.0"),
    "alpha alone": (lambda t: {f"{FIRST}.alpha": torch.ones(1)}, "broken LoRA for blocks.0"),
    "another rank": (lambda t: t | {f"{FIRST}.lora_A.weight": torch.ones(3, 64)}, "mismatched ranks for blocks.0"),
    "another size": (lambda t: t | {f"{FIRST}.lora_A.weight": torch.ones(4, 63)}, "belongs to a model of another size"),
    "a vector": (lambda t: t | {f"{FIRST}.lora_B.weight": torch.ones(64)}, "broken LoRA for blocks.0"),
    "a number": (lambda t: t | {f"{FIRST}.lora_B.weight": torch.tensor(1.0)}, "broken LoRA for blocks.0"),
    "whole numbers": (
        lambda t: t | {f"{FIRST}.lora_B.weight": torch.ones(64, 4, dtype=torch.int8)},
        "has matrices of float32, int8 for blocks.0.self_attn.o",
    ),
    "NaN": (lambda t: t | {f"{FIRST}.lora_B.weight": torch.ones(64, 4) * torch.nan}, "NaN or infinite values in"),
    "a slice of 5,000 digits": (
        lambda t: {f"{FIRST}.lora_up.blocks.{'9' * 5000}.weight": torch.ones(1, 1)},
        "is not a LoRA",
    ),
    "a slice of other digits": (
        lambda t: t | {f"{FIRST}.lora_up.blocks.\u0663.weight": torch.ones(64, 4)} and
        {f"{FIRST}.lora_up.blocks.\u0663.weight": torch.ones(64, 4)},
        "is not a LoRA",
    ),
    "a slice is missing": (
        lambda t: {
            f"{FIRST}.lora_down.weight": torch.ones(8, 64),
            f"{FIRST}.lora_up.blocks.0.weight": torch.ones(32, 4),
            f"{FIRST}.lora_up.blocks.2.weight": torch.ones(32, 4),
            f"{FIRST}.alpha_scale": torch.tensor(1.0),
        },
        "broken LoRA for blocks.0",
    ),
    "a long name": (lambda t: {f"{'x' * 50_000}.lora_A.weight": torch.ones(4, 64)}, "matches nothing in LongCat-Video"),
    "escape codes": (lambda t: {"\x1b[31mred.lora_A.weight": torch.ones(4, 64)}, r"matches nothing .*\\x1b\[31mred"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_file_is_one_short_sentence(tmp_path, fault):
    change, message = BROKEN[fault]
    write_safetensors(tmp_path / "lora.safetensors", change(tensors()))
    with pytest.raises(CheckpointError, match=message) as caught:
        LoraStack(open_loras([(tmp_path / "lora.safetensors", 1.0)]), SHAPES)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600


WITHOUT_EFFECT: dict[str, tuple[dict[str, Tensor], float, str]] = {
    "strength": (tensors(), 0.0, "its strength is 0"),
    "alpha": (tensors(alpha=torch.tensor(0.0)), 1.0, "its alpha is 0"),
    "ups": ({k: v * ("lora_A" in k) for k, v in tensors().items()}, 1.0, "its matrices are 0, as before training"),
    "downs": ({k: v * ("lora_B" in k) for k, v in tensors().items()}, 1.0, "its matrices are 0, as before training"),
    "rank": ({k: v[:0] if "lora_A" in k else v[:, :0] for k, v in tensors().items()}, 1.0, "its rank is 0"),
    "negative zeros": ({k: v * -0.0 for k, v in tensors().items()}, 1.0, "its matrices are 0"),
}


@pytest.mark.parametrize("case", WITHOUT_EFFECT)
def test_a_lora_that_changes_nothing_is_noted(tmp_path, case):
    state, strength, said = WITHOUT_EFFECT[case]
    write_safetensors(tmp_path / "lora.safetensors", state)
    with pytest.warns(UserWarning, match=rf"lora\.safetensors changes nothing: {said}"):
        LoraStack([(tmp_path / "lora.safetensors", strength)], SHAPES)
    # One layer with an effect is enough.
    write_safetensors(tmp_path / "lora.safetensors", state | {k: v for k, v in tensors().items() if "blocks.0" in k})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if strength and case != "alpha":
            LoraStack([(tmp_path / "lora.safetensors", strength)], SHAPES)


@pytest.mark.parametrize("pipe", ["lora.safetensors", "folder/adapter_model.safetensors"])
def test_a_pipe_is_not_waited_for(tmp_path, pipe):
    import os

    path = Path(tmp_path / pipe)
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="is a pipe or a device; give a regular file"):
        open_loras([(path if "folder" not in pipe else path.parent, 1.0)])
