"""LoRA files through ComfyUI's stock loaders equal the headless merge; what does not match is said."""

from __future__ import annotations

import logging

import pytest
import torch

from .conftest import MODEL, ROUNDING

RANK, SCALE, STRENGTH = 4, 0.5, 0.8
PREFIX, DOT = "lora___lorahyphen___", "___lorahyphen___"
# Official module -> slices that have a LoRA of their own. One of w1, w3 alone, both, and a layer that runs in fp32.
MODULES = {
    "blocks.0.attn.qkv": 3,
    "blocks.0.attn.proj": 1,
    "blocks.0.adaLN_modulation.1": 1,
    "blocks.1.cross_attn.q_linear": 1,
    "blocks.1.cross_attn.kv_linear": 2,
    "blocks.1.ffn.w1": 1,
    "blocks.2.ffn.w1": 1,
    "blocks.2.ffn.w3": 1,
    "blocks.2.ffn.w2": 1,
    "final_layer.linear": 1,
}


def shapes(comfy) -> dict[str, tuple[int, int]]:
    path = comfy.core("generate.paths").NANO_MODEL
    return {name: shape for name, (_, shape) in comfy.core("files.safetensors_io").read_header(path).items()}


def official(comfy, modules=MODULES) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes, tensors = shapes(comfy), {}
    for module, count in modules.items():
        rows, columns = sizes[f"{module}.weight"]
        name = PREFIX + module.replace(".", DOT)
        tensors[f"{name}.lora_down.weight"] = torch.randn(count * RANK, columns, generator=generator) * columns**-0.5
        for i in range(count):
            up = torch.randn(rows // count, RANK, generator=generator) * 0.2
            tensors[f"{name}.lora_up.blocks.{i}.weight" if count > 1 else f"{name}.lora_up.weight"] = up
        tensors[f"{name}.alpha_scale"] = torch.tensor(SCALE)
    return tensors


@pytest.fixture(scope="module")
def lora(comfy) -> str:
    return comfy.save("loras", "official.safetensors", official(comfy))


@pytest.fixture(scope="module")
def merged(comfy, lora):
    """The headless network with the LoRA merged in, as a single file for ComfyUI."""
    load, formats = comfy.core("checkpoints.load"), comfy.core("checkpoints.formats")
    network = load.load_transformer(comfy.core("generate.paths").NANO_MODEL)
    comfy.core("checkpoints.lora").merge_lora(network, comfy.folder / "models" / "loras" / lora, STRENGTH)
    name = comfy.save("diffusion_models", "merged.safetensors", load.official_state(network, formats.OFFICIAL))
    return comfy("LongCatModelLoader", model_name=name, weight_dtype="fp32")


def error(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).abs().max() / one.std())


@pytest.mark.parametrize("node", ["LoraLoaderModelOnly", "LoraLoaderBypassModelOnly"])
def test_official_lora(comfy, model, sample, empty, lora, merged, node):
    plain, expected = sample(empty), sample(empty, merged)
    assert error(plain, expected) > 0.1
    patched = comfy(node, model=model, lora_name=lora, strength_model=STRENGTH)
    assert error(expected, sample(empty, patched)) <= 1e-4 * ROUNDING
    assert torch.equal(plain, sample(empty)), "and the model itself is as it was"


