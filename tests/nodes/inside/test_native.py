"""Which quantized layers are left to ComfyUI: those that it runs on the CPU and on CUDA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ...support.quantized_files import WRITERS, as_description, has_kitchen, is_projection, quantized
from . import cases

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# Form -> (rows, columns) of a layer -> whether ComfyUI runs it.
SIZES = {
    "float8_e4m3fn": {(64, 64): True, (72, 40): True},
    "int8_tensorwise": {(80, 48): True, (72, 64): False, (64, 72): False},
    "int8_tensorwise rows": {(80, 48): True, (72, 64): False},
    "int8 convrot": {(80, 48): True, (64, 64): True, (64, 256): True, (72, 256): False},
    "nvfp4": {(64, 64): True, (64, 80): False},
    "mxfp8": {(64, 64): True, (96, 160): True},
    "convrot_w4a4": {(80, 64): True, (64, 256): True, (72, 64): False, (64, 80): False},
    "asym_w4a8_int8": {(64, 256): True, (64, 768): True, (64, 64): False, (64, 80): False},
    "asym_w4a8_int8 uniform": {(64, 256): True, (64, 64): False},
    "asym_w4a8_int8 of 6 bits": {(64, 256): True, (64, 64): False},
    "asym_w4a8_int8 corrected": {(64, 256): False},
    "svdquant_w4a4": {(128, 64): False},
    "awq_w4a16": {(64, 64): False},
}
CASES = [(form, size, native) for form, sizes in SIZES.items() for size, native in sizes.items()]


def layer_of(form: str, rows: int, columns: int) -> tuple[dict[str, torch.Tensor], dict]:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns))
    tensors, about = WRITERS[form](weight)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, about


def runs(comfy, tensors: dict[str, torch.Tensor], about: dict) -> bool:
    weights, formats = comfy.node("comfy_weights"), comfy.core("checkpoints.formats")
    collect = comfy.core("checkpoints.stored").collect
    state = {f"layer.{name}": tensor for name, tensor in tensors.items()}
    state["layer.comfy_quant"] = as_description(about)
    file = weights.StateDict(state)
    stored, _ = collect(Path("file"), {Path("file"): file}, formats.OFFICIAL, "", left=weights.QUANT_ALGOS)
    return weights.runs(stored, "layer", about)


def known(form: str) -> bool:
    from comfy.quant_ops import QUANT_ALGOS

    kind = "int8_tensorwise" if form == "int8 convrot" else form.split()[0]
    return kind in QUANT_ALGOS and ("6 bits" not in form or has_kitchen(form))


@pytest.mark.parametrize("form, size, native", CASES)
def test_sizes(comfy, form, size, native):
    """Layers that are left to ComfyUI give the product of their numbers on this device."""
    from comfy import model_management, ops

    tensors, about = layer_of(form, *size)
    assert runs(comfy, tensors, about) == (native and known(form))
    if not (native and known(form)):
        return
    device = model_management.get_torch_device()
    about = comfy.node("comfy_weights").meant(about, tensors["weight"].dtype, tensors["weight"].shape)
    state = {**tensors, "comfy_quant": as_description(about)}
    disabled = {
        name
        for name, there in (
            ("nvfp4", model_management.supports_nvfp4_compute),
            ("mxfp8", getattr(model_management, "supports_mxfp8_compute", lambda device: False)),
            ("float8_e4m3fn", model_management.supports_fp8_compute),
        )
        if not there(device)
    }
    layer = ops.mixed_precision_ops({}, torch.bfloat16, disabled=disabled).Linear(size[1], size[0], bias=False)
    layer.load_state_dict(state)
    layer.to(device)
    given = torch.randn(3, 5, size[1], generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)
    with torch.inference_mode():
        wanted, out = given.float() @ layer.weight.dequantize().float().t(), layer(given)
    # Their inputs are rounded to 4 bits at worst.
    assert (out.float() - wanted).norm() < (0.3 if form == "convrot_w4a4" else 0.06) * wanted.norm()


def changed(tensors, **changes):
    return tensors | {name: change(tensors[name]) for name, change in changes.items()}


def test_tensors_that_no_backend_takes(comfy):
    """They are multiplied out, which takes any dtype and any shape of the same numbers."""
    w4a8, w4a4 = layer_of("asym_w4a8_int8", 64, 256), layer_of("convrot_w4a4", 64, 64)
    turned = {"convrot_groupsize": 64}
    for (tensors, about), changes, settings in (
        (w4a8, {"weight_s_channel": lambda scale: scale[:, None]}, {}),
        (w4a8, {"weight_s_channel": torch.Tensor.bfloat16}, {}),
        (w4a8, {"weight_s_rel": torch.Tensor.bfloat16}, {}),
        (w4a8, {"weight_codebook": torch.Tensor.half}, {}),
        (w4a8, {}, turned),
        (w4a8, {}, {"params": turned, "convrot_groupsize": 64}),
        (w4a4, {"weight_scale": lambda scale: scale[:, None]}, {}),
    ):
        assert runs(comfy, tensors, about) == known(about["format"])
        assert not runs(comfy, changed(tensors, **changes), about | settings), (changes, settings)
    raw = changed(w4a8[0], weight_s_rel=lambda scale: scale.view(torch.uint8))
    assert runs(comfy, raw, w4a8[1]) == known("asym_w4a8_int8")


def test_what_cuda_does_not_multiply_in_8_bits(comfy):
    """PyTorch: "Multiplication of two Float8_e5m2 matrices is not supported"; and both sides must divide by 16."""
    meant = comfy.node("comfy_weights").meant
    e4m3, e5m2, wide = {"format": "float8_e4m3fn"}, {"format": "float8_e5m2"}, {"full_precision_matrix_mult": True}
    assert meant(e4m3, E4M3, (64, 48)) == e4m3
    assert meant(e4m3, E4M3, (72, 64)) == meant(e4m3, E4M3, (64, 72)) == e4m3 | wide
    assert meant(e4m3, E5M2, (64, 64)) == meant(e5m2, E5M2, (64, 64)) == e5m2 | wide
    assert meant(e4m3 | wide, E4M3, (64, 64)) == e4m3 | wide
    assert meant({"format": "int8_tensorwise"}, torch.int8, (72, 72)) == {"format": "int8_tensorwise"}
    assert meant({"per_row": True}, torch.int8, (64, 64)) == {"per_row": True, "format": "int8_tensorwise"}


def e5m2(state: dict[str, torch.Tensor], marker: torch.dtype | None) -> dict[str, torch.Tensor]:
    """A text encoder's projections in scaled e5m2, described by a marker of a dtype or, for None, layer by layer."""
    out = {} if marker is None else {"scaled_fp8": torch.empty(2, dtype=marker)}
    for name, tensor in state.items():
        out[name] = tensor
        if is_projection(name, tensor):
            module, scale = name.removesuffix(".weight"), tensor.float().abs().max() / 57344
            out[name] = (tensor.float() / scale).to(E5M2)
            out[f"{module}.{'weight_scale' if marker is None else 'scale_weight'}"] = scale
            out |= {} if marker else {f"{module}.comfy_quant": as_description({"format": "float8_e5m2"})}
    return out


