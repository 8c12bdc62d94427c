"""Files in the quantized forms of comfy-kitchen: what ComfyUI runs by itself, and what is multiplied out."""

from __future__ import annotations

import pytest
import torch

from ...checkpoints.written_forms import comfyui
from ...support.quantized_files import FORMS, has_kitchen, quantized
from .test_lora import error


@pytest.fixture(scope="module")
def nano(comfy) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(comfy.core("generate.paths").NANO_MODEL)


NAMES = {"official": dict, "comfyui": comfyui}


# Whose layers are exactly one layer when their rows are stacked; scales of the others do not allow it in nano's sizes.
STACKED = ("int8", "convrot_w4a4", "asym_w4a8_int8")


def runs(form: str) -> bool:
    """Whether this ComfyUI and its comfy-kitchen run it."""
    from comfy.quant_ops import QUANT_ALGOS

    kind = "int8_tensorwise" if form == "int8 convrot" else form.split()[0]
    return kind in QUANT_ALGOS and "corrected" not in form and ("6 bits" not in form or has_kitchen(form))


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("form", FORMS)
def test_every_form(comfy, nano, sample, empty, form, names):
    """Layers have the file's numbers, stay quantized where that is possible, and give the video of these numbers."""
    state, metadata = quantized(NAMES[names](nano), form)
    file = comfy.save("diffusion_models", f"{names}_{form}.safetensors", state, metadata)
    loaded = comfy("UNETLoader", unet_name=file, weight_dtype="default")
    network = loaded.model.diffusion_model
    path = comfy.folder / "models" / "diffusion_models" / file
    wanted = comfy.core("checkpoints.load").load_transformer(path)
    for name, parameter in wanted.named_parameters():
        weight = network.get_parameter(name)
        if is_quantized(weight):
            weight = weight.dequantize()
        # comfy-kitchen rotates some weights back in 16 bits.
        assert (weight.float() - parameter).norm() < (0.01 if "w4a8" in form else 0.004) * parameter.norm(), name
    split = names == "comfyui"
    assert is_quantized(network.blocks[0].attn.proj.weight) == runs(form)
    assert is_quantized(network.blocks[0].attn.qkv.weight) == (runs(form) and (not split or form.startswith(STACKED)))
    assert is_quantized(network.blocks[0].ffn.gate_up.weight) == (runs(form) and form.startswith((*STACKED, "mxfp8")))
    if split:
        wide = comfy.core("checkpoints.load").official_state(wanted, comfy.core("checkpoints.formats").OFFICIAL)
        wide = comfy(
            "UNETLoader", unet_name=comfy.save("diffusion_models", "wide.safetensors", wide), weight_dtype="default"
        )
        videos = sample(empty, wide, steps=1), sample(empty, loaded, steps=1)
        # Their inputs are quantized too, to 4 bits at worst.
        assert error(*videos) < (0.6 if form == "convrot_w4a4" else 0.3)
        assert error(sample(empty, steps=1), videos[1]) > 1e-3


def is_quantized(weight: torch.Tensor) -> bool:
    return type(weight).__name__ == "QuantizedTensor"
