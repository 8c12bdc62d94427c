"""8-bit layers: their numbers, what becomes one, how they move, and what they cost the network."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from longcat_core.benchmark.parts.exactness import BlockOutputs
from longcat_core.checkpoints.load import load_transformer
from longcat_core.checkpoints.lora import merge_lora
from longcat_core.errors import LongCatError
from longcat_core.files.safetensors_io import write_safetensors
from longcat_core.generate.paths import NANO_MODEL
from longcat_core.measure.fidelity import relative_error, tensor_psnr
from longcat_core.optimize.kernels.elementwise import Quantized, quantize_rows
from longcat_core.optimize.optimized import OptimizedTransformer
from longcat_core.optimize.quantization import (
    LAYERS,
    Fp8Linear,
    Policy,
    check_sizes,
    dequantized,
    missing,
    quantize,
    quantized_layers,
    scale_rows,
    with_scales,
    without_scales,
)
from longcat_core.optimize.switches import Optimizations

from ..support.tiny import tiny_config

CONFIG = tiny_config(depth=3)
SWITCHES = Optimizations(attention="sdpa")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model() -> OptimizedTransformer:
    torch.manual_seed(0)
    return OptimizedTransformer(CONFIG, SWITCHES).eval().requires_grad_(False)


def inputs(caption: int = CONFIG.caption_channels) -> tuple[Tensor, ...]:
    mask = torch.tensor([[1] * 5 + [0] * 3, [1] * 8])
    return randn(2, 16, 3, 4, 6), torch.tensor([700.0, 700.0]), randn(2, 8, caption, seed=1), mask


def test_rows_are_scaled_to_the_largest_number_of_e4m3():
    x = randn(6, 64)
    x[1] *= 1e4
    x[2] *= 1e-6
    x[3] = 0
    x[4, 5] = 300
    values, scales = quantize_rows(x)
    assert values.dtype == torch.float8_e4m3fn and scales.shape == (6, 1)
    assert values.float().abs().amax(-1).tolist() == [448, 448, 448, 0, 448, 448]
    torch.testing.assert_close(scales[:, 0], x.abs().amax(-1).clamp(min=1e-12) / 448)
    restored = values.float() * scales
    assert not restored[3].any()
    # Half a step of e4m3 is a sixteenth of a number, or 2^-10 of the scale near zero.
    assert ((restored - x).abs() <= x.abs() / 16 + scales * 2**-10 * 1.01).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_is_close_and_exactly_what_its_definition_says(dtype, bias):
    torch.manual_seed(0)
    layer = nn.Linear(128, 80, bias=bias).to(dtype).requires_grad_(False)
    eight, x = Fp8Linear.of(layer), randn(3, 5, 128).to(dtype)
    out = eight(x)
    assert out.dtype == dtype and out.shape == (3, 5, 80)
    (x8, sx), (w8, sw) = quantize_rows(x), quantize_rows(layer.weight)
    wanted = (x8.double() * sx.double()) @ (w8.double() * sw.double()).T
    wanted = wanted + layer.bias.double() if bias else wanted
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(out.double(), wanted, rtol=tolerance, atol=tolerance)
    assert 0.01 < relative_error(out, layer(x)) < 0.05
    torch.testing.assert_close(eight(Quantized(x8, sx)), out, rtol=0, atol=0)


def test_switched_off_it_multiplies_the_same_weights_in_wider_precision():
    layer = nn.Linear(128, 80).requires_grad_(False)
    eight, x = Fp8Linear.of(layer), randn(7, 128)
    torch.testing.assert_close(
        eight(x, fp8=False), nn.functional.linear(x, dequantized(eight.weight, eight.weight_scale, x.dtype), layer.bias)
    )
    weights_alone = relative_error(eight(x, fp8=False), layer(x))
    assert weights_alone < 0.9 * relative_error(eight(x), layer(x))


def test_it_moves_and_casts_but_its_numbers_stay():
    eight = Fp8Linear.of(nn.Linear(64, 32))
    weight, scale = eight.weight.clone(), eight.weight_scale.clone()
    eight.to(torch.bfloat16)
    assert (eight.weight.dtype, eight.weight_scale.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert eight.bias.dtype == eight.dtype == torch.bfloat16
    assert torch.equal(eight.weight.float(), weight.float()) and torch.equal(eight.weight_scale, scale)
    assert eight(randn(2, 64).bfloat16()).dtype == torch.bfloat16
    assert eight.to("meta").weight.is_meta


def test_gradients_are_refused_in_a_sentence():
    eight = Fp8Linear.of(nn.Linear(64, 32))
    with pytest.raises(LongCatError, match="no backward pass; train the network in bf16"):
        eight(randn(2, 64).requires_grad_())


@pytest.mark.parametrize(
    "policy, count",
    [(Policy(), 21), (Policy(("ffn.down", "attn.qkv")), 6), (Policy(keep_first=1, keep_last=1), 7), (Policy(()), 0)],
)
def test_policy(model, policy, count):
    names = policy.names(CONFIG.depth)
    assert len(names) == count
    plain = sum(p.nbytes for p in model.parameters())
    saved = quantize(model, policy)
    assert sorted(quantized_layers(model)) == sorted(names)
    assert plain - sum(p.nbytes for p in model.parameters()) == saved
    again = {name: id(model.get_submodule(name)) for name in names}
    assert quantize(model, policy) == 0
    assert again == {name: id(model.get_submodule(name)) for name in names}


@pytest.mark.parametrize(
    "bad, sentence",
    [
        (lambda: Policy(("attn.kqv",)), "cannot quantize layers attn.kqv; choose from attn.qkv"),
        (lambda: Policy(keep_first=-1), "cannot keep -1 first"),
        (lambda: check_sizes(96, 40), "96x40 cannot be quantized to fp8: both must be multiples of 16"),
    ],
)
def test_bad_policies_and_sizes(bad, sentence):
    with pytest.raises(LongCatError, match=sentence):
        bad()


def test_what_cannot_be_quantized_leaves_the_network_as_it_was(model):
    class Patched(nn.Linear):
        pass

    model.blocks[2].ffn.down = Patched(96, 64, bias=False)
    with pytest.raises(LongCatError, match=r"blocks\.2\.ffn\.down is a Patched and cannot be quantized; merge LoRAs"):
        quantize(model)
    assert not quantized_layers(model)


def test_half_the_memory(model):
    model.to(torch.bfloat16)
    layers = [model.get_submodule(name) for name in Policy().names(CONFIG.depth)]
    before = sum(layer.weight.nbytes for layer in layers)
    scales = sum(4 * layer.weight.shape[0] for layer in layers)
    assert quantize(model) == before // 2 - scales


def test_the_network_with_it_and_its_switch(model):
    def outputs(network: OptimizedTransformer) -> list[Tensor]:
        seen = BlockOutputs()
        return [network(*inputs(), around_block=seen.around), *seen.blocks]

    eight = copy.deepcopy(model)
    quantize(eight)
    wanted, found = outputs(model), outputs(eight)
    assert len(found) == 1 + CONFIG.depth
    whole, *blocks = [relative_error(a, b) for a, b in zip(found, wanted, strict=True)]
    assert 1e-3 < whole < 0.1 and all(1e-4 < block < 0.1 for block in blocks)
    assert all(tensor_psnr(a, b) > 20 for a, b in zip(found[1:], wanted[1:], strict=True))
    eight.set_optimizations(Optimizations(attention="sdpa", fp8=False))
    assert relative_error(eight(*inputs()), wanted[0]) < whole
    eight.set_optimizations(SWITCHES)
    assert torch.equal(eight(*inputs()), found[0])


def test_fused_and_unfused_are_one_product(model):
    quantize(model)
    fused = model(*inputs())
    model.set_optimizations(Optimizations(attention="sdpa", fused_qkv=False, fused_ffn=False))
    # 8-bit layers are never cut into slices.
    torch.testing.assert_close(model(*inputs()), fused, rtol=1e-5, atol=1e-5)


def test_loaded_as_quantized_after_loading():
    plain = load_transformer(NANO_MODEL, dtype=torch.bfloat16)
    loaded = load_transformer(NANO_MODEL, dtype=torch.bfloat16, fp8=Policy())
    assert quantize(plain) > 0
    assert quantized_layers(loaded) == quantized_layers(plain) and len(quantized_layers(plain)) == 6 * len(LAYERS)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    for (name, a), (_, b) in zip(loaded.named_parameters(), plain.named_parameters(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a.float(), b.float()), name
    off = load_transformer(NANO_MODEL, optimizations=Optimizations(fp8=False), fp8=Policy())
    assert not off.optimizations.fp8 and off.eight_bit


def test_a_lora_does_not_go_into_8_bit_weights(model, tmp_path):
    module = "blocks.0.attn.proj"
    key = "lora___lorahyphen___" + module.replace(".", "___lorahyphen___")
    tensors = {
        f"{key}.lora_down.weight": randn(4, 64),
        f"{key}.lora_up.blocks.0.weight": randn(64, 4),
        f"{key}.alpha_scale": torch.tensor(1.0),
    }
    write_safetensors(tmp_path / "lora.safetensors", tensors)
    merge_lora(copy.deepcopy(model), tmp_path / "lora.safetensors")
    quantize(model)
    with pytest.raises(LongCatError, match=r"cannot be merged into 8-bit weights .*before the network is quantized"):
        merge_lora(model, tmp_path / "lora.safetensors")


def test_a_block_of_8_bit_layers_is_one_graph(model, monkeypatch):
    quantize(model)
    plain = model(*inputs())
    layer = model.blocks[0].ffn.gate_up
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = randn(2, 3, 64)
    torch.testing.assert_close(compiled(x), layer(x))
    model.set_optimizations(Optimizations(attention="sdpa", compile="blocks"))
    # Shared by all networks.
    monkeypatch.setattr(model.compiled_block, "backend", "aot_eager")
    said: list[str] = []
    model.announce = said.append
    torch._dynamo.reset()
    torch.testing.assert_close(model(*inputs()), plain, rtol=1e-4, atol=1e-4)
    assert not [sentence for sentence in said if "does not compile" in sentence]


def test_this_machine_says_why_it_has_no_8_bit_products():
    assert missing(torch.device("cpu")) == "it runs on CUDA, the tensors are on cpu"


@pytest.mark.parametrize(("rows", "columns"), [(96, 32), (32, 96), (16, 16), (48, 4096)])
def test_scales_travel_with_the_weight(rows, columns):
    weight, scales = quantize_rows(randn(rows, columns) * torch.logspace(-8, 8, rows)[:, None])
    packed = with_scales(weight, scales)
    assert packed.shape == (rows + scale_rows(rows, columns), columns) and packed.dtype == torch.float8_e4m3fn
    # Through any float, as an owner casts what it patches.
    for dtype in (torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float32):
        values, found = without_scales(packed.to(dtype).to(torch.float8_e4m3fn), rows)
        assert torch.equal(found, scales) and values.is_contiguous()
        assert torch.equal(values.view(torch.uint8), weight.view(torch.uint8))
    full = dequantized(weight, scales, torch.float32)
    assert torch.equal(full, weight.float() * scales)


def test_scales_are_read_by_an_operator_within_a_graph():
    """Inductor has Triton cast e4m3 to whole numbers, which CUDA refuses."""
    packed = with_scales(*quantize_rows(randn(32, 16)))
    graphs: list[torch.fx.GraphModule] = []
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: without_scales(x, 32)[1], fullgraph=True, backend=lambda g, _: graphs.append(g) or g
    )
    assert torch.equal(compiled(packed), without_scales(packed, 32)[1])
    calls = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert len(calls) == 1 and "packed_scales" in calls[0]
