"""Packed forms: their numbers are comfy-kitchen's, and models in them load, convert and are refused by name."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longcat_core.checkpoints.convert import convert
from longcat_core.checkpoints.formats import COMFYUI
from longcat_core.checkpoints.load import load_transformer, official_state, open_checkpoint, read_parameter
from longcat_core.checkpoints.packings import unrotated
from longcat_core.checkpoints.reader import Reader
from longcat_core.checkpoints.stored import stored_part
from longcat_core.checkpoints.umt5 import open_umt5
from longcat_core.errors import CheckpointError
from longcat_core.files.safetensors_io import read_tensors, write_safetensors
from longcat_core.generate.paths import NANO_MODEL, NANO_TEXT_ENCODER
from longcat_core.model.config import ModelConfig
from longcat_core.optimize.optimized import OptimizedTransformer
from longcat_core.optimize.quantization import Policy

from ..support.quantized_files import (
    E4M3,
    FORMS,
    KITCHEN,
    WRITERS,
    State,
    as_description,
    by_kitchen,
    group_of,
    has_kitchen,
    is_projection,
    quantized,
)
from .written_forms import comfyui, fastvideo

# Written by `python -m tests.checkpoints.test_packed`, with comfy-kitchen: of every form it has, a matrix with sides
# that it pads, and what it dequantizes that to.
FIXTURE = Path(__file__).parents[1] / "data" / "kitchen.safetensors"
SIDES = {"nvfp4": (20, 40), "mxfp8": (20, 40)}
LAYER = "blocks.1.ffn.w2"
# Which our arithmetic does in another order than comfy-kitchen.
ROUNDED = 3e-7


@pytest.fixture(scope="module")
def nano() -> State:
    """Its first block alone."""
    tensors = read_tensors(NANO_MODEL).items()
    return {name: tensor for name, tensor in tensors if name.startswith("blocks.0.") or "blocks" not in name}


def saved(folder: Path, state: State, metadata: dict[str, str] | None = None) -> Path:
    write_safetensors(folder / "model.safetensors", state, metadata)
    return folder / "model.safetensors"


# The numbers


def of_one_layer(folder: Path, tensors: State, settings: dict, shape: tuple[int, int]) -> Tensor:
    """A golden layer's weight as these tensors, read by the reader."""
    golden = read_tensors(Path(__file__).parents[1] / "data" / "golden" / "dit.safetensors")
    state = {name: tensor for name, tensor in golden.items() if name != f"{LAYER}.weight"}
    state |= {f"{LAYER}.{suffix}": tensor.contiguous() for suffix, tensor in tensors.items()}
    checkpoint = open_checkpoint(saved(folder, state | {f"{LAYER}.comfy_quant": as_description(settings)}))
    name = f"{LAYER}.weight"
    checkpoint.shapes[name] = shape
    part = stored_part(checkpoint.where, LAYER, "weight")
    return torch.cat([rows for _, rows in Reader(checkpoint).pieces(part)])


@pytest.mark.parametrize("form", KITCHEN)
def test_numbers_of_comfy_kitchen(tmp_path, form):
    """Files that it wrote, and what it makes of them."""
    stored = {n.removeprefix(f"{form}/"): t for n, t in read_tensors(FIXTURE).items() if n.startswith(f"{form}/")}
    settings, wanted = json.loads(bytes(stored.pop("comfy_quant").tolist())), stored.pop("dequantized")
    found = of_one_layer(tmp_path, stored, settings, tuple(wanted.shape))
    if "convrot" in json.dumps(settings):
        assert (found - wanted).abs().max() <= ROUNDED * wanted.abs().max() * 4
    else:
        assert torch.equal(found, wanted)


@pytest.mark.skipif(find_spec("comfy_kitchen") is None, reason="needs comfy-kitchen")
@pytest.mark.parametrize("form", KITCHEN)
@pytest.mark.parametrize("sides", [(64, 256), (200, 512), (384, 320)])
def test_numbers_of_the_comfy_kitchen_that_is_here(tmp_path, form, sides):
    if not has_kitchen(form):
        pytest.skip("this comfy-kitchen does not write it")
    weight = torch.randn(sides, generator=torch.Generator().manual_seed(1))
    tensors, settings = by_kitchen(weight, form)
    wanted = dequantized_by_kitchen(weight, form)
    found = of_one_layer(tmp_path, tensors, settings, sides)
    assert (found - wanted).abs().max() <= ROUNDED * wanted.abs().max() * 4
    assert torch.equal(found, wanted) or "convrot" in form or "w4a8" in form