@pytest.mark.parametrize("node", ["LoraLoaderModelOnly", "LoraLoaderBypassModelOnly"])
def test_a_lora_that_was_trained_here(comfy, model, sample, empty, node):
    """What `longcat train-lora` writes, through stock loaders: all of its modules, as the headless merge has them."""
    training, load, formats = (
        comfy.core(name) for name in ("training.lora", "checkpoints.load", "checkpoints.formats")
    )
    path = comfy.folder / "models" / "loras" / "trained.safetensors"
    nano = comfy.core("generate.paths").NANO_MODEL
    recipe = training.Recipe(64, 96, 5, rank=4, alpha=6.0, learning_rate=0.3)
    with torch.inference_mode(False):
        trainer = training.LoraTrainer(load.load_transformer(nano), recipe)
        generator = torch.Generator().manual_seed(0)
        latents, context = (torch.randn(*shape, generator=generator) for shape in ((16, 2, 8, 12), (5, 128)))
        for number in range(6):
            trainer.step(number, {2: [comfy.core("training.clips").Sample(latents, context)]}, context[:1])
        adapters = {name: tuple(tensor.shape) for name, tensor in trainer.parameters.items()}
        file = training.LoraFile(path, recipe.rank, recipe.scaling, {"model": "nano"}, adapters)
        file.write(trainer.state(), 6)
        network = load.load_transformer(nano, lora=[(path, STRENGTH)])
    name = comfy.save("diffusion_models", "merged_trained.safetensors", load.official_state(network, formats.OFFICIAL))
    expected = sample(empty, comfy("LongCatModelLoader", model_name=name, weight_dtype="fp32"))
    patched = comfy(node, model=model, lora_name=path.name, strength_model=STRENGTH)
    assert error(sample(empty), expected) > 0.1
    assert error(expected, sample(empty, patched)) <= 1e-4 * ROUNDING
    if node == "LoraLoaderModelOnly":
        wanted = {f"diffusion_model.blocks.{i}.{layer}.weight" for i in range(6) for layer in training.LAYERS}
        assert set(patched.patches) == wanted


def test_official_lora_on_fp8_weights(comfy, sample, empty, lora):
    loaded = comfy("UNETLoader", unet_name=MODEL, weight_dtype="fp8_e4m3fn")
    patched = comfy("LoraLoaderModelOnly", model=loaded, lora_name=lora, strength_model=STRENGTH)
    assert error(sample(empty, loaded), sample(empty, patched)) > 0.1


def test_weights_that_stay_in_ram_are_patched_at_use(comfy, model, sample, empty, lora, merged, monkeypatch):
    """Where GPU memory is short ComfyUI casts and patches layers as they are called; forced here on the CPU."""
    from comfy import model_management

    patched = comfy("LoraLoaderModelOnly", model=model, lora_name=lora, strength_model=STRENGTH)
    loading = type(patched).load
    lowered = []

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
        if type(self.model).__name__ != "LongCatVideo":
            return loading(self, device_to, lowvram_model_memory, force_patch_weights, full_load)
        out = loading(self, device_to, 64 * 1024, force_patch_weights, False)
        lowered.append(sum(bool(getattr(m, "weight_function", [])) for m in self.model.modules()))
        return out

    expected = sample(empty, merged)
    monkeypatch.setattr(type(patched), "load", load)
    fresh = patched.clone()
    model_management.unload_all_models()
    out = sample(empty, fresh)
    model_management.unload_all_models()
    assert lowered and lowered[-1] >= 5, "layers with a LoRA are patched at use"
    assert error(expected, out) <= 1e-4


@pytest.mark.parametrize("style", ["diffusion_model.", "transformer.", "base_model.model.", "lora_unet_"])
def test_plain_loras_under_official_names(comfy, model, sample, empty, style):
    """PEFT and kohya files with the official module names, as trainers write them."""
    sizes = shapes(comfy)
    tensors = {}
    for module in ("blocks.0.attn.qkv", "blocks.1.cross_attn.q_linear", "blocks.1.ffn.w3"):
        rows, columns = sizes[f"{module}.weight"]
        name = style + (module.replace(".", "_") if style == "lora_unet_" else module)
        down, up = ("lora_down", "lora_up") if style == "lora_unet_" else ("lora_A", "lora_B")
        tensors[f"{name}.{down}.weight"] = torch.ones(2, columns) * 0.05
        tensors[f"{name}.{up}.weight"] = torch.linspace(-0.1, 0.1, rows * 2).view(rows, 2)
    lora = comfy.save("loras", f"plain_{style.strip('._')}.safetensors", tensors)
    patched = comfy("LoraLoaderModelOnly", model=model, lora_name=lora, strength_model=1.0)
    weights = {"attn.qkv": 0, "cross_attn.q": 1, "ffn.gate_up": 1}
    changed = {f"diffusion_model.blocks.{i}.{name}.weight" for name, i in weights.items()}
    assert set(patched.patches) == changed
    assert error(sample(empty), sample(empty, patched)) > 1e-3


