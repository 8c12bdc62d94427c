"""A declared format is held against the stored numbers, and a format that cannot be read is refused by its name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longcat_core.checkpoints.convert import convert
from longcat_core.checkpoints.load import load_transformer
from longcat_core.errors import CheckpointError
from longcat_core.files.safetensors_io import read_tensors, write_safetensors

from .written_forms import E4M3, E5M2, State, comfyui, described, fp8_scaled

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
LAYER = "blocks.1.ffn.w2"


@pytest.fixture(scope="module")
def golden() -> State:
    return read_tensors(GOLDEN / "dit.safetensors")


def saved(folder: Path, state: State, metadata: dict[str, str] | None = None, name: str = "x.safetensors") -> Path:
    write_safetensors(folder / name, state, metadata)
    return folder / name


def text(content: object) -> Tensor:
    return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)


def as_bytes(state: State) -> State:
    return {
        name: tensor.view(torch.uint8) if tensor.dtype in (E4M3, E5M2) else tensor for name, tensor in state.items()
    }


def with_descriptions(state: State, dtype: torch.dtype = E4M3) -> State:
    """Scaled weights, in another fp8 too, each layer with its description."""
    scaled = fp8_scaled(comfyui(state), scale="weight_scale", marker=False)
    scaled = {name: tensor.to(dtype) if tensor.dtype == E4M3 else tensor for name, tensor in scaled.items()}
    return described(scaled, str(dtype).removeprefix("torch."))


# Bits that are read as what they are


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("how", ["tensors", "metadata", "marker"])
def test_fp8_that_is_stored_as_bytes(tmp_path, golden, dtype, how):
    state = with_descriptions(golden, dtype)
    wanted = load_transformer(saved(tmp_path, state, name="wanted.safetensors")).state_dict()
    metadata = None
    if how == "metadata":
        layers = {name.removesuffix(".comfy_quant"): tensor for name, tensor in state.items() if "comfy_quant" in name}
        metadata = {
            "_quantization_metadata": json.dumps(
                {"layers": {n: json.loads(bytes(t.tolist())) for n, t in layers.items()}}
            )
        }
    if how != "tensors":
        state = {name: tensor for name, tensor in state.items() if "comfy_quant" not in name}
    if how == "marker":
        state = {name.replace("weight_scale", "scale_weight"): tensor for name, tensor in state.items()}
        state["scaled_fp8"] = torch.empty(0, dtype=dtype)
    path = saved(tmp_path, {n: t if n == "scaled_fp8" else as_bytes({n: t})[n] for n, t in state.items()}, metadata)
    for fp8 in (False, True):
        model = load_transformer(path)
        assert all(torch.equal(model.state_dict()[name], value) for name, value in wanted.items()), fp8
    errors = convert(path, tmp_path / "written.safetensors", "bf16")
    assert max(error.relative for error in errors) < 0.01


# What contradicts itself


def rows(state: State, name: str) -> Tensor:
    return torch.ones(state[f"{name}.weight"].shape[0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda s: {f"{LAYER}.comfy_quant": text({"format": "float8_e5m2"})},
            "as float8_e5m2 but stores float8_e4m3fn",
        ),
        (
            lambda s: {f"{LAYER}.comfy_quant": text({"format": "int8_tensorwise"})},
            "as int8_tensorwise but stores float8",
        ),
        (lambda s: {f"{LAYER}.weight": s[f"{LAYER}.weight"].float()}, "as float8_e4m3fn but stores float32"),
        (lambda s: {f"{LAYER}.weight": s[f"{LAYER}.weight"].view(torch.int8)}, "as float8_e4m3fn but stores int8"),
        (lambda s: {f"{LAYER}.weight_scale": torch.tensor(2)}, f"cannot be read: {LAYER}.weight_scale as int64; give"),
        (lambda s: {f"{LAYER}.weight_scale": torch.ones(64, 8)}, "with a scale for each block, as in mxfp8 and nvfp4"),
        (lambda s: {f"{LAYER}.comfy_quant": text({"format": None})}, f"describes {LAYER} without a format"),
        (lambda s: {f"{LAYER}.comfy_quant": text([1])}, "is not a readable description"),
        (
            lambda s: {f"{LAYER}.comfy_quant": torch.full((9000,), ord("["), dtype=torch.uint8)},
            "is not a readable desc",
        ),
        (lambda s: {f"{LAYER}.comfy_quant": torch.ones(3)}, f"has an unreadable {LAYER}.comfy_quant"),
        (lambda s: {f"{LAYER}.comfy_quant": torch.zeros(1 << 17, dtype=torch.uint8)}, "has an unreadable"),
        (lambda s: {"blocks.0.self_attn.o.bias": torch.ones(64).long()}, "o.bias as int64"),
    ],
)
def test_what_is_described_is_stored(tmp_path, golden, change, said):
    state = with_descriptions(golden)
    path = saved(tmp_path, state | change(state))
    for use in (load_transformer, lambda path: convert(path, tmp_path / "written.safetensors", "bf16")):
        with pytest.raises(CheckpointError, match=said) as caught:
            use(path)
        assert str(path) in str(caught.value)
    assert not (tmp_path / "written.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: {"scaled_fp8": torch.empty(0, dtype=E5M2)}, "as float8_e5m2 by its marker but stores float8_e4m3fn"),
        (lambda s: {f"{LAYER}.weight": s[f"{LAYER}.weight"].view(torch.int8)}, "by its marker but stores int8"),
        (lambda s: {"scaled_fp8": torch.empty(0, dtype=torch.bfloat16), **as_bytes(s)}, "cannot be read: .* as uint8"),
    ],
)
def test_a_marker_names_the_fp8_of_the_file(tmp_path, golden, change, said):
    state = fp8_scaled(comfyui(golden))
    with pytest.raises(CheckpointError, match=said):
        load_transformer(saved(tmp_path, state | change(state)))


def test_a_marker_without_fp8(tmp_path, golden):
    for marker in (torch.empty(0, dtype=E4M3), torch.zeros(2)):
        path = saved(tmp_path, comfyui(golden) | {"scaled_fp8": marker})
        with pytest.raises(CheckpointError, match="has the marker 'scaled_fp8' but stores no matrix in fp8"):
            load_transformer(path)


@pytest.mark.parametrize("scale", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("marked", [False, True])
def test_a_scale_beside_numbers_that_were_not_quantized(tmp_path, golden, scale, marked):
    state = fp8_scaled(comfyui(golden), scale=scale, marker=marked)
    wide = {f"{LAYER}.weight": comfyui(golden)[f"{LAYER}.weight"].bfloat16()}
    for value in (torch.tensor(2.0), torch.full((64,), 0.5)):
        path = saved(tmp_path, state | wide | {f"{LAYER}.{scale}": value})
        with pytest.raises(CheckpointError, match=f"a scale in {LAYER}.{scale} but stores {LAYER}.weight as bfloat16"):
            load_transformer(path)
    # As ComfyUI saves a model.
    model = load_transformer(saved(tmp_path, state | wide | {f"{LAYER}.{scale}": torch.tensor(1.0)}))
    assert torch.equal(model.get_parameter(f"{LAYER.replace('w2', 'down')}.weight"), wide[f"{LAYER}.weight"].float())


def test_an_int8_weight_is_int8(tmp_path):
    state = read_tensors(GOLDEN / "dit_int8.safetensors")
    name = f"{LAYER}.weight_int8"
    for other in (state[name].view(torch.uint8), state[name].float().to(E4M3)):
        with pytest.raises(CheckpointError, match=f"describes {name} as int8 but stores"):
            load_transformer(saved(tmp_path, state | {name: other}))


def test_two_descriptions_of_a_layer(tmp_path, golden):
    layers = {"layers": {LAYER: {"format": "float8_e5m2"}}}
    path = saved(tmp_path, with_descriptions(golden), {"_quantization_metadata": json.dumps(layers)})
    with pytest.raises(CheckpointError, match=f"describes {LAYER} as float8_e5m2 and as float8_e4m3fn"):
        load_transformer(path)


@pytest.mark.parametrize(
    "metadata", ["{", "[1]", '{"layers": [1]}', '{"layers": {"a": "nvfp4"}}', '{"layers":' + "[" * 9000]
)
def test_metadata_of_another_kind(tmp_path, golden, metadata):
    path = saved(tmp_path, golden, {"_quantization_metadata": metadata})
    with pytest.raises(CheckpointError, match="is not readable as _quantization_metadata"):
        load_transformer(path)


def test_metadata_may_describe_other_models_of_the_file(tmp_path, golden):
    layers = {"layers": {"text_encoders.block.0": {"format": "nvfp4"}}}
    load_transformer(saved(tmp_path, golden, {"_quantization_metadata": json.dumps(layers)}))


# Formats that cannot be read

U8 = torch.uint8


def packed(**suffixes: Tensor) -> State:
    return {
        f"{LAYER}.{suffix.replace('__', '.').replace('bitsandbytes_', 'bitsandbytes__')}": tensor
        for suffix, tensor in suffixes.items()
    }


FORMATS = {
    "nvfp4, undescribed": packed(
        weight=torch.zeros(64, 128, dtype=U8), weight_scale=torch.ones(64, 16).to(E4M3), weight_scale_2=torch.ones(())
    ),
    "mxfp8 and nvfp4": packed(weight=torch.zeros(64, 256).to(E4M3), weight_scale=torch.ones(64, 8)),
    "int4": packed(
        weight=torch.zeros(64, 128, dtype=U8), weight_scale=torch.ones(64), comfy_quant=text({"format": "int4"})
    ),
    "bitsandbytes nf4": packed(
        weight=torch.zeros(8192, 1, dtype=U8),
        weight__absmax=torch.ones(256),
        weight__quant_map=torch.ones(16),
        weight__quant_state__bitsandbytes_nf4=torch.zeros(90, dtype=U8),
    ),
    "bitsandbytes int8": packed(weight=torch.zeros(64, 256, dtype=torch.int8), SCB=torch.ones(64)),
    "svdquant": packed(
        qweight=torch.zeros(64, 128, dtype=torch.int8),
        wscales=torch.ones(4, 64),
        smooth_factor=torch.ones(256),
        proj_down=torch.ones(256, 32),
        proj_up=torch.ones(64, 32),
    ),
    "GPTQ": packed(
        qweight=torch.zeros(32, 64, dtype=torch.int32),
        qzeros=torch.zeros(2, 8, dtype=torch.int32),
        scales=torch.ones(2, 64),
        g_idx=torch.zeros(256, dtype=torch.int32),
    ),
    "AWQ": packed(
        qweight=torch.zeros(256, 8, dtype=torch.int32),
        qzeros=torch.zeros(2, 8, dtype=torch.int32),
        scales=torch.ones(2, 64),
    ),
    "torchao": packed(_weight_qdata=torch.zeros(64, 256, dtype=torch.int8), _weight_scale=torch.ones(64, 1)),
    "quanto": packed(weight___data=torch.zeros(64, 256, dtype=torch.int8), weight___scale=torch.ones(64, 1)),
    "compressed-tensors": packed(
        weight_packed=torch.zeros(64, 32, dtype=torch.int32), weight_scale=torch.ones(64, 2), weight_shape=torch.ones(2)
    ),
    "HQQ": packed(W_q=torch.zeros(64, 128, dtype=U8)),
    "MLX": packed(weight=torch.zeros(64, 32, dtype=torch.uint32), scales=torch.ones(64, 4), biases=torch.ones(64, 4)),
    "numbers with a separate `scale`, as SDNQ's or fp8": packed(
        weight=torch.zeros(64, 256).to(E4M3), scale=torch.ones(())
    ),
    "numbers with a separate `scale`": packed(weight=torch.zeros(64, 256, dtype=torch.int8), scale=torch.ones(64, 1)),
    "fp8 with scales of blocks": packed(weight=torch.zeros(64, 256).to(E4M3), weight_scale_inv=torch.ones(1, 2)),
}


@pytest.mark.parametrize("form", [lambda state: state, comfyui], ids=["official", "comfyui"])
@pytest.mark.parametrize("kind", FORMATS)
def test_other_formats_are_refused_by_their_name(tmp_path, golden, kind, form):
    state = {name: tensor for name, tensor in form(golden).items() if name != f"{LAYER}.weight"}
    path = saved(tmp_path, state | FORMATS[kind])
    with pytest.raises(CheckpointError, match=f"{LAYER}.* {kind.split(',')[0]}.* give a file in bf16, GGUF,") as caught:
        load_transformer(path)
    assert "config.json" not in str(caught.value)


def test_a_file_that_is_packed_throughout(tmp_path, golden):
    """Even the names by which a form is recognized end otherwise."""
    state = {}
    for name, tensor in golden.items():
        module, _, kind = name.rpartition(".")
        state |= (
            {f"{module}.qweight": torch.zeros(2, 2, dtype=torch.int32), f"{module}.wscales": torch.ones(2)}
            if kind == "weight"
            else {name: tensor}
        )
    with pytest.raises(CheckpointError, match="as svdquant"):
        load_transformer(saved(tmp_path, state))
    renamed = {name.replace("attn.qkv", "attn.to_qkv").replace("x_embedder", "img_in"): t for name, t in state.items()}
    with pytest.raises(CheckpointError, match="as svdquant"):
        load_transformer(saved(tmp_path, renamed))