def dequantized_by_kitchen(weight: Tensor, form: str) -> Tensor:
    from comfy_kitchen.tensor import QuantizedTensor

    layout, options = KITCHEN[form]
    return QuantizedTensor.from_float(weight, layout, **options(group_of(weight.shape[1]))).dequantize()


@pytest.mark.skipif(find_spec("comfy_kitchen") is None, reason="needs comfy-kitchen")
@pytest.mark.parametrize("form", [form for form in FORMS if form.startswith(("svdquant_w4a4", "awq"))])
def test_layouts_that_comfy_kitchen_reads(tmp_path, form):
    """It has no writer of them: what it makes of our file, by its own functions."""
    from comfy_kitchen.tensor import TensorCoreAWQW4A16Layout, TensorCoreSVDQuantW4A4Layout

    weight = torch.randn(256, 192, generator=torch.Generator().manual_seed(1))
    tensors, settings = WRITERS[form](weight)
    tensors = {name: tensor if tensor.dtype == torch.int8 else tensor.float() for name, tensor in tensors.items()}
    about = {"orig_dtype": torch.float32, "orig_shape": weight.shape, "scale": tensors["weight_scale"].contiguous()}
    if form.startswith("awq"):
        params = TensorCoreAWQW4A16Layout.Params(**about, zeros=tensors["weight_zero"])
        wanted = TensorCoreAWQW4A16Layout.dequantize(tensors["weight"], params)
    else:
        if "smoothed" in form:
            pytest.skip("it always gives the branch the input as it is")
        names = ("proj_down", "proj_up", "smooth_factor")
        params = TensorCoreSVDQuantW4A4Layout.Params(**about, **{name: tensors[name].contiguous() for name in names})
        wanted = TensorCoreSVDQuantW4A4Layout.dequantize(tensors["weight"].contiguous(), params)
    found = of_one_layer(tmp_path, tensors, settings, tuple(weight.shape))
    assert (found - wanted).abs().max() <= 4 * ROUNDED * wanted.abs().max()


@pytest.mark.parametrize("group", [4, 16, 64, 256, 1024])
def test_a_rotation_is_undone_exactly(group):
    numbers = torch.randint(-127, 128, (8, 2 * group), generator=torch.Generator().manual_seed(2)).float()
    assert torch.equal(unrotated(unrotated(numbers, group), group), numbers)


# Models


@pytest.mark.parametrize("names", [dict, comfyui, fastvideo])
@pytest.mark.parametrize("form", FORMS)
def test_models(tmp_path, nano, form, names):
    """Every form, whole and split, by its descriptions in tensors and in the header; converted too."""
    wanted = load_transformer(saved(tmp_path, nano)).state_dict()
    state, _ = quantized(names(nano), form)
    tensors, metadata = quantized(names(nano), form, metadata=True)
    path = saved(tmp_path, state)
    first = load_transformer(path).state_dict()
    off = max(float((first[name] - value).norm() / value.norm()) for name, value in wanted.items())
    assert 1e-3 < off < (0.04 if form.startswith(("float8", "int8", "mxfp8")) or "6 bits" in form else 0.16)
    found = load_transformer(saved(tmp_path, tensors, metadata)).state_dict()
    assert all(torch.equal(found[name], value) for name, value in first.items())
    if names is comfyui:
        convert(path, tmp_path / "bf16.safetensors", "bf16")
        found = load_transformer(tmp_path / "bf16.safetensors").state_dict()
        assert all(torch.equal(found[name], value.bfloat16().float()) for name, value in first.items())
        checkpoint = open_checkpoint(path)
        name = "blocks.0.attn.qkv.weight"
        assert torch.equal(read_parameter(checkpoint, name), first[name])
        eight = load_transformer(path, fp8=Policy())
        assert all(value.float().isfinite().all() for value in eight.state_dict().values())


@pytest.mark.parametrize("form", FORMS)
def test_text_encoders(tmp_path, form):
    state = read_tensors(NANO_TEXT_ENCODER)
    out, _ = quantized(state, form)
    assert any(name.endswith("comfy_quant") for name in out)
    found = dict(open_umt5(saved(tmp_path, out)).weights(torch.float32))
    for name, value in open_umt5(NANO_TEXT_ENCODER).weights(torch.float32):
        off = (found[name] - value).norm() / value.norm()
        assert off < 0.16 and (off > 0) == is_projection(name, value), name