def lora_like(comfy, name: str, metadata: dict | None = None, spelling=lambda name: name, **more) -> str:
    """A LoRA of two layers of the first block, one a part of a stacked weight, always the same numbers."""
    sizes, generator, tensors = shapes(comfy), torch.Generator().manual_seed(0), {}
    for module, form in (("blocks.0.attn.proj", "blocks.0.self_attn.o"), ("blocks.0.ffn.w3", "blocks.0.ffn.w3")):
        rows, columns = sizes[f"{module}.weight"]
        tensors[spelling(f"{form}.lora_A.weight")] = torch.randn(RANK, columns, generator=generator) * 0.1
        tensors[spelling(f"{form}.lora_B.weight")] = torch.randn(rows, RANK, generator=generator) * 0.1
        tensors |= {spelling(f"{form}.{part}"): tensor.clone() for part, tensor in more.items()}
    return comfy.save("loras", name, tensors, metadata)


CONFIG = '{"transformer.r": 4, "transformer.lora_alpha": 16}'
STATED = {
    "diffusers": ({"lora_adapter_metadata": CONFIG}, "diffusion_model.", ""),
    "finetrainers": ({"lora_config": '{"r": 4, "lora_alpha": 16}'}, "transformer.", ""),
    "kohya, with dots": ({"ss_network_alpha": "16"}, "lora_unet_", ""),
    "DiffSynth's names": ({"alpha": "16"}, "pipe.dit.", ""),
    "PEFT": (None, "base_model.model.", '{"peft_type": "LORA", "r": 4, "lora_alpha": 16}'),
}


@pytest.mark.parametrize("writer", STATED)
def test_alpha_outside_the_tensors_counts_as_in_the_core(comfy, model, sample, empty, writer, caplog):
    metadata, prefix, config = STATED[writer]
    folder = comfy.folder / "models" / "loras" / f"of_{len(writer)}"
    folder.mkdir(exist_ok=True)
    if config:
        (folder / "adapter_config.json").write_text(config)
    name = f"{folder.name}/adapter_model.safetensors"
    lora_like(comfy, name, metadata, lambda key: prefix + key)
    tensors = lora_like(
        comfy, "with_alpha.safetensors", None, lambda key: f"diffusion_model.{key}", alpha=torch.tensor(16.0)
    )
    with caplog.at_level(logging.WARNING):
        wanted, found = (
            sample(empty, comfy("LoraLoaderModelOnly", model=model, lora_name=lora, strength_model=1.0))
            for lora in (tensors, name)
        )
    assert error(sample(empty), wanted) > 1e-2 and error(wanted, found) < 1e-5
    assert caplog.text.count("the LoRA counts 4 times, by alpha 16 at rank 4 of") == 1


def test_a_lora_without_effect_and_a_broken_alpha_are_said(comfy, model, caplog):
    lora = lora_like(comfy, "zero.safetensors", None, lambda key: f"diffusion_model.{key}", alpha=torch.tensor(0.0))
    with caplog.at_level(logging.WARNING):
        comfy("LoraLoaderModelOnly", model=model, lora_name=lora, strength_model=1.0)
    assert "LongCat: zero.safetensors changes nothing: its alpha is 0" in caplog.text
    for alpha in (torch.ones(2), torch.tensor(float("nan"))):
        lora = lora_like(comfy, "bad.safetensors", None, lambda key: f"diffusion_model.{key}", alpha=alpha)
        with pytest.raises(ValueError, match=r"bad.safetensors has .* blocks.0.* download it again"):
            comfy("LoraLoaderModelOnly", model=model, lora_name=lora, strength_model=1.0)


