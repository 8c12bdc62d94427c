"""Checkpoints and LoRAs in other forms than the official one, through ComfyUI's loaders."""

from __future__ import annotations

import pytest
import torch

from ...checkpoints.written_forms import (
    COMFYUI,
    E4M3,
    comfyui,
    described,
    fastvideo,
    fp8_scaled,
    is_matrix,
    multiplied_out,
    renamed,
    write_gguf,
)
from .conftest import ROUNDING
from .test_lora import DOT, PREFIX, STRENGTH, error, official

NAMES = {"comfyui": comfyui, "fastvideo": fastvideo}


@pytest.fixture(scope="module")
def nano(comfy) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(comfy.core("generate.paths").NANO_MODEL)


@pytest.fixture(scope="module")
def scaled(comfy, nano) -> str:
    return comfy.save("diffusion_models", "split_scaled.safetensors", whole(fp8_scaled(comfyui(nano))))


def whole(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in state.items()}


@pytest.mark.parametrize("form", NAMES)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("loader, widget", [("LongCatModelLoader", "model_name"), ("UNETLoader", "unet_name")])
def test_names(comfy, nano, sample, empty, form, prefix, loader, widget):
    state = {prefix + name: tensor for name, tensor in whole(NAMES[form](nano)).items()}
    name = comfy.save("diffusion_models", f"{form}{len(prefix)}.safetensors", state)
    dtype = "fp32" if loader == "LongCatModelLoader" else "default"
    loaded = comfy(loader, **{widget: name}, weight_dtype=dtype)
    assert type(loaded.model).__name__ == "LongCatVideo"
    assert error(sample(empty), sample(empty, loaded)) < 1e-5 * ROUNDING


def test_a_prefix_that_comfyui_does_not_know(comfy, nano, sample, empty):
    state = {f"transformer.{name}": tensor for name, tensor in whole(fastvideo(nano)).items()}
    name = comfy.save("diffusion_models", "prefixed.safetensors", state)
    loaded = comfy("LongCatModelLoader", model_name=name, weight_dtype="fp32")
    assert torch.equal(sample(empty), sample(empty, loaded))


def test_split_fp8_with_scales(comfy, nano, sample, empty, scaled):
    """Layers that are stored whole stay ComfyUI's own quantized ones; stacked ones are multiplied out."""
    loaded = comfy("LongCatModelLoader", model_name=scaled, weight_dtype="default")
    block = loaded.model.diffusion_model.blocks[0]
    assert type(block.attn.proj.weight).__name__ == "QuantizedTensor" or block.attn.proj.weight.dtype == E4M3
    state = whole(multiplied_out(fp8_scaled(comfyui(nano))))
    qkv = torch.cat([state[f"blocks.0.self_attn.{letter}.weight"] for letter in "qkv"])
    assert torch.equal(block.attn.qkv.weight.float(), qkv.bfloat16().float())
    wide = comfy.save("diffusion_models", "split_wide.safetensors", state)
    wide = comfy("LongCatModelLoader", model_name=wide, weight_dtype="fp32")
    assert error(sample(empty, wide, steps=1), sample(empty, loaded, steps=1)) < 0.2
    assert error(sample(empty, steps=1), sample(empty, wide, steps=1)) > 1e-3


@pytest.mark.parametrize("plain", [False, True])
def test_rowwise_layers_keep_the_numbers_of_the_file(comfy, nano, sample, empty, scaled, plain):
    if plain:
        state = {name: t.to(E4M3) if t.ndim == 2 and ".ffn." in name else t for name, t in whole(comfyui(nano)).items()}
        scaled = comfy.save("diffusion_models", "split_plain.safetensors", state)
    loaded = comfy("LongCatModelLoader", model_name=scaled, weight_dtype="fp8 rowwise")
    quantization, load = comfy.core("optimize.quantization"), comfy.core("checkpoints.load")
    path = comfy.folder / "models" / "diffusion_models" / scaled
    # On the same device: those divide differently in the last bit.
    network = load.load_transformer(path, device=loaded.load_device, fp8=quantization.Policy())
    layers = comfy.node("comfy_fp8").layers(loaded.model.diffusion_model)
    assert list(layers) == quantization.Policy().names(network.config.depth)
    for name, layer in layers.items():
        values, scales = quantization.without_scales(layer.weight, layer.out_features)
        wanted = network.get_submodule(name)
        assert torch.equal(values.view(torch.uint8).cpu(), wanted.weight.view(torch.uint8).cpu())
        assert torch.equal(scales.cpu(), wanted.weight_scale.cpu())
    assert sample(empty, loaded, steps=1).isfinite().all()