@pytest.mark.parametrize("form", ["nvfp4", "mxfp8"])
def test_sides_that_were_padded(tmp_path, form):
    """A network whose sizes do not divide by those of blocks; all its matrices are packed."""
    sizes = {"hidden_size": 72, "num_heads": 3, "caption_channels": 40, "ffn_hidden": 104, "adaln_dim": 24, "depth": 1}
    config = ModelConfig(**sizes, frequency_dim=24)
    torch.manual_seed(3)
    model = OptimizedTransformer(config)
    state, _ = quantized(official_state(model, COMFYUI), form, quantizes=lambda name, tensor: tensor.ndim == 2)
    found = load_transformer(saved(tmp_path, state), config=config).state_dict()
    for name, value in model.state_dict().items():
        assert (found[name] - value).norm() <= 0.16 * value.norm(), name


# What does not fit


@pytest.mark.parametrize(
    ("form", "about", "tensors", "said"),
    [
        (
            "int8 convrot",
            {"convrot_groupsize": 128},
            {},
            "int8_tensorwise with a rotation of 128 columns, which is not",
        ),
        (
            "int8 convrot",
            {"convrot_groupsize": "64"},
            {},
            "with a rotation of 64 columns, which is not supported; give",
        ),
        ("int8 convrot", {"convrot_groupsize": 1024}, {}, "ffn.w2.weight of shape .192, 512. does not fit; download"),
        (
            "int8 convrot",
            {},
            {"weight_scale": torch.ones(3, 1)},
            "w2.weight_scale of shape .3, 1. does not fit; download",
        ),
        (
            "int8 convrot",
            {},
            {"weight_scale": torch.zeros(192, 1)},
            "a scale of 0 or less in blocks.0.ffn.w2.weight_scale",
        ),
        (
            "int8 convrot",
            {},
            {"weight_scale": None},
            "as int8_tensorwise but lacks blocks.0.ffn.w2.weight_scale; download",
        ),
        (
            "int8 convrot",
            {},
            {"weight": torch.zeros(192, 512)},
            "but blocks.0.ffn.w2.weight as float32; download it again",
        ),
        ("nvfp4", {}, {"weight_scale_2": None}, "as nvfp4 but lacks blocks.0.ffn.w2.weight_scale_2; download it again"),
        (
            "nvfp4",
            {},
            {"weight_scale": torch.ones(192, 32).to(E4M3)},
            "as nvfp4, which .*weight_scale of shape .192, 32.",
        ),
        (
            "nvfp4",
            {},
            {"weight_scale_2": torch.tensor(torch.nan)},
            "NaN or infinite values in blocks.0.ffn.down.weight",
        ),
        ("nvfp4", {}, {"weight_scale_2": torch.tensor(-1.0)}, "a scale of 0 or less in blocks.0.ffn.w2.weight_scale_2"),
        (
            "mxfp8",
            {},
            {"weight_scale": torch.full((256, 16), 255).byte()},
            "NaN or infinite values in blocks.0.ffn.down",
        ),
        ("mxfp8", {}, {"weight_scale": torch.ones(256, 16)}, "as mxfp8 but blocks.0.ffn.w2.weight_scale as float32"),
        (
            "convrot_w4a4",
            {"convrot_groupsize": 0},
            {},
            "convrot_w4a4 with a rotation of 0 columns, which is not supported",
        ),
        (
            "asym_w4a8_int8",
            {"group_size": 0},
            {},
            "asym_w4a8_int8 with groups of 0 columns, which is not supported; give",
        ),
        (
            "asym_w4a8_int8",
            {"group_size": 32},
            {},
            "as asym_w4a8_int8, which .*weight_s_rel of shape .192, 32. does not",
        ),
        (
            "asym_w4a8_int8",
            {},
            {"weight_codebook": torch.ones(8)},
            "weight_codebook of shape .8. does not fit; download it",
        ),
        (
            "svdquant_w4a4",
            {"act_unsigned": True},
            {},
            "svdquant_w4a4 with unsigned inputs, which is not supported; give a",
        ),
        (
            "svdquant_w4a4",
            {"lowrank_branch_input_basis": "x"},
            {},
            "svdquant_w4a4 with the basis x, which is not supported",
        ),
        (
            "svdquant_w4a4",
            {},
            {"proj_up": torch.ones(192, 7)},
            "as svdquant_w4a4, which .*proj_up of shape .192, 7. does",
        ),
        (
            "svdquant_w4a4",
            {},
            {"weight": torch.ones(2, 8, 16, 128).char()},
            "w2.weight of shape .2, 8, 16, 128. does not fit",
        ),
        (
            "awq_w4a16",
            {"group_size": 128},
            {},
            "as awq_w4a16, which .*weight_scale of shape .8, 192. does not fit; download",
        ),
        (
            "awq_w4a16",
            {},
            {"weight": torch.ones(192).char()},
            "w2.weight of shape .192. does not fit; download it again",
        ),
        (
            "awq_w4a16",
            {"format": "awq_w3"},
            {},
            "stores blocks.0.ffn.w2 as awq_w3, which is not supported; give a file in",
        ),
    ],
)
def test_what_does_not_fit(tmp_path, nano, form, about, tensors, said):
    state, _ = quantized(comfyui(nano), form, kitchen=False)
    described = json.loads(bytes(state["blocks.0.ffn.w2.comfy_quant"].tolist()))
    state["blocks.0.ffn.w2.comfy_quant"] = as_description(described | about)
    for suffix, tensor in tensors.items():
        state[f"blocks.0.ffn.w2.{suffix}"] = tensor
    path = saved(tmp_path, {name: tensor for name, tensor in state.items() if tensor is not None})
    with pytest.raises(CheckpointError, match=said):
        load_transformer(path)


