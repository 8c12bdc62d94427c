"""LoRAs at run time: what the merged ones give, on weights that nobody writes to, through graphs that stay."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from longcat_core.checkpoints import lora as lora_files
from longcat_core.checkpoints.adapted import STEP, RuntimeLoras
from longcat_core.checkpoints.formats import OFFICIAL
from longcat_core.checkpoints.load import load_transformer, official_state
from longcat_core.checkpoints.lora import open_loras
from longcat_core.cli import main as cli
from longcat_core.cli import models as commands
from longcat_core.errors import CheckpointError, LongCatError
from longcat_core.files.safetensors_io import read_tensors
from longcat_core.generate.paths import ModelPaths
from longcat_core.generate.pipeline import Pipeline
from longcat_core.model.block import run_block
from longcat_core.optimize.adapters import Adapted
from longcat_core.optimize.compilation import Regional
from longcat_core.optimize.fused import sliceable, takes_quantized
from longcat_core.optimize.optimized import OptimizedTransformer
from longcat_core.optimize.quantization import Fp8Linear, Policy, quantize
from longcat_core.optimize.switches import Optimizations

from .test_lora import FORWARD, GOLDEN, KINDS, LORA, kohya, output, parted, peft, saved, whole
from .written_forms import COMFYUI


def load(**options: object) -> OptimizedTransformer:
    return load_transformer(GOLDEN / "dit.safetensors", **options)


@pytest.fixture
def model() -> OptimizedTransformer:
    return load()


def error(out: Tensor, wanted: Tensor) -> float:
    return float((out - wanted).abs().max() / wanted.std())


def other_lora(folder: Path) -> Path:
    """Of the same layers, other numbers."""
    return saved(folder, kohya({name: (d, u * 0.3, s) for name, (d, u, s) in whole().items()}), "other.safetensors")


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_every_kind_gives_the_golden_output(model, tmp_path, kind):
    path = LORA if kind is None else saved(tmp_path, KINDS[kind]())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RuntimeLoras(model, [(path, 1.0)])
    assert error(output(model), read_tensors(FORWARD)["lora.out"]) < 1e-5


def test_a_stack_with_strengths_and_every_switch(model, tmp_path):
    stack = [(LORA, 0.7), (other_lora(tmp_path), -1.5), (LORA, 0.25)]
    RuntimeLoras(model, stack)
    wanted = output(load(lora=stack))
    assert error(output(model), wanted) < 1e-5
    for switch in ("fused_qkv", "fused_ffn", "explicit_fp32", "reuse_text", "reuse_modulation"):
        model.set_optimizations(replace(Optimizations(), **{switch: False}))
        assert error(output(model), wanted) < 1e-5, switch


def test_layers_outside_of_blocks(model, tmp_path):
    torch.manual_seed(0)
    tensors = {}
    for name in ("time_embed.0", "text_embed.1", "final_layer.modulation", "final_layer.linear", "patch_embed"):
        layer = model.get_submodule(name)
        kernel = layer.weight.shape[2:]
        down, up = torch.randn(3, *layer.weight.shape[1:]), torch.randn(len(layer.weight), 3, *(1 for _ in kernel))
        tensors |= {f"{name}.lora_A.weight": down * 0.1, f"{name}.lora_B.weight": up * 0.1}
    path = saved(tmp_path, tensors)
    RuntimeLoras(model, [(path, 0.5)])
    wanted = output(load(lora=[(path, 0.5)]))
    assert error(output(model), wanted) < 1e-5 and error(wanted, output(load())) > 0.1


def test_strength_0_and_no_lora_equal_the_base_bit_for_bit(model):
    plain, modules = output(model), dict(model.named_modules())
    kinds = {name: type(module) for name, module in modules.items()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    loras = RuntimeLoras(model, [(LORA, 0.0)])
    assert sum(isinstance(module, Adapted) for module in model.modules()) > 10
    assert torch.equal(output(model), plain)
    loras.set([(LORA, 1.0)])
    assert error(output(model), plain) > 0.1
    # What it saves is its own weights, which nobody wrote to.
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert set(official_state(model, OFFICIAL)) == set(official_state(load(), OFFICIAL))
    model.load_state_dict(state)
    assert len(loras.set()) == 17
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert all(module is modules[name] for name, module in model.named_modules())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in load().named_parameters()]
    assert torch.equal(output(model), plain)


def test_other_strengths_read_and_write_nothing_but_scales(tmp_path, model, monkeypatch):
    path = tmp_path / "lora.safetensors"
    path.write_bytes(LORA.read_bytes())
    loras = RuntimeLoras(model, [(path, 1.0), (LORA, 0.0)])
    before = {name: parameter._version for name, parameter in model.named_parameters()}
    path.unlink()
    monkeypatch.setattr(lora_files, "SafetensorsFile", lambda *_: pytest.fail("a file was read again"))
    changed = loras.set([(path, 0.25), (LORA, 0.0)])
    assert len(changed) == 17 and "blocks.0.attn.qkv.weight" in changed
    written = [name for name, parameter in model.named_parameters() if parameter._version != before[name]]
    assert written and all(name.endswith("lora_scale") for name in written)
    monkeypatch.undo()
    assert error(output(model), output(load(lora=[(LORA, 0.25)]))) < 1e-5
    assert loras.set([(path, 0.25), (LORA, 0.0)]) == []
    for strength in (float("nan"), 1e39):
        with pytest.raises(LongCatError, match=r"strength \S+ of .*lora\.safetensors is out of range"):
            loras.set([(path, strength), (LORA, 0.0)])


def test_a_rewritten_file_is_read_again(tmp_path, model):
    path = saved(tmp_path, peft(whole(), "transformer."))
    loras = RuntimeLoras(model, [(path, 1.0)])
    saved(tmp_path, kohya({name: (d, u * 0.3, s) for name, (d, u, s) in whole().items()}))
    os.utime(path, ns=(1, 1))
    loras.set([(path, 1.0)])
    assert error(output(model), output(load(lora=[(path, 1.0)]))) < 1e-5


def test_bad_loras_change_nothing(tmp_path, model):
    loras = RuntimeLoras(model, [(LORA, 0.5)])
    wanted = output(model)
    with pytest.raises(CheckpointError, match="is not a LoRA"):
        loras.set([(LORA, 1.0), (GOLDEN / "dit.safetensors", 1.0)])
    assert torch.equal(output(model), wanted)
    assert len(loras.set([(LORA, 1.0)])) == 17, "and what was there before is still known"


def test_kept_text_notices_strengths(model):
    given = read_tensors(FORWARD)
    loras = RuntimeLoras(model, [(LORA, 1.0)])

    @torch.no_grad()
    def run(text: object) -> Tensor:
        return model(given["x"], given["t"], text)

    text = model.embed_text(given["context"], given["mask"])
    outs = []
    for strengths in ([(LORA, 1.0)], [(LORA, 0.3)], [], [(LORA, 1.0)]):
        loras.set(strengths)
        outs.append(run(text))
        fresh = model.embed_text(given["context"], given["mask"])
        assert text.cached is not None and torch.equal(outs[-1], run(fresh))
    assert torch.equal(outs[0], outs[3]) and error(outs[0], outs[1]) > 1e-2


# 8 bits and 16


@pytest.mark.parametrize("fp8", [True, False])
def test_on_an_8_bit_base_the_lora_is_not_quantized(fp8):
    model = load(dtype=torch.bfloat16, fp8=Policy())
    plain = copy.deepcopy(model)
    RuntimeLoras(model, [(LORA, 0.5)])
    for network in (model, plain):
        network.set_optimizations(replace(Optimizations(), fp8=fp8))
    layer, base = model.blocks[0].attn.qkv, plain.blocks[0].attn.qkv
    assert isinstance(layer, Fp8Linear) and isinstance(layer, Adapted)
    assert not takes_quantized(layer) and takes_quantized(base) and not sliceable(layer, layer.weight)
    parts = open_loras([(LORA, 1.0)])[0].layers["blocks.0.attn.qkv"]
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    branch = torch.cat(
        [
            x.float() @ down.t() @ parts[f"lora_up.blocks.{i}.weight"].t()
            for i, down in enumerate(parts["lora_down.weight"].chunk(3))
        ],
        dim=-1,
    )
    wanted = base(x, fp8=fp8).float() + 0.5 * parts["alpha_scale"] * branch
    assert error(layer(x, fp8=fp8).float(), wanted) < 2e-2
    assert error(base(x, fp8=fp8).float(), wanted) > 0.1
    assert model.eight_bit and plain.eight_bit, "the base says what is in force"
    assert output(model).isfinite().all()


def test_moving_and_casting_keep_the_scales(model):
    RuntimeLoras(model, [(LORA, 0.3)])
    wanted = output(model)
    assert torch.equal(output(copy.deepcopy(model).to("cpu")), wanted)
    half = copy.deepcopy(model).to(torch.bfloat16)
    layer = half.blocks[0].attn.qkv
    assert layer.lora_down.dtype == torch.bfloat16 and layer.lora_scale.dtype == torch.float32
    assert torch.equal(layer.lora_scale, model.blocks[0].attn.qkv.lora_scale)
    loaded = load(dtype=torch.bfloat16)
    RuntimeLoras(loaded, [(LORA, 0.3)])
    assert half.dtype == torch.bfloat16 and torch.equal(output(half), output(loaded))
    small = load(dtype=torch.float32, fp8=Policy())
    RuntimeLoras(small, [(LORA, 0.3)])
    assert small.to(torch.bfloat16).blocks[0].attn.qkv.lora_up.dtype == torch.bfloat16
    with pytest.raises(LongCatError, match="merge LoRAs first"):
        quantize(model)


# Graphs


@pytest.fixture
def counted(model) -> Iterator[Callable[[], int]]:
    """One step of the compiled model; returns how many graphs there are."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model.compiled_block = Regional(run_block, "the block", counter)
    model.announce = lambda _: None
    model.set_optimizations(Optimizations(attention="sdpa", compile="blocks"))

    def step() -> int:
        step.out = output(model)
        return counter.frame_count

    yield step
    torch._dynamo.reset()