TEXT_ENCODERS = {
    "e5m2, marker": lambda state: e5m2(state, E5M2),
    "e5m2, marker of fp32": lambda state: e5m2(state, torch.float32),
    "e5m2, described": lambda state: e5m2(state, None),
    "e5m2 as bytes": lambda state: {
        n: t.view(torch.uint8) if t.dtype == E5M2 else t for n, t in e5m2(state, None).items()
    },
    "int8 of another writer": lambda state: {
        name: as_description({"per_row": True}) if name.endswith("comfy_quant") else tensor
        for name, tensor in quantized(state, "int8_tensorwise rows")[0].items()
    },
    "int8 with scales in one row": lambda state: {
        name: tensor.flatten() if name.endswith("weight_scale") else tensor
        for name, tensor in quantized(state, "int8_tensorwise rows")[0].items()
    },
}


@pytest.mark.parametrize("kind", TEXT_ENCODERS)
def test_text_encoders_that_comfyui_would_misread(comfy, prompts, kind):
    """They are described rightly, and stay in 8 bits where this ComfyUI runs them."""
    from safetensors.torch import load_file

    state = TEXT_ENCODERS[kind](load_file(comfy.core("generate.paths").NANO_TEXT_ENCODER))
    name = comfy.save("text_encoders", "misread.safetensors", {n: t.contiguous() for n, t in state.items()})
    clip = comfy("LongCatTextEncoderLoader", text_encoder_name=name, device="default")
    layer = clip.patcher.model.get_submodule("umt5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q")
    stays = known("int8_tensorwise") if "another" in kind else kind.startswith("e5m2,")
    assert (type(layer.weight).__name__ == "QuantizedTensor") == stays
    assert not stays or layer.weight._qdata.dtype == (E5M2 if "e5m2" in kind else torch.int8)
    found, wanted = comfy("CLIPTextEncode", clip=clip, text=cases.PROMPT)[0][0], prompts["positive"][0][0]
    assert 0 < (found - wanted).norm() < 0.4 * wanted.norm()