def test_other_names_and_dtypes(tmp_path, nano):
    """Scales in bytes, comfy-kitchen's own suffixes, another writer's description without a format, smoothed inputs."""
    for form, change in (
        ("nvfp4", lambda n, t: (n, t.view(torch.uint8) if n.endswith("weight_scale") else t)),
        ("mxfp8", lambda n, t: (n, t.view(torch.float8_e8m0fnu) if n.endswith("weight_scale") else t)),
        ("mxfp8", lambda n, t: (n, t.view(torch.uint8) if t.dtype == E4M3 else t)),
        ("asym_w4a8_int8", lambda n, t: (n, t.view(torch.uint8) if t.dtype == E4M3 else t)),
        ("convrot_w4a4", lambda n, t: (n, t.view(torch.uint8) if t.dtype == torch.int8 else t)),
        ("svdquant_w4a4", lambda n, t: (re.sub(r"(proj_|smooth_)", r"weight_\1", n), t)),
        ("awq_w4a16", lambda n, t: (n.replace("weight_zero", "weight_zeros"), t)),
        ("int8 convrot", lambda n, t: (n, t.flatten() if n.endswith("weight_scale") else t)),
    ):
        state, _ = quantized(comfyui(nano), form, kitchen=False)
        wanted = load_transformer(saved(tmp_path, state)).state_dict()
        other = dict(change(name, tensor) for name, tensor in state.items())
        assert other.keys() != state.keys() or any(
            other[n].dtype != state[n].dtype or other[n].ndim != state[n].ndim for n in state
        )
        found = load_transformer(saved(tmp_path, other)).state_dict()
        assert all(torch.equal(found[name], value) for name, value in wanted.items()), form

    state, _ = quantized(comfyui(nano), "int8 convrot", kitchen=False)
    wanted = load_transformer(saved(tmp_path, state)).state_dict()
    for name in [name for name in state if name.endswith("comfy_quant")]:
        group = json.loads(bytes(state[name].tolist()))["convrot_groupsize"]
        state[name] = as_description({"convrot": True, "convrot_groupsize": group, "per_row": True})
    found = load_transformer(saved(tmp_path, state)).state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())

    state, _ = quantized(comfyui(nano), "nvfp4", kitchen=False)
    wanted = load_transformer(saved(tmp_path, state)).get_parameter("blocks.0.ffn.down.weight")
    smooth = torch.rand(512) + 0.5
    found = load_transformer(saved(tmp_path, state | {"blocks.0.ffn.w2.pre_quant_scale": smooth}))
    assert torch.equal(found.get_parameter("blocks.0.ffn.down.weight"), wanted * smooth)


def write_fixture() -> None:
    """Needs the newest comfy-kitchen."""
    out = {}
    for form in KITCHEN:
        weight = torch.randn(SIDES.get(form, (8, 64)), generator=torch.Generator().manual_seed(4))
        tensors, settings = by_kitchen(weight, form)
        tensors |= {"comfy_quant": as_description(settings), "dequantized": dequantized_by_kitchen(weight, form)}
        out |= {f"{form}/{suffix}": tensor.contiguous() for suffix, tensor in tensors.items()}
    write_safetensors(FIXTURE, out)


if __name__ == "__main__":
    write_fixture()