def test_strengths_and_other_loras_do_not_recompile(model, counted, tmp_path):
    assert counted() == 1
    loras = RuntimeLoras(model, [(LORA, 1.0)])
    assert counted() == 2
    for strength in (0.5, -1.0, 0.0):
        loras.set([(LORA, strength)])
        assert counted() == 2
    other = other_lora(tmp_path)
    # Another one, two in the room of one, out, and in again.
    for stack in ([(other, 0.5)], [], [(other, 1.0)], [(LORA, 1.0)]):
        loras.set(stack)
        assert counted() == 2
        assert error(counted.out, output(load(lora=stack))) < 1e-5
    loras.set([(LORA, 1.0), (other, 1.0)])
    assert counted() == 3, "twice the ranks are one graph more"
    loras.set([(other, 1.0)])
    assert counted() == 3


def test_a_lora_of_some_blocks_is_one_graph(model, counted, tmp_path):
    """Another rank in every block, and a block without any: the blocks still share a graph."""
    torch.manual_seed(0)
    layers = {"blocks.1.attn.proj": (torch.randn(5, 64) * 0.1, torch.randn(64, 5) * 0.1, 1.0)}
    layers["blocks.0.ffn.w3"] = torch.randn(20, 64) * 0.1, torch.randn(model.config.ffn_hidden, 20) * 0.1, 0.5
    path = saved(tmp_path, peft(layers, "transformer."))
    RuntimeLoras(model, [(path, 1.0)])
    assert counted() == 1
    assert error(counted.out, output(load(lora=[(path, 1.0)]))) < 1e-5
    ranks = [[len(b.attn.proj.lora_scale), len(b.ffn.gate_up.lora_scale)] for b in model.blocks]
    assert ranks == [[STEP, 2 * STEP]] * 2 and type(model.blocks[0].attn.qkv) is nn.Linear


