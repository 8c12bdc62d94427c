"""Weights in every dtype and place in which ComfyUI keeps them: kernels and fp32 layers read what it would cast.

Triton is played by its kernels' definitions, which refuse parameters that its loads cannot widen.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from ...checkpoints.written_forms import comfyui, fp8_scaled
from .conftest import MODEL
from .test_lora import error

ONE = {"steps": 1, "guidance": 1.0}


def computed_in_fp32(weight_dtype: torch.dtype | None, *_, **__) -> torch.dtype | None:
    """What a CPU answers where ComfyUI asks in which dtype a network computes; None: as its weights are."""
    return None if weight_dtype in (torch.float32, torch.float64) else torch.float32


@pytest.fixture
def kernels(comfy, monkeypatch) -> dict[str, set[torch.dtype]]:
    """Stand-ins for the kernels that read parameters; the dtypes of what they read. Computed in fp32 on GPUs too: a
    number of 8 or 16 bits would fall the other way for a digit that stand-in and definition do not share."""
    from comfy import model_management

    elementwise, layers = comfy.core("optimize.kernels.elementwise"), comfy.core("model.layers")
    text, rope = comfy.core("optimize.kernels.text_attention"), comfy.core("model.rope")
    execution, fused = comfy.core("optimize.execution"), comfy.core("optimize.fused")
    read: dict[str, set[torch.dtype]] = {"layer norm": set(), "rms norm": set(), "text": set()}

    def seen(kind: str, *parameters: Tensor) -> list[Tensor]:
        read[kind] |= {p.dtype for p in parameters}
        assert all(p.dtype in elementwise.READ and p.is_contiguous() for p in parameters)
        return [p.float() for p in parameters]

    def residual_norm(x, update, gate, weight, bias, *, one_plus=False, fp8=False):
        if update is not None:
            x = layers.gated(x, update, x.new_ones(()) if gate is None else gate)
        if one_plus:
            return x, layers.modulate(x, bias, weight)
        return x, F.layer_norm(x.float(), x.shape[-1:], *seen("layer norm", weight, bias), layers.EPS).to(x.dtype)

    def norm_rope(x, weight, tables):
        (wide,) = seen("rms norm", weight)
        x = (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + layers.EPS) * wide).to(x.dtype)
        return x if tables is None else rope.apply_rope(x, *tables)

    def text_attention(q, weight, k, v, bias, *, fp8=False):
        return text.plain_text_attention(q, *seen("text", weight), k, v, bias).to(q.dtype).flatten(2)

    monkeypatch.setattr(elementwise, "residual_norm", residual_norm)
    monkeypatch.setattr(elementwise, "norm_rope", norm_rope)
    monkeypatch.setattr(elementwise, "residual_", lambda x, update, gate: x.copy_(layers.gated(x, update, gate)))
    monkeypatch.setattr(
        elementwise, "gated_product", lambda x, fp8=False: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]
    )
    monkeypatch.setattr(elementwise, "quantize_heads", lambda x: x.flatten(2))
    monkeypatch.setattr(fused, "text_attention", text_attention)
    monkeypatch.setattr(execution, "kernels_usable", lambda x: True)
    monkeypatch.setattr(model_management, "supports_fp8_compute", lambda device=None: False)
    monkeypatch.setattr(model_management, "unet_manual_cast", computed_in_fp32)
    monkeypatch.setattr(comfy.node("comfy_fp8"), "missing", lambda device: "products in 8 bits")
    return read


CASES = {
    "stock default": ("UNETLoader", "default", torch.float32),
    "stock e4m3": ("UNETLoader", "fp8_e4m3fn", torch.float8_e4m3fn),
    "stock e4m3 fast": ("UNETLoader", "fp8_e4m3fn_fast", torch.float8_e4m3fn),
    "stock e5m2": ("UNETLoader", "fp8_e5m2", torch.float8_e5m2),
    "e4m3": ("LongCatModelLoader", "fp8_e4m3fn", torch.float8_e4m3fn),
    "bf16": ("LongCatModelLoader", "bf16", torch.bfloat16),
    "fp16": ("LongCatModelLoader", "fp16", torch.float16),
    "fp32": ("LongCatModelLoader", "fp32", torch.float32),
    "rowwise": ("LongCatModelLoader", "fp8 rowwise", None),
}


@pytest.fixture(scope="module")
def quantized(comfy) -> str:
    """A file of which ComfyUI runs some layers quantized."""
    nano = load_file(comfy.core("generate.paths").NANO_MODEL)
    state = {name: tensor.contiguous() for name, tensor in fp8_scaled(comfyui(nano)).items()}
    return comfy.save("diffusion_models", "quantized_layers.safetensors", state)


@pytest.mark.parametrize("case", [*CASES, "quantized layers"])
def test_kernels_read_what_the_definition_reads(comfy, kernels, sample, empty, quantized, case):
    node, dtype, stored = CASES.get(case, ("LongCatModelLoader", "default", None))
    name = "unet_name" if node == "UNETLoader" else "model_name"
    loaded = comfy(node, **{name: MODEL if case in CASES else quantized, "weight_dtype": dtype})
    off, _ = comfy("LongCatOptimizations", model=loaded, fused_kernels=False)
    # On a GPU the loader may warm kernels.
    for dtypes in kernels.values():
        dtypes.clear()
    expected = sample(empty, off, **ONE)
    assert not any(kernels.values())
    found = sample(empty, loaded, **ONE)
    norm = loaded.model.diffusion_model.blocks[0].cross_norm
    assert stored is None or norm.weight.dtype == stored
    compute = loaded.model.compute_dtype()
    assert kernels["rms norm"] == kernels["text"] == {compute}
    wide = norm.weight.dtype if norm.weight.dtype.itemsize > 1 else torch.float32
    assert kernels["layer norm"] == {wide}
    assert error(expected, found) < 1e-3


@pytest.fixture(scope="module")
def changes(comfy) -> dict[str, Tensor]:
    """Changes of norms, and of a layer beside them, by the network's names."""
    generator = torch.Generator().manual_seed(2)
    shapes = comfy.core("model.transformer").LongCatTransformer(
        comfy.core("checkpoints.load").open_checkpoint(comfy.core("generate.paths").NANO_MODEL).config, device="meta"
    )
    names = ("cross_norm.weight", "cross_norm.bias", "attn.q_norm.weight", "attn.k_norm.weight")
    names = [f"blocks.{i}.{name}" for i in (0, 3) for name in (*names, "cross_attn.q_norm.weight", "attn.proj.bias")]
    return {name: torch.randn(shapes.get_parameter(name).shape, generator=generator) for name in names}


