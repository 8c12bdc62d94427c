"""Weights in fp8 row by row: as the headless pipeline has them, under LoRAs, streaming, switches, compiling, saving."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from . import cases
from .conftest import MODEL, ON_CPU, version
from .test_lora import STRENGTH, error, official


@pytest.fixture(scope="module")
def loaded(comfy):
    return comfy("LongCatModelLoader", model_name=MODEL, weight_dtype="fp8 rowwise")


def weights(comfy, model) -> dict[str, torch.Tensor]:
    layers = comfy.node("comfy_fp8").layers(model.model.diffusion_model)
    return {name: layer.weight.detach().cpu().clone().view(torch.uint8) for name, layer in layers.items()}


def test_equals_the_headless_network(comfy, loaded, model, sample, empty, prompts):
    """On the same text, to the last digits: one that differs makes numbers of e4m3 fall the other way."""
    quantization, load = comfy.core("optimize.quantization"), comfy.core("checkpoints.load")
    path, dtype, device = comfy.core("generate.paths").NANO_MODEL, loaded.model.compute_dtype(), loaded.load_device
    network = load.load_transformer(path, dtype=dtype, device=device, fp8=quantization.Policy())
    context = prompts["positive"][0][0].to(device)
    noise = comfy.core("sampling.conditioning").seeded_noise(tuple(empty["samples"].shape), 3)
    schedule = comfy.core("sampling.schedules").make_schedule("base", 1)
    text = context, (context != 0).any(-1)
    expected = (
        comfy.core("sampling.sampler").sample(network, noise.to(device), schedule, *text, guidance_scale=1.0).cpu()
    )
    one = {"steps": 1, "guidance": 1.0, "seed": 3}
    out, plain = (m.model.process_latent_in(sample(empty, m, **one)) for m in (loaded, model))
    # Products in 8 bits have results in bf16, and numbers of e4m3 fall the other way.
    native = device.type == "cuda" and error(plain, out) > 3 * error(expected, out)
    assert (out - expected).abs().max() <= 1e-4 or native
    assert (out - plain).abs().max() > 1e-2, "and fp8 is something else than 16 bits"


def test_is_as_far_from_16_bits_as_the_headless_pipeline(loaded, sample, empty, headless):
    case = cases.CASES["text"]
    settings = {"seed": case["seed"], "steps": 1, "guidance": 1.0, "mode": case["schedule"]}
    out = loaded.model.process_latent_in(sample(empty, loaded, **settings))
    here, there = ((fp8 - headless["not fp8"]).norm() for fp8 in (out, headless["fp8"]))
    assert 0.8 < here / there < 1.25


def test_layers_and_their_numbers(comfy, loaded, model):
    quantization = comfy.core("optimize.quantization")
    layers = comfy.node("comfy_fp8").layers(loaded.model.diffusion_model)
    config = loaded.model.diffusion_model.config
    assert list(layers) == quantization.Policy().names(config.depth)
    plain = {name: parameter.cpu() for name, parameter in model.model.diffusion_model.named_parameters()}
    for name, layer in layers.items():
        values, scales = quantization.without_scales(layer.weight.cpu(), layer.out_features)
        full = quantization.dequantized(values, scales, torch.float32)
        assert error(plain[f"{name}.weight"], full) < 0.5
        assert (values.float().abs().amax(1) == 448).all()
        assert layer.bias is None or torch.equal(layer.bias.cpu().float(), plain[f"{name}.bias"])
    assert loaded.model_size() < 0.6 * model.model_size()


@pytest.fixture(scope="module")
def lora(comfy) -> str:
    modules = {"blocks.0.attn.qkv": 3, "blocks.1.cross_attn.q_linear": 1, "blocks.1.ffn.w1": 1, "blocks.2.ffn.w2": 1}
    return comfy.save("loras", "for_fp8.safetensors", official(comfy, modules))


@pytest.fixture(scope="module")
def merged(comfy, lora) -> str:
    """The LoRA merged headless, at full precision, as a file."""
    load, formats = comfy.core("checkpoints.load"), comfy.core("checkpoints.formats")
    network = load.load_transformer(comfy.core("generate.paths").NANO_MODEL)
    comfy.core("checkpoints.lora").merge_lora(network, comfy.folder / "models" / "loras" / lora, STRENGTH)
    return comfy.save("diffusion_models", "merged_for_fp8.safetensors", load.official_state(network, formats.OFFICIAL))


def test_lora_is_merged_before_quantizing(comfy, loaded, sample, empty, lora, merged):
    before, plain = weights(comfy, loaded), sample(empty, loaded)
    patched = comfy("LoraLoaderModelOnly", model=loaded, lora_name=lora, strength_model=STRENGTH)
    one = {"steps": 1, "guidance": 1.0}
    out, here = sample(empty, patched, **one), weights(comfy, patched)
    expected = comfy("LongCatModelLoader", model_name=merged, weight_dtype="fp8 rowwise")
    wanted, there = sample(empty, expected, **one), weights(comfy, expected)
    # Processors add a LoRA in different orders, so now and then a number of e4m3 falls the other way, of a weight or of
    # an activation. Merging into quantized weights would differ everywhere.
    changed = sum(int((before[name] != there[name]).sum()) for name in there)
    differing = sum(int((here[name] != there[name]).sum()) for name in there)
    assert changed > 1e5 and differing <= (1e-3 if ON_CPU else 0.05) * changed
    apart, near = ((found - wanted).norm() / wanted.norm() for found in (sample(empty, loaded, **one), out))
    assert apart > 0.01 > 5 * near
    for strength in (0.3, 0.0):
        other = comfy("LoraLoaderModelOnly", model=patched, lora_name=lora, strength_model=strength)
        assert sample(empty, other).isfinite().all()
    assert torch.equal(plain, sample(empty, loaded))
    after = weights(comfy, loaded)
    assert all(torch.equal(after[name], before[name]) for name in before), "the very same bytes"


def test_without_its_file_a_lora_goes_into_what_is_kept(comfy, loaded, sample, empty, lora, monkeypatch, caplog):
    broken = comfy.core("errors").CheckpointError("the file is gone; put it back")

    def gone() -> torch.Tensor:
        raise broken

    plain = sample(empty, loaded)
    for layer in comfy.node("comfy_fp8").layers(loaded.model.diffusion_model).values():
        monkeypatch.setattr(layer, "original", gone)
    patched = comfy("LoraLoaderModelOnly", model=loaded, lora_name=lora, strength_model=STRENGTH)
    out = sample(empty, patched)
    assert error(plain, out) > 0.1 and "the file is gone" in caplog.text
    assert torch.equal(plain, sample(empty, loaded))


def test_layers_that_are_streamed_and_patched_at_use(comfy, loaded, sample, empty, lora, monkeypatch):
    """As where GPU memory is short; forced here on the CPU."""
    from comfy import model_management

    patched = comfy("LoraLoaderModelOnly", model=loaded, lora_name=lora, strength_model=STRENGTH)
    one = {"steps": 1, "guidance": 1.0}
    expected = sample(empty, patched, **one)
    loading, functions = type(patched).load, []

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
        if type(self.model).__name__ != "LongCatVideo":
            return loading(self, device_to, lowvram_model_memory, force_patch_weights, full_load)
        out = loading(self, device_to, 64 * 1024, force_patch_weights, False)
        functions.append(sum(bool(m.weight_function) for m in comfy.node("comfy_fp8").layers(self.model).values()))
        return out

    monkeypatch.setattr(type(patched), "load", load)
    model_management.unload_all_models()
    out = sample(empty, patched.clone(), **one)
    model_management.unload_all_models()
    assert functions and functions[-1] >= 3
    # Those layers multiply in wider precision.
    assert 0 < error(expected, out) < 0.2


def test_loras_under_dynamic_vram_are_merged_once(comfy, sample, empty, lora):
    """ComfyUI hands patches over as functions of layers that it streams, which CPUs do not do; played here."""
    if version() < (0, 30):
        pytest.skip("this ComfyUI has no dynamic VRAM")
    from comfy import memory_management, model_management, model_patcher

    loaded = comfy("LongCatModelLoader", model_name=MODEL, weight_dtype="fp8 rowwise")
    before = weights(comfy, loaded)
    patched = comfy("LoraLoaderModelOnly", model=loaded, lora_name=lora, strength_model=STRENGTH)
    sample(empty, patched, steps=1)
    merged = weights(comfy, patched)
    sample(empty, loaded, steps=1)
    layers = comfy.node("comfy_fp8").layers(loaded.model.diffusion_model)
    # In RAM, where dynamic VRAM keeps them.
    model_management.unload_all_models()

    def hand_over(patches: dict) -> None:
        for name, layer in layers.items():
            key = f"diffusion_model.{name}.weight"
            layer.weight_lowvram_function = model_patcher.LowVramPatch(key, patches) if key in patches else None
            assert layer.weight_lowvram_function is None

    pins = {}
    for name, layer in layers.items():
        both = [layer.weight, layer.bias]
        pins[name] = torch.zeros(memory_management.vram_aligned_size(both), dtype=torch.uint8)
        layer._pins = {"weights": {"pin": pins[name]}, "patches": {}}
    hand_over(patched.patches)
    after = weights(comfy, loaded)
    assert all(torch.equal(after[name], merged[name]) for name in after)
    changed = [name for name in after if not torch.equal(after[name], before[name])]
    assert len(changed) == 4
    for name in changed:
        pinned, _ = memory_management.interpret_gathered_like([layers[name].weight, layers[name].bias], pins[name])
        assert torch.equal(pinned.view(torch.uint8), merged[name])
    kept = layers[changed[0]].weight
    hand_over({key: patch[:] for key, patch in patched.patches.items()})
    assert layers[changed[0]].weight is kept, "the same LoRA again is merged already"
    state = loaded.model.diffusion_model.state_dict()
    assert all(torch.equal(state[f"{name}.weight"].view(torch.uint8), before[name]) for name in before)
    stronger = comfy("LoraLoaderModelOnly", model=patched, lora_name=lora, strength_model=0.5)
    hand_over(stronger.patches)
    assert not torch.equal(weights(comfy, loaded)[changed[0]], merged[changed[0]])
    hand_over({})
    after = weights(comfy, loaded)
    assert all(torch.equal(after[name], before[name]) for name in before), "the very same bytes"


def test_pages_of_dynamic_vram_hold_what_is_packed(comfy, loaded, monkeypatch):
    """ComfyUI's own code for a layer that it pages in, with the driver's part of it played on the CPU."""
    if version() < (0, 30):
        pytest.skip("this ComfyUI has no dynamic VRAM")
    import comfy_aimdo.model_vbar
    import comfy_aimdo.torch
    from comfy import memory_management, model_management, ops, pinned_memory

    def gathered(tensors, destination, non_blocking=False, stream=None, r2=None):
        views = memory_management.interpret_gathered_like(tensors, r2 if destination is None else destination)
        for view, tensor in zip(views, tensors, strict=True):
            if view is not None:
                view.copy_(tensor)

    pinned: list[int] = []
    for module, name, stand_in in (
        (comfy_aimdo.model_vbar, "vbar_fault", lambda page: pinned.append(1) or 7),
        (comfy_aimdo.model_vbar, "vbar_signature_compare", lambda one, other: one == other),
        (comfy_aimdo.model_vbar, "vbar_unpin", lambda page: pinned.pop()),
        (comfy_aimdo.torch, "aimdo_to_tensor", lambda page, device: page),
        (model_management, "get_offload_stream", lambda device: None),
        (model_management, "sync_stream", lambda *_: None),
        (model_management, "is_device_cpu", lambda device: False),
        (model_management, "cast_to_gathered", gathered),
        (pinned_memory, "get_pin", lambda *_, **__: None),
        (pinned_memory, "pin_memory", lambda *_, **__: None),
    ):
        monkeypatch.setattr(module, name, stand_in)
    layer = copy.deepcopy(comfy.node("comfy_fp8").layers(loaded.model.diffusion_model)["blocks.1.cross_attn.q"])
    layer.dtype = layer.bias.dtype
    both = [layer.weight, layer.bias]
    # What loading for dynamic VRAM sets.
    layer._v, layer._v_signature = torch.zeros(memory_management.vram_aligned_size(both), dtype=torch.uint8), None
    layer.seed_key = "a layer"
    for name in ("weight", "bias"):
        setattr(layer, f"{name}_lowvram_function", None)
        setattr(layer, f"{name}_function", [])

    def paged() -> torch.Tensor:
        x = SimpleNamespace(device=torch.device("cuda:0"), dtype=layer.dtype)
        weight, bias, used = layer.bare(x)
        assert weight.data_ptr() == layer._v.data_ptr() and torch.equal(bias, layer.bias)
        ops.uncast_bias_weight(*used)
        assert not pinned
        return weight.view(torch.uint8)

    plain = layer.weight.view(torch.uint8).clone()
    assert torch.equal(paged(), plain) and torch.equal(paged(), plain)
    key, rows = "diffusion_model.blocks.1.cross_attn.q.weight", torch.full(layer.shape, 0.01)
    original = torch.randn(layer.shape, generator=torch.Generator().manual_seed(1))
    layer.original = original.clone
    patch = SimpleNamespace(key=key, patches={key: [(1.0, ("diff", (rows,)), 1.0, None, None)]})
    layer.weight_lowvram_function, layer._v_signature = patch, None
    quantization, elementwise = comfy.core("optimize.quantization"), comfy.core("optimize.kernels.elementwise")
    # Where the pack quantizes: a GPU divides by a scale in another way than a CPU, to the last digit.
    changed = (original + rows).to(model_management.get_torch_device())
    merged = quantization.with_scales(*elementwise.quantize_rows(changed)).view(torch.uint8).cpu()
    assert torch.equal(paged(), merged)
    layer.weight_lowvram_function, layer._v_signature = None, None
    assert torch.equal(paged(), plain)


def test_the_switch_and_what_is_said_of_it(comfy, loaded, model, sample, empty):
    on, report = comfy("LongCatOptimizations", model=loaded)
    layers = len(comfy.node("comfy_fp8").layers(loaded.model.diffusion_model))
    missing = comfy.core("optimize.quantization").missing(loaded.load_device)
    why = f", multiplied in wider precision: {missing}" if missing else ""
    assert f"fp8: on ({layers} layers{why})" in report
    off, report = comfy("LongCatOptimizations", model=loaded, fp8=False)
    assert f"fp8: off ({layers} layers)" in report
    _, report = comfy("LongCatOptimizations", model=model)
    assert "fp8: on (without effect: no layer is in fp8" in report
    eight, sixteen, plain = sample(empty, on), sample(empty, off), sample(empty, model)
    assert torch.equal(eight, sample(empty, loaded))
    assert error(plain, sixteen) > 1e-3 and error(plain, sixteen) < error(plain, eight) < 0.5


def test_compiled_blocks(comfy, loaded, sample, empty, monkeypatch):
    compiled_block = comfy.core("optimize.compiled_blocks").COMPILED_BLOCK
    monkeypatch.setattr(compiled_block, "backend", "aot_eager")
    compiled_block.forget()
    compiled, _ = comfy("LongCatOptimizations", model=loaded, compile="blocks")
    try:
        assert error(sample(empty, loaded, steps=1), sample(empty, compiled, steps=1)) < 1e-3
        assert not compiled_block._failed
    finally:
        compiled_block.forget()
        torch._dynamo.reset()


def test_saved_as_bf16_and_loaded_again(comfy, loaded, sample, empty, tmp_path):
    import folder_paths

    comfy("ModelSave", model=loaded, filename_prefix="diffusion_models/eight")
    (path,) = Path(folder_paths.get_output_directory(), "diffusion_models").glob("eight*.safetensors")
    header = comfy.core("files.safetensors_io").read_header(path)
    assert header["model.diffusion_model.blocks.0.attn.qkv.weight"][0] == torch.bfloat16
    (comfy.folder / "models" / "diffusion_models" / path.name).symlink_to(path)
    again = comfy("LongCatModelLoader", model_name=path.name, weight_dtype="fp8 rowwise")
    # Scales are rounded to bf16 on the way.
    assert error(sample(empty, loaded), sample(empty, again)) < 0.05


def test_clones_and_independent_copies(comfy, loaded, sample, empty):
    expected = sample(empty, loaded)
    assert torch.equal(sample(empty, loaded.clone()), expected)
    load, arguments = loaded.cached_patcher_init[:2]
    assert torch.equal(sample(empty, load(*arguments)), expected)
    if version() >= (0, 30):
        assert not loaded.is_dynamic()


def test_bypass_lora(comfy, loaded, sample, empty, lora):
    one = {"steps": 1, "guidance": 1.0}
    plain = sample(empty, loaded, **one)
    bypass = comfy("LoraLoaderBypassModelOnly", model=loaded, lora_name=lora, strength_model=STRENGTH)
    merged = comfy("LoraLoaderModelOnly", model=loaded, lora_name=lora, strength_model=STRENGTH)
    out = sample(empty, bypass, **one)
    assert error(plain, out) > 0.1 and error(sample(empty, merged, **one), out) < 0.2
    assert torch.equal(plain, sample(empty, loaded, **one))
    layers = comfy.node("comfy_fp8").layers(loaded.model.diffusion_model).values()
    bypass.inject_model()
    wide = sum(not layer.takes_quantized for layer in layers)
    bypass.eject_model()
    assert wide == 4, "a LoRA's own layers do not take 8-bit rows"
    assert all(layer.takes_quantized for layer in layers)


def test_torch_compile_model(comfy, one_block, sample, empty):
    from torch._dynamo.utils import counters

    eight = comfy("LongCatModelLoader", model_name="one_block.safetensors", weight_dtype="fp8 rowwise")
    one = {"steps": 1, "guidance": 1.0}
    plain = sample(empty, eight, **one)
    torch._dynamo.reset()
    counters.clear()
    patched = comfy("TorchCompileModel", model=eight, backend="inductor")
    assert error(plain, sample(empty, patched, **one)) < 0.05
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"], "of a block"
    torch._dynamo.reset()
