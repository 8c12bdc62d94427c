"""Files in the quantized forms of comfy-kitchen: what ComfyUI runs by itself, and what is multiplied out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ...checkpoints.written_forms import comfyui
from ...support.quantized_files import FORMS, as_description, has_kitchen, is_projection, quantized
from . import cases
from .conftest import ON_CPU, version
from .test_lora import error, official


@pytest.fixture(scope="module")
def nano(comfy) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(comfy.core("generate.paths").NANO_MODEL)


NAMES = {"official": dict, "comfyui": comfyui}


# Whose layers are exactly one layer when their rows are stacked; scales of the others do not allow it in nano's sizes.
STACKED = ("int8", "convrot_w4a4", "asym_w4a8_int8")


# ComfyUI computes quantized models in bf16 on CUDA, with --fp32-unet too: scales of a tensor and of its blocks, and
# their product with a number, are rounded by up to 2 ** -8 each. On the CPU only what is multiplied out is in bf16.
OF_WEIGHTS = 2**-8 if ON_CPU else 3 * 2**-8


def runs(form: str, columns: int = 256) -> bool:
    """Whether this ComfyUI and its comfy-kitchen run it."""
    from comfy.quant_ops import QUANT_ALGOS

    kind = "int8_tensorwise" if form == "int8 convrot" else form.split()[0]
    turned = "w4a8" not in form or columns % 256 == 0
    return kind in QUANT_ALGOS and turned and "corrected" not in form and ("6 bits" not in form or has_kitchen(form))


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
        most = max(OF_WEIGHTS, 0.01 if "w4a8" in form else 0)
        assert (weight.float().cpu() - parameter).norm() < most * parameter.norm(), name
    split, block = names == "comfyui", network.blocks[0]
    for layer, stacked in (
        (block.attn.proj, True),
        (block.ffn.down, True),
        (block.attn.qkv, not split or form.startswith(STACKED)),
        (block.ffn.gate_up, form.startswith((*STACKED, "mxfp8"))),
    ):
        assert is_quantized(layer.weight) == (runs(form, layer.in_features) and stacked)
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


@pytest.fixture(scope="module")
def small(nano) -> dict[str, torch.Tensor]:
    """The first block alone."""
    return {name: tensor for name, tensor in nano.items() if name.startswith("blocks.0.") or "blocks" not in name}


@pytest.fixture(scope="module")
def loras(comfy) -> str:
    """A LoRA of whole and of stacked layers."""
    tensors = official(comfy, {"blocks.0.attn.qkv": 3, "blocks.0.attn.proj": 1, "blocks.0.ffn.w1": 1})
    return comfy.save("loras", "of_one_block.safetensors", tensors)


# So strong that neither quantizing again, where ComfyUI rounds at random, nor bf16 on CUDA hides whether it is there.
STRENGTH = 12.0


@pytest.mark.parametrize("form", ["int8 convrot", "nvfp4", "mxfp8", "asym_w4a8_int8", "svdquant_w4a4"])
def test_loras(comfy, small, sample, empty, loras, form):
    """As on the same weights multiplied out; merged weights are quantized again, as ComfyUI does it."""
    videos = []
    for name, tensors in (
        ("packed.safetensors", quantized(comfyui(small), form)[0]),
        ("wide.safetensors", wide(comfy, small, form)),
    ):
        loaded = comfy("UNETLoader", unet_name=comfy.save("diffusion_models", name, tensors), weight_dtype="default")
        given = comfy("LoraLoaderModelOnly", model=loaded, lora_name=loras, strength_model=STRENGTH)
        videos.append((sample(empty, loaded, steps=1), sample(empty, given, steps=1)))
    (_, changed), (bare_wide, changed_wide) = videos
    assert error(changed, changed_wide) < 0.25 * error(bare_wide, changed_wide)


# In what ComfyUI computes quantized models on this device. What that costs a model that is not quantized is added to
# the errors that quantization may have in fp32.
COMPUTED = "fp32" if ON_CPU else "bf16"


def wide(comfy, state, form):
    """A model in a form, multiplied out."""
    name = comfy.save("diffusion_models", "of_wide.safetensors", quantized(comfyui(state), form)[0])
    load, formats = comfy.core("checkpoints.load"), comfy.core("checkpoints.formats")
    network = load.load_transformer(comfy.folder / "models" / "diffusion_models" / name)
    return load.official_state(network, formats.OFFICIAL)


@pytest.mark.parametrize("form", ["int8 convrot", "nvfp4", "mxfp8", "asym_w4a8_int8", "convrot_w4a4", "float8_e4m3fn"])
def test_saved_and_loaded_again(comfy, small, sample, empty, form):
    import folder_paths

    state, _ = quantized(comfyui(small), form)
    loaded = comfy(
        "UNETLoader", unet_name=comfy.save("diffusion_models", "given.safetensors", state), weight_dtype="default"
    )
    prefix = f"diffusion_models/of {form}"
    comfy("ModelSave", model=loaded, filename_prefix=prefix)
    (path,) = Path(folder_paths.get_output_directory(), "diffusion_models").glob(f"of {form}*.safetensors")
    link = comfy.folder / "models" / "diffusion_models" / path.name
    link.symlink_to(path)
    again = comfy("UNETLoader", unet_name=path.name, weight_dtype="default")
    assert error(sample(empty, loaded, steps=1), sample(empty, again, steps=1)) < 0.02
    layer = again.model.diffusion_model.blocks[0].ffn.down
    assert is_quantized(layer.weight) == (runs(form, layer.in_features) and version() > (0, 8))
    # It is read headless too.
    load = comfy.core("checkpoints.load").load_transformer
    first = load(comfy.folder / "models" / "diffusion_models" / "given.safetensors").state_dict()
    for name, value in load(path).state_dict().items():
        assert (value - first[name]).norm() <= 0.01 * first[name].norm(), name


@pytest.mark.parametrize("weight_dtype", ["default", "bf16", "fp8 rowwise"])
def test_a_dtype_that_comfyui_does_not_read(comfy, small, sample, empty, monkeypatch, weight_dtype):
    """Scales of mxfp8 are F8_E8M0 where comfy-kitchen writes them, at which ComfyUI's reader under dynamic VRAM, played
    here, fails; other writers keep the same bytes as U8."""
    import comfy.utils as utils

    core = comfy.core("files.safetensors_io")
    known = getattr(utils, "_TYPES", None) or pytest.skip("this ComfyUI has no reader of its own")
    read = utils.load_torch_file

    def reader(path, *args, **kwargs):
        for dtype, _ in core.read_header(path).values():
            assert dtype in known.values(), f"KeyError: {dtype}"
        return read(path, *args, **kwargs)

    monkeypatch.setattr(utils, "load_torch_file", reader)
    assert set(core.DTYPES.values()) - set(known.values()) <= {torch.float8_e8m0fnu}
    state, _ = quantized(comfyui(small), "mxfp8", kitchen=False)
    scales = [name for name, tensor in state.items() if name.endswith(".weight_scale")]
    assert scales and all(state[name].dtype == torch.uint8 for name in scales)
    videos = []
    for file in ("bytes.safetensors", "e8m0.safetensors"):
        name = comfy.save("diffusion_models", file, state)
        loaded = comfy("LongCatModelLoader", model_name=name, weight_dtype=weight_dtype)
        videos.append(sample(empty, loaded, steps=1))
        state |= {name: state[name].view(torch.float8_e8m0fnu) for name in scales}
    assert torch.equal(*videos)
    loading, arguments = loaded.cached_patcher_init
    with torch.inference_mode():
        copy = loading(*arguments)
    assert torch.equal(videos[1], sample(empty, copy, steps=1))


@pytest.mark.parametrize("form", FORMS)
def test_other_loaders(comfy, small, sample, empty, form):
    """Described in the header and under a prefix that ComfyUI does not know; and quantized again, row by row."""
    state, metadata = quantized(comfyui(small), form, metadata=True)
    layers = json.loads(metadata["_quantization_metadata"])["layers"]
    layers = {f"transformer.{layer}": about for layer, about in layers.items()}
    name = comfy.save(
        "diffusion_models",
        "headed.safetensors",
        {f"transformer.{name}": tensor for name, tensor in state.items()},
        {"_quantization_metadata": json.dumps({"layers": layers})},
    )
    plain = comfy.save("diffusion_models", "plain.safetensors", quantized(comfyui(small), form)[0])
    first = comfy("UNETLoader", unet_name=plain, weight_dtype="default")
    again = comfy("LongCatModelLoader", model_name=name, weight_dtype="default")
    layer = again.model.diffusion_model.blocks[0].ffn.down
    assert is_quantized(layer.weight) == runs(form, layer.in_features)
    video = sample(empty, first, steps=1)
    assert torch.equal(video, sample(empty, again, steps=1))
    # Against the same numbers in fp32: `first` may round its inputs too, to 4 bits at worst, and computes in bf16.
    rowwise = comfy("LongCatModelLoader", model_name=name, weight_dtype="fp8 rowwise")
    plain = comfy.save("diffusion_models", "plain_wide.safetensors", wide(comfy, small, form))
    wanted, rounded = (
        sample(empty, comfy("LongCatModelLoader", model_name=plain, weight_dtype=dtype), steps=1)
        for dtype in ("fp32", COMPUTED)
    )
    assert error(wanted, sample(empty, rowwise, steps=1)) < 0.3 + error(rounded, wanted)


def test_descriptions_of_other_writers(comfy, small, sample, empty):
    """Without a format, nested, with the switch for 16-bit products, and with scales in other shapes."""
    state, _ = quantized(comfyui(small), "int8 convrot")
    first = comfy(
        "UNETLoader", unet_name=comfy.save("diffusion_models", "a.safetensors", state), weight_dtype="default"
    )
    video = sample(empty, first, steps=1)
    rotated = {"convrot": True, "convrot_groupsize": 64}
    for about in (
        rotated | {"per_row": True},
        {"format": "int8_tensorwise", "params": rotated},
        rotated | {"format": "int8_tensorwise", "full_precision_matrix_mult": True},
    ):
        other = {
            name: as_description(about) if name.endswith("comfy_quant") and len(tensor) else tensor
            for name, tensor in state.items()
        }
        for name in state:
            if name.endswith("weight_scale") and "per_row" in about:
                other[name] = state[name].flatten()
            if name.endswith("ffn.w2.comfy_quant"):
                # Its columns are rotated by 256.
                other[name] = as_description(about | {"convrot_groupsize": 256, "params": {"convrot": True}})
        name = comfy.save("diffusion_models", "b.safetensors", other)
        loaded = comfy("UNETLoader", unet_name=name, weight_dtype="default")
        off = error(video, sample(empty, loaded, steps=1))
        assert off == 0 if "full_precision_matrix_mult" not in about else off < 0.1, about


@pytest.mark.parametrize("form", ["int8 convrot", "nvfp4", "mxfp8", "asym_w4a8_int8", "svdquant_w4a4", "awq_w4a16"])
@pytest.mark.parametrize("embedding", [False, True])
def test_text_encoders(comfy, prompts, form, embedding):
    from safetensors.torch import load_file

    state = load_file(comfy.core("generate.paths").NANO_TEXT_ENCODER)
    quantizes = (
        (lambda name, tensor: is_projection(name, tensor) or name == "shared.weight") if embedding else is_projection
    )
    out, _ = quantized(state, form, quantizes=quantizes)
    name = comfy.save("text_encoders", "quantized.safetensors", out)
    clip = comfy("LongCatTextEncoderLoader", text_encoder_name=name, device="default")
    layer = clip.patcher.model.get_submodule("umt5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q")
    assert is_quantized(layer.weight) == (runs(form, layer.in_features) and not embedding)
    found, wanted = comfy("CLIPTextEncode", clip=clip, text=cases.PROMPT)[0][0], prompts["positive"][0][0]
    assert 0 < (found - wanted).norm() < 0.4 * wanted.norm()