def int8_tensorwise(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    out = {}
    for name, tensor in state.items():
        out[name] = tensor
        if is_matrix(name, tensor):
            scale = tensor.float().abs().max() / 127
            out |= {name: (tensor.float() / scale).round().to(torch.int8), f"{name}_scale": scale}
    return described(out, "int8_tensorwise")


OTHERS = {
    "described": lambda state: described(fp8_scaled(state, scale="weight_scale", marker=False), "float8_e4m3fn"),
    "scales by rows": lambda state: fp8_scaled(state, rows=True),
    "scaled e5m2": lambda state: {
        name: tensor.to(torch.float8_e5m2) if tensor.dtype == E4M3 else tensor
        for name, tensor in fp8_scaled(state).items()
    },
    "plain e5m2": lambda state: {n: t.to(torch.float8_e5m2) if is_matrix(n, t) else t for n, t in state.items()},
    "int8_tensorwise": int8_tensorwise,
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("dtype", ["default", "fp8 rowwise"])
def test_other_ways_to_store_8_bits(comfy, nano, sample, empty, kind, dtype):
    state = whole(OTHERS[kind](comfyui(nano)))
    file = comfy.save("diffusion_models", f"other_{kind.replace(' ', '_')}.safetensors", state)
    wide = comfy.save("diffusion_models", "other_wide.safetensors", whole(multiplied_out(state)))
    wide = comfy("LongCatModelLoader", model_name=wide, weight_dtype="fp32")
    loaded = comfy("LongCatModelLoader", model_name=file, weight_dtype=dtype)
    assert error(sample(empty, wide, steps=1), sample(empty, loaded, steps=1)) < 0.3
    assert error(sample(empty, steps=1), sample(empty, wide, steps=1)) > 1e-3
    layer = loaded.model.diffusion_model.blocks[0].attn.proj
    if kind == "scaled e5m2" and dtype == "default":
        # 8 bits in memory, but CUDA does not multiply them.
        assert layer.weight._qdata.dtype == torch.float8_e5m2 and layer._full_precision_mm


@pytest.mark.parametrize("loader, widget", [("LongCatModelLoader", "model_name"), ("UNETLoader", "unet_name")])
def test_fp8_that_is_stored_as_bytes(comfy, nano, sample, empty, loader, widget):
    state = whole(OTHERS["described"](comfyui(nano)))
    raw = {name: tensor.view(torch.uint8) if tensor.dtype == E4M3 else tensor for name, tensor in state.items()}
    videos = []
    for name, tensors in (("fp8.safetensors", state), ("fp8_as_bytes.safetensors", raw)):
        file = comfy.save("diffusion_models", name, tensors)
        videos.append(sample(empty, comfy(loader, **{widget: file}, weight_dtype="default"), steps=1))
    assert torch.equal(*videos)


def test_formats_that_cannot_be_read(comfy, nano):
    scaled = fp8_scaled(comfyui(nano), scale="weight_scale", marker=False)
    for kind, said in (("int3", "as int3, which is not supported"), ("int8_tensorwise", "but stores float8_e4m3fn")):
        file = comfy.save("diffusion_models", f"{kind}.safetensors", whole(described(scaled, kind)))
        with pytest.raises(ValueError, match=said):
            comfy("LongCatModelLoader", model_name=file, weight_dtype="default")


@pytest.mark.parametrize("dtype", ["fp32", "fp8 rowwise"])
def test_gguf(comfy, nano, sample, empty, dtype):
    from importlib.util import find_spec

    path = comfy.folder / "models" / "diffusion_models" / "nano_q8.gguf"
    if find_spec("gguf") is None:
        path.write_bytes(b"GGUF" + bytes(60))
        with pytest.raises(
            ValueError, match=r"nano_q8\.gguf is a GGUF file, which needs a package; run: pip install gguf"
        ):
            comfy("LongCatModelLoader", model_name=path.name, weight_dtype=dtype)
        return
    state = whole(comfyui(nano))
    write_gguf(path, state, {name: "Q8_0" for name, t in state.items() if t.ndim == 2 and t.shape[1] % 32 == 0})
    options = comfy.mappings["LongCatModelLoader"].INPUT_TYPES()["required"]["model_name"][1]["options"]
    assert path.name in options
    out = sample(empty, comfy("LongCatModelLoader", model_name=path.name, weight_dtype=dtype), steps=1)
    assert 1e-4 < error(sample(empty, steps=1), out) < (0.05 if dtype == "fp32" else 0.3)


def test_no_others_are_answered_for(comfy, nano):
    detect = comfy.node("registration").detect
    for form in (comfyui, fastvideo, dict):
        state = form(nano)
        assert detect(state)["image_model"] == "longcat_video"
        assert detect(state | {"blocks.0.audio_cross_attn.q_linear.weight": torch.zeros(2)}) is None, "the avatar model"
        assert detect({name: tensor for name, tensor in state.items() if ".ffn.w1." not in name}) is None
        assert detect({name: t[:, :, 0] if t.ndim == 5 else t for name, t in state.items()}) is None, "an image model"


@pytest.mark.parametrize("kind", ["peft", "kohya", "FastVideo"])
def test_loras_on_split_names(comfy, model, sample, empty, kind):
    """The official LoRA of the same changes gives the same video."""
    given = official(comfy, {"blocks.0.attn.qkv": 3, "blocks.1.cross_attn.kv_linear": 2, "blocks.1.ffn.w3": 1})
    tensors = {}
    for name, down in given.items():
        module, _, part = name.removeprefix(PREFIX).replace(DOT, ".").partition(".lora_")
        if part != "down.weight":
            continue
        ups = [given[key] for key in sorted(given) if key.startswith(name.replace("down.weight", "up"))]
        scale = float(given[name.replace("lora_down.weight", "alpha_scale")])
        stem, letters = module, "-"
        if len(ups) > 1:
            stem, letters = (module[: -len("qkv")], "qkv") if len(ups) == 3 else (module[: -len("kv_linear")], "kv")
        for letter, rows, up in zip(letters, down.chunk(len(ups)), ups, strict=True):
            part = stem + letter if len(ups) > 1 else stem
            alpha = torch.tensor(scale * rows.shape[0])
            if kind == "FastVideo":
                part = part.replace(".attn.", ".self_attn.").replace("attn.q", "attn.to_q")
                part = part.replace("attn.k", "attn.to_k").replace("attn.v", "attn.to_v")
                tensors |= {f"{part}.lora_A": rows, f"{part}.lora_B": up, f"{part}.lora_alpha": alpha}
                continue
            part = renamed(f"{part}.weight", COMFYUI).removesuffix(".weight")
            if kind == "kohya":
                part = "lora_unet_" + part.replace(".", "_")
                tensors |= {f"{part}.lora_down.weight": rows, f"{part}.lora_up.weight": up, f"{part}.alpha": alpha}
            else:
                part = f"diffusion_model.{part}"
                tensors |= {f"{part}.lora_A.weight": rows, f"{part}.lora_B.weight": up, f"{part}.alpha": alpha}
    one = comfy.save("loras", "of_official.safetensors", given)
    other = comfy.save("loras", f"of_{kind}.safetensors", whole(tensors))
    wanted, out = (
        sample(empty, comfy("LoraLoaderModelOnly", model=model, lora_name=name, strength_model=STRENGTH))
        for name in (one, other)
    )
    assert error(sample(empty), wanted) > 1e-2
    assert error(wanted, out) < 1e-4