@pytest.fixture(scope="module")
def lora(comfy, changes) -> str:
    suffixes = {"weight": "diff", "bias": "diff_b"}
    state = {}
    for name, change in changes.items():
        module, _, kind = name.rpartition(".")
        state[f"diffusion_model.{module}.{suffixes[kind]}"] = change
    return comfy.save("loras", "norms.safetensors", state)


@pytest.mark.parametrize("dtype", ["fp32", "fp8_e4m3fn"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_lora_of_norms_wherever_they_lie(comfy, kernels, sample, empty, lora, changes, monkeypatch, dtype, fused):
    """Merged where a norm fits on the device; patched at use where it waits in RAM, which is forced here."""
    from comfy import model_management
    from comfy.utils import set_attr_param

    # On GPUs ComfyUI merges in fp16.
    monkeypatch.setattr(model_management, "lora_compute_dtype", lambda device: torch.float32)
    loaded = comfy("LongCatModelLoader", model_name=MODEL, weight_dtype=dtype)
    loaded, _ = comfy("LongCatOptimizations", model=loaded, fused_kernels=fused)
    patched = comfy("LoraLoaderModelOnly", model=loaded, lora_name=lora, strength_model=1.0)
    assert {key.removeprefix("diffusion_model.") for key in patched.patches} == set(changes)
    plain, merged = sample(empty, loaded, **ONE), sample(empty, patched, **ONE)
    assert error(plain, merged) > 0.1
    assert torch.equal(sample(empty, loaded, **ONE), plain)
    # Merged into e4m3 weights, a change is rounded to e4m3 as well; patched at use, it is not.
    network = loaded.model.diffusion_model
    stored = {name: network.get_parameter(name) for name in changes}
    for name, parameter in stored.items():
        set_attr_param(network, name, parameter.float() + changes[name].to(parameter.device))
    exact = sample(empty, loaded, **ONE)
    for name, parameter in stored.items():
        set_attr_param(network, name, parameter)
    assert dtype != "fp32" or error(exact, merged) < 1e-4
    loading, waiting = type(patched).load, []

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
        if type(self.model).__name__ != "LongCatVideo":
            return loading(self, device_to, lowvram_model_memory, force_patch_weights, full_load)
        out = loading(self, device_to, 1024, force_patch_weights, False)
        norm = comfy.core("model.layers").Norm
        waiting.append(sum(bool(m.weight_function) for m in self.model.modules() if isinstance(m, norm)))
        return out

    monkeypatch.setattr(type(patched), "load", load)
    model_management.unload_all_models()
    at_use = sample(empty, patched.clone(), **ONE)
    model_management.unload_all_models()
    assert waiting[-1] == 8
    assert error(exact, at_use) < 1e-4


def packed_operations() -> object:
    """Layers with weights that only they can read, as an object like ComfyUI-GGUF's: here the bits of fp32 numbers."""
    from comfy import ops

    class Linear(ops.manual_cast.Linear):
        def _load_from_state_dict(self, state, prefix, *args):
            weight = state[f"{prefix}weight"].float().contiguous().view(torch.int32)
            self.weight = torch.nn.Parameter(weight, requires_grad=False)
            self.bias = None if self.bias is None else torch.nn.Parameter(state[f"{prefix}bias"].float())

        def forward_comfy_cast_weights(self, x):
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.linear(x, self.weight.view(torch.float32).to(x.dtype), bias)

    return type("PackedOps", (ops.manual_cast,), {"Linear": Linear})()


def test_layers_of_another_pack_read_their_weights_themselves(comfy, model, kernels, sample, empty):
    import comfy.sd as sd

    state = load_file(comfy.core("generate.paths").NANO_MODEL)
    packed = sd.load_diffusion_model_state_dict(
        state, {"custom_operations": packed_operations(), "dtype": torch.float32}
    )
    assert packed.model.diffusion_model.blocks[0].modulation.weight.dtype == torch.int32
    assert error(sample(empty, model, **ONE), sample(empty, packed, **ONE)) < 1e-5


def test_fp32_layers_stay_fp32_where_comfyui_multiplies_in_fp8(comfy):
    """Under `--fast fp8_matrix_mult`, and with fp8_e4m3fn_fast: ComfyUI's layer would round its input to e4m3."""
    from comfy import ops

    linear_fp32 = comfy.node("comfy_network").linear_fp32
    layer = ops.fp8_ops.Linear(32, 16, dtype=torch.float8_e4m3fn)
    generator = torch.Generator().manual_seed(0)
    for parameter in (layer.weight, layer.bias):
        parameter.data = torch.randn(parameter.shape, generator=generator).to(torch.float8_e4m3fn)
    layer.comfy_cast_weights = True
    x = 600 * torch.randn(2, 3, 32, generator=generator)
    given = x.clone()
    expected = F.linear(x, layer.weight.float(), layer.bias.float())
    with torch.no_grad():
        assert torch.equal(linear_fp32(layer, x), expected)
    assert torch.equal(x, given)