@pytest.mark.parametrize("kind", ["diff", "lokr", "dora"])
def test_other_kinds_are_left_to_comfyui(comfy, model, sample, empty, kind):
    rows, columns = shapes(comfy)["blocks.0.attn.proj.weight"]
    name = "diffusion_model.blocks.0.self_attn.o"
    tensors = {
        "diff": {f"{name}.diff": torch.eye(rows, columns) * 0.3},
        "lokr": {f"{name}.lokr_w1": torch.eye(2) * 0.3, f"{name}.lokr_w2": torch.eye(rows // 2, columns // 2)},
        "dora": {
            f"{name}.lora_down.weight": torch.eye(4, columns),
            f"{name}.lora_up.weight": torch.eye(rows, 4) * 0.3,
            f"{name}.dora_scale": torch.ones(rows, 1),
        },
    }[kind]
    other = {"diffusion_model.blocks.1.self_attn.o.lora_A.weight": torch.ones(2, columns) * 0.02,
             "diffusion_model.blocks.1.self_attn.o.lora_B.weight": torch.ones(rows, 2) * 0.02}  # fmt: skip
    lora = comfy.save("loras", f"{kind}.safetensors", tensors | other)
    patched = comfy("LoraLoaderModelOnly", model=model, lora_name=lora, strength_model=1.0)
    assert set(patched.patches) == {f"diffusion_model.blocks.{i}.attn.proj.weight" for i in range(2)}
    assert error(sample(empty), sample(empty, patched)) > 1e-3


def test_a_lora_that_matches_nothing_is_refused(comfy, model):
    tensors = {f"transformer.single_blocks.{i}.linear1.lora_A.weight": torch.ones(2, 8) for i in range(5)}
    lora = comfy.save("loras", "foreign.safetensors", tensors)
    with pytest.raises(ValueError, match=r"0 of its 5 modules.*single_blocks.0.linear1.*and 2 more.*another model"):
        comfy("LoraLoaderModelOnly", model=model, lora_name=lora, strength_model=1.0)


def test_unmatched_modules_are_counted_and_named(comfy, model, caplog):
    tensors = official(comfy, {"blocks.0.attn.proj": 1})
    stranger = PREFIX + "blocks.0.audio_attn.proj".replace(".", DOT)
    tensors[f"{stranger}.lora_down.weight"] = torch.ones(2, 8)
    tensors[f"{stranger}.lora_up.weight"] = torch.ones(8, 2)
    lora = comfy.save("loras", "partly.safetensors", tensors)
    with caplog.at_level(logging.WARNING):
        patched = comfy("LoraLoaderModelOnly", model=model, lora_name=lora, strength_model=1.0)
    assert len(patched.patches) == 1
    assert "matches 1 of its 2 modules" in caplog.text and stranger in caplog.text


def test_a_lora_of_another_size_is_refused(comfy, model):
    name = PREFIX + "blocks.0.attn.proj".replace(".", DOT)
    tensors = {
        f"{name}.lora_down.weight": torch.ones(2, 4096),
        f"{name}.lora_up.weight": torch.ones(4096, 2),
        f"{name}.alpha_scale": torch.tensor(1.0),
    }
    lora = comfy.save("loras", "large.safetensors", tensors)
    with pytest.raises(ValueError, match=r"\[4096, 4096\].*another size"):
        comfy("LoraLoaderModelOnly", model=model, lora_name=lora, strength_model=1.0)


def test_a_broken_lora_is_refused(comfy, model):
    tensors = official(comfy, {"blocks.0.attn.qkv": 3})
    del tensors[next(name for name in tensors if name.endswith("blocks.1.weight"))]
    lora = comfy.save("loras", "broken.safetensors", tensors)
    with pytest.raises(ValueError, match=r"broken LoRA for blocks.0.attn.qkv.*download"):
        comfy("LoraLoaderModelOnly", model=model, lora_name=lora, strength_model=1.0)


def test_other_models_loras_are_left_alone(comfy):
    """The wrapped functions pass through what is not LongCat-Video's."""
    import comfy.lora
    import comfy.lora_convert

    tensors = {"diffusion_model.x.lora_A.weight": torch.ones(2, 2)}
    assert comfy.lora_convert.convert_lora(tensors) is tensors
    assert comfy.lora.load_lora(tensors, {"diffusion_model.y": "y.weight"}) == {}
    plain = torch.nn.ModuleDict({"diffusion_model": torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2)})})
    plain.model_config = type("Config", (), {"unet_config": {}})
    assert type(comfy.lora.model_lora_keys_unet(plain, {})) is dict