# Gradients


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_lora_and_only_it(model, checkpointing):
    given = read_tensors(FORWARD)
    grads = {}
    for on in (False, True):
        network = copy.deepcopy(model)
        RuntimeLoras(network, [(LORA, 1.0)])
        network.set_optimizations(Optimizations(attention="sdpa", gradient_checkpointing=on and checkpointing))
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name.endswith(("lora_down", "lora_up")))
        text = network.embed_text(given["context"], given["mask"])
        network(given["x"], given["t"], text).square().mean().backward()
        grads[on] = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        assert set(grads[on]) == {name for name, p in network.named_parameters() if p.requires_grad}
        assert all(grad.isfinite().all() and grad.abs().sum() > 0 for grad in grads[on].values())
    for name, grad in grads[False].items():
        torch.testing.assert_close(grads[True][name], grad, rtol=1e-4, atol=1e-7)


# The option


def test_the_pipeline_and_the_option(tmp_path, monkeypatch):
    width = Pipeline.load().model.config.hidden_size
    layer = {"blocks.0.attn.proj": (torch.randn(2, width) * 0.1, torch.randn(width, 2) * 0.1, 1.0)}
    path = saved(tmp_path, peft(layer, "diffusion_model."))
    pipeline = Pipeline.load(lora=[(path, 0.5)], lora_mode="runtime")
    assert isinstance(pipeline.model.blocks[0].attn.proj, Adapted)
    assert pipeline.set_loras([(path, 1.0)]) == ["blocks.0.attn.proj.weight"]
    assert pipeline.set_loras() and not isinstance(pipeline.model.blocks[0].attn.proj, Adapted)

    monkeypatch.setattr(commands, "compile_mode", lambda *args: "off")
    paths = ModelPaths(GOLDEN / "dit.safetensors", GOLDEN / "vae.safetensors", GOLDEN / "dit.safetensors")

    def settings(*options: str) -> dict:
        args = cli.build_parser().parse_args(["generate", "x", *options])
        return commands.model_settings(args, paths, torch.device("cpu"))

    lora = ("--lora", str(LORA))
    assert settings(*lora) == settings(*lora, "--lora-mode", "merged") != settings(*lora, "--lora-mode", "runtime")
    assert settings() == settings("--lora-mode", "runtime"), "without a LoRA there is nothing to choose"


def test_split_targets_land_in_their_rows(model, tmp_path):
    """A LoRA of v alone leaves q and k as they are, bit for bit, also where one of all three was before it."""
    layers = {name: value for name, value in parted(COMFYUI).items() if name.endswith("self_attn.v")}
    loras = RuntimeLoras(model, [(LORA, 1.0)])
    loras.set([(saved(tmp_path, peft(layers, "diffusion_model.")), 1.0)])
    x = torch.randn(3, 64)
    for out, wanted, same in zip(
        model.blocks[0].attn.qkv(x).chunk(3, -1), load().blocks[0].attn.qkv(x).chunk(3, -1), (1, 1, 0), strict=True
    ):
        assert torch.equal(out, wanted) is bool(same)
