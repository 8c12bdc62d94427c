"""Compares the Triton kernels with their definitions in PyTorch; without a GPU they run in Triton's interpreter.

In fp16: the interpreter rounds bf16 toward zero. Rounding to e4m3 it loses the carry of what rounds up to a power of
two, and below 2^-6 it rounds in its own way.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longcat_core.checkpoints.load import load_transformer
from longcat_core.files.safetensors_io import read_tensors
from longcat_core.model.config import ModelConfig
from longcat_core.model.layers import LayerNorm, RMSNorm, gated, modulate
from longcat_core.model.ops import Once
from longcat_core.model.rope import apply_rope, rope_table
from longcat_core.optimize import attention as backends
from longcat_core.optimize import execution
from longcat_core.optimize.block_sparse import BlockSparse
from longcat_core.optimize.fused import FusedOps
from longcat_core.optimize.kernels import elementwise as kernels
from longcat_core.optimize.kernels import text_attention
from longcat_core.optimize.quantization import quantize
from longcat_core.optimize.switches import Optimizations
from longcat_core.sampling.avatar import class_tokens

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
CONFIG = ModelConfig.from_json(GOLDEN / "config.json")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = (2, 3, 11, 192)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def check_quantized(found: kernels.Quantized, wanted: Tensor) -> None:
    values, scales = kernels.quantize_rows(wanted)
    assert found.values.dtype == torch.float8_e4m3fn and found.values.shape == wanted.shape
    torch.testing.assert_close(found.scales, scales, rtol=1e-4, atol=1e-12)
    values, found = values.float(), found.values.float()
    off = found != values
    if DEVICE.type == "cpu":
        interpreted = (values.abs().log2() % 1 == 0) | (values.abs() < 2**-6)
        assert (off & interpreted).float().mean() < 0.1
        off &= ~interpreted
    # A scale that differs in its last bit moves what lies between two numbers.
    assert off.float().mean() < 1e-3


def defined_norm(
    x: Tensor, update: Tensor | None, gate: Tensor | None, weight: Tensor, bias: Tensor, one_plus: bool
) -> tuple[Tensor, Tensor]:
    """The sum, and in fp32 the norm of it, by the network's own definitions."""
    if update is not None:
        x = x + update if gate is None else gated(x, update, gate)
    if one_plus:
        return x, modulate(x.float(), bias, weight)
    norm = LayerNorm(x.shape[-1])
    norm.weight.data, norm.bias.data = weight, bias
    with torch.no_grad():
        return x, norm(x.float())


GATES = {
    "no gate": None,
    "own gates": (2, 3),
    "shared by samples": (1, 3),
    "shared by frames": (2, 1),
    "shared by all": (1, 1),
}


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
@pytest.mark.parametrize("norm", ["modulation", "shared modulation", "weights"])
def test_residual_norm(gate, norm, fp8):
    x, update = randn(*SHAPE), randn(*SHAPE, seed=1)
    # Slices of one modulation, as a block has them.
    parts = randn(2, 3, 1, 6 * SHAPE[-1], seed=2, dtype=torch.float32).chunk(6, dim=-1)
    gate = None if gate is None else parts[0][: gate[0], : gate[1]]
    weight, bias = {
        "modulation": parts[1:3],
        "shared modulation": [part[:1, :1] for part in parts[1:3]],
        "weights": [randn(SHAPE[-1], seed=seed) for seed in (3, 4)],
    }[norm]
    total, out = kernels.residual_norm(x, update, gate, weight, bias, one_plus=norm != "weights", fp8=fp8)
    wanted_total, wanted = defined_norm(x, update, gate, weight, bias, norm != "weights")
    torch.testing.assert_close(total, wanted_total, rtol=1e-3, atol=1e-3)
    if fp8:
        check_quantized(out, wanted)
    else:
        torch.testing.assert_close(out.float(), wanted, rtol=2e-3, atol=2e-3)


def test_without_an_update_the_sum_is_x_itself():
    x, weight = randn(*SHAPE), randn(SHAPE[-1], seed=1)
    total, out = kernels.residual_norm(x, None, None, weight, weight)
    assert total is x
    wanted = defined_norm(x, None, None, weight, weight, False)[1]
    torch.testing.assert_close(out.float(), wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("fp8", [False, True])
def test_clean_frames_are_left_out_of_the_norm_alone(fp8, batch):
    x, update = randn(*SHAPE)[:batch], randn(*SHAPE, seed=1)[:batch]
    gate, norm = randn(1, 3, 1, SHAPE[-1], seed=2, dtype=torch.float32), LayerNorm(SHAPE[-1], device=DEVICE)
    norm.weight.data, norm.bias.data = (randn(SHAPE[-1], seed=seed) for seed in (3, 4))
    reader = torch.nn.Identity()
    reader.takes_quantized = fp8
    ops = FusedOps(backends.resolve_kernels("sdpa", backends.Inputs(DEVICE, torch.float16, 64, False)))
    with torch.no_grad():
        total, out = ops.residual_norm(x, Once(update), gate, norm, 1, reader)
    wanted_total, wanted = defined_norm(x, update, gate, norm.weight.data, norm.bias.data, False)
    torch.testing.assert_close(total, wanted_total, rtol=1e-3, atol=1e-3)
    if fp8:
        check_quantized(out, wanted[:, 1:])
    else:
        torch.testing.assert_close(out.float(), wanted[:, 1:], rtol=2e-3, atol=2e-3)


def test_residual_is_written_into_x():
    x, update, gate = randn(*SHAPE), randn(*SHAPE, seed=1), randn(2, 3, 1, SHAPE[-1], seed=2, dtype=torch.float32)
    wanted = (x.float() + gate * update.float()).half()
    assert kernels.residual_(x, update, gate) is x
    torch.testing.assert_close(x, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("heads, dim", [(3, 64), (4, 128)])
def test_norm_rope_in_a_slice_of_a_projection(heads, dim, rope):
    tokens = 12
    whole = randn(2, tokens, 3 * heads * dim)
    before = whole.clone()
    q, k, v = (part.unflatten(-1, (heads, dim)) for part in whole.chunk(3, dim=-1))
    norm = RMSNorm(dim, device=DEVICE)
    norm.weight.data = randn(dim, seed=1, dtype=torch.float32)
    table = rope_table(dim, 2, 2, 3, 0, DEVICE) if rope else None
    with torch.no_grad():
        wanted = norm(k.float())
        wanted = apply_rope(wanted, *table) if rope else wanted
        found = kernels.norm_rope(k, norm.weight, table)
    torch.testing.assert_close(found.float(), wanted, rtol=2e-3, atol=2e-3)
    assert found.data_ptr() == k.data_ptr(), "written in place"
    for part, old in zip((q, v), (before.chunk(3, dim=-1)[i].unflatten(-1, (heads, dim)) for i in (0, 2)), strict=True):
        assert torch.equal(part, old), "its neighbors stay"


@pytest.mark.parametrize("width", [64, 100])
def test_gated_product(width):
    gate_up = randn(2, 7, 2 * width) * 4
    gate, up = gate_up.float().chunk(2, dim=-1)
    wanted = F.silu(gate) * up
    torch.testing.assert_close(kernels.gated_product(gate_up).float(), wanted, rtol=2e-3, atol=2e-3)
    check_quantized(kernels.gated_product(gate_up, fp8=True), wanted)


def test_quantize_keeps_zeros_outliers_and_tiny_rows():
    x = randn(5, 96)
    x[1], x[3] = 0, x[3] * 1e-4
    x[2, 7] = 3e4
    found = kernels.quantize(x)
    check_quantized(found, x)
    found = found if DEVICE.type == "cuda" else kernels.Quantized(*kernels.quantize_rows(x))
    assert not found.values[1].float().any()
    restored = found.values.float() * found.scales
    assert (restored - x.float()).norm() / x.float().norm() < 0.04
    for row in (0, 3, 4):
        assert (restored[row] - x[row].float()).norm() / x[row].float().norm() < 0.05


@pytest.mark.parametrize("heads, dim", [(3, 64), (5, 24)])
def test_rows_are_quantized_wherever_their_heads_lie(heads, dim):
    """As attention leaves them: [B, heads, N, head_dim], perhaps of padded queries, or whole tokens."""
    x = randn(2, heads, 9, dim)
    for rows in (x.transpose(1, 2), x.transpose(1, 2)[:, :7], x.transpose(1, 2).contiguous(), x.permute(0, 3, 1, 2)):
        found, wanted = kernels.quantize_heads(rows), kernels.quantize(rows.flatten(2))
        assert found.values.is_contiguous() and torch.equal(found.scales, wanted.scales)
        assert torch.equal(found.values.view(torch.uint8), wanted.values.view(torch.uint8))


class Runs:
    """The small model in fp16 with and without the kernels, which are told to be usable here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(execution, "kernels_usable", lambda x: x.dtype == torch.float16)
        self.switches = Optimizations(attention="sdpa")
        self.model = load_transformer(GOLDEN / "dit.safetensors", config=CONFIG, dtype=torch.float16, device=DEVICE)

    @torch.no_grad()
    def __call__(self, fused: bool, cond: int = 0, cached: bool = False, **switches: object) -> Tensor:
        self.model.set_optimizations(replace(self.switches, fused_kernels=fused, **switches))
        latents = randn(2, 16, 3, 4, 6, dtype=torch.float32)
        context = randn(2, 8, CONFIG.caption_channels, seed=1)
        mask = torch.tensor([[1] * 5 + [0] * 3, [1] * 8], device=DEVICE)
        steps = torch.tensor([[500.0]], device=DEVICE).repeat(2, 3)
        steps[:, :cond] = 0
        cache = self.model.fill_kv_cache(randn(1, 16, 2, 4, 6, seed=4, dtype=torch.float32)) if cached else None
        return self.model(latents, steps, context, mask, num_cond_latents=cond, kv_cache=cache)


CASES = {
    "plain": {},
    "cond": {"cond": 1},
    "cached": {"cached": True},
    "padded text": {"text_mode": "padded"},
    "modulation not reused": {"reuse_modulation": False},
    "plain FFN": {"fused_ffn": False},
}


@pytest.mark.parametrize(
    ("name", "pieces"),
    # An FFN in pieces meets neither the cache nor the text.
    [(name, 0) for name in CASES] + [(name, 2) for name in ("plain", "cond", "plain FFN")],
)
def test_the_network_is_the_same_with_them(name, pieces, monkeypatch):
    case = CASES[name]
    monkeypatch.setattr(execution, "ffn_pieces", lambda *_: pieces)
    run = Runs(monkeypatch)
    used = []
    launch = kernels._launch_residual_norm
    monkeypatch.setattr(kernels, "_launch_residual_norm", lambda *args: used.append(1) or launch(*args))
    plain = run(False, **case)
    assert not used
    fused = run(True, **case)
    assert len(used) >= 3 * CONFIG.depth
    assert (fused - plain).norm() / plain.norm() < 3e-3


@pytest.mark.parametrize("case", [{}, {"cond": 1}, {"cached": True}, {"text_mode": "padded"}, {"reuse_text": False}])
def test_text_attended_by_a_kernel_of_its_own(case, monkeypatch):
    run = Runs(monkeypatch)
    seen = []
    launch = text_attention._launch
    monkeypatch.setattr(text_attention, "_launch", lambda *args: seen.append(args) or launch(*args))
    plain = run(False, **case)
    assert not seen
    fused = run(True, **case)
    assert len(seen) == CONFIG.depth and (fused - plain).norm() / plain.norm() < 3e-3
    keys, bias = seen[0][2], seen[0][4]
    if case.get("text_mode") == "padded":
        assert keys.shape[1] == 8
    else:
        assert keys.shape[1] == 9 and bias.dtype == torch.float32, "all padding is one key"


def test_text_goes_around_its_kernel_when_switched_off_or_long(monkeypatch):
    run = Runs(monkeypatch)
    monkeypatch.setattr(text_attention, "_launch", lambda *args: pytest.fail("the kernel is used"))
    run(True, fused_text=False)
    # More keys than it is the faster one for.
    monkeypatch.setattr(text_attention, "LONGEST", 7)
    run(True)


def test_text_in_8_bits_where_the_next_product_is(monkeypatch):
    run = Runs(monkeypatch)
    quantize(run.model)
    wide = run(True, fused_text=False)
    packed, operator = [], text_attention._text_attention_fp8_op
    monkeypatch.setattr(text_attention, "_text_attention_fp8_op", lambda *args: packed.append(1) or operator(*args))
    fused = run(True)
    assert len(packed) == CONFIG.depth, "no block writes 16 bits to read them again"
    assert not torch.equal(fused, wide) and (fused - wide).norm() / wide.norm() < 4e-2


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ({}, {"8 bits"}),
        # Of pieces that are put together, or beside 16-bit products.
        ({"cond": 1}, {"16 bits"}),
        # Filling the cache, then beside it.
        ({"cached": True}, {"8 bits", "16 bits"}),
        ({"wide": True}, {"16 bits"}),
        ({"sparse": True}, set()),
    ],
    ids=["plain", "cond", "cached", "wide", "sparse"],
)
def test_attention_in_8_bits_goes_on_in_8_bits(case, expected, monkeypatch):
    """Also where attention returns 16 bits, with the heads of a token apart."""
    run, asked, apart = Runs(monkeypatch), [], []
    case = dict(case)
    own = backends.resolve_kernels("sdpa", backends.Inputs(DEVICE, torch.float16, CONFIG.head_dim, False))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        asked.append("16 bits")
        return own.attend(q, k, v)

    def quantized(q: Tensor, k: Tensor, v: Tensor) -> kernels.Quantized:
        asked.append("8 bits")
        return kernels.Quantized(*kernels.quantize_rows(own.attend(q, k, v).flatten(2)))

    if case.pop("sparse", False):
        run.model.block_sparse = BlockSparse(sparsity=0.5, chunk=(2, 2, 2))
    if not case.pop("wide", False):
        quantize(run.model)
    chosen = own
    monkeypatch.setattr(execution.Execution, "choose_kernels", lambda self, device: chosen)
    wanted = run(True, **case)
    chosen = own._replace(attend=attend, quantized=quantized)
    found = run(True, **case)
    assert set(asked) == expected
    assert (found - wanted).norm() / wanted.norm() < 2e-2
    by_heads = kernels.quantize_heads
    monkeypatch.setattr(kernels, "quantize_heads", lambda x: apart.append(1) or by_heads(x))
    chosen = own._replace(attend=lambda q, k, v: own.attend(q, k, v).transpose(1, 2).contiguous().transpose(1, 2))
    assert torch.equal(run(True, **case), wanted)
    assert bool(apart) == (expected != {"16 bits"})


def test_gradients_and_other_precisions_go_around_them():
    x = randn(2, 4)
    assert kernels.missing() or kernels.usable(x)
    assert not kernels.usable(x.float())
    assert not kernels.usable(x.requires_grad_())
    with torch.no_grad():
        assert kernels.usable(x) == (not kernels.missing())
    if DEVICE.type == "cpu":
        assert kernels.missing() == "no CUDA device"


def test_they_stand_in_a_graph_as_operators(monkeypatch):
    """Nothing breaks the graph, and the operators' shapes are those of their results."""
    x, weight = randn(*SHAPE), randn(SHAPE[-1], seed=1)
    gate = randn(1, 1, 1, SHAPE[-1], seed=2, dtype=torch.float32)
    heads = SHAPE[-1] // 64

    def function(x: Tensor) -> tuple[Tensor, ...]:
        total, out = kernels.residual_norm(x, x, gate, gate, gate, one_plus=True)
        _, eight = kernels.residual_norm(x, None, None, weight, weight, fp8=True)
        q = kernels.norm_rope(out.clone().flatten(1, 2).unflatten(-1, (heads, 64)), weight[:64], None)
        return total, out, *eight, q, *kernels.gated_product(out, fp8=True), *kernels.quantize(out)

    wanted = function(x.clone())
    found = torch.compile(function, fullgraph=True, backend="eager")(x)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=0)
    checks = ("test_schema", "test_faketensor")
    for fp8 in (False, True):
        for args in ((x, x, gate, gate, gate, True, fp8), (x, None, None, weight, weight, False, fp8)):
            torch.library.opcheck(kernels._residual_norm_op.operator, args, test_utils=checks)
        torch.library.opcheck(kernels._gated_product_op.operator, (x, fp8), test_utils=checks)
    q = x.flatten(1, 2).unflatten(-1, (heads, 64))
    torch.library.opcheck(kernels._norm_rope_op.operator, (q, weight[:64], None, None), test_utils=checks)
    torch.library.opcheck(kernels._quantize_op.operator, (x,), test_utils=checks)


@pytest.mark.parametrize(("people", "clean"), [(0, 0), (0, 1), (2, 1)])
def test_audio_heard_through_them(people, clean, monkeypatch):
    monkeypatch.setattr(execution, "kernels_usable", lambda x: x.dtype == torch.float16)
    folder = GOLDEN.parent / "golden-avatar" / "v1_5"
    data = {name: t.to(DEVICE) for name, t in read_tensors(folder / "forward.safetensors").items()}
    config = ModelConfig.from_json(folder / "config.json")
    model = load_transformer(folder / "dit.safetensors", config=config, dtype=torch.float16, device=DEVICE)
    windows = data["multi.audio"][:people] if people else data["audio"][:1]
    classes = class_tokens(data["duo.masks"], 4, 6) if people else None
    seen: list[int] = []
    launch = text_attention._launch
    monkeypatch.setattr(text_attention, "_launch", lambda *args: seen.append(args[1].shape[0]) or launch(*args))
    outs = []
    for fused in (False, True):
        model.set_optimizations(Optimizations(attention="sdpa", fused_kernels=fused))
        text = model.embed_text(data["context"][:1], data["mask"][:1])
        text = replace(text, audio=model.embed_audio(windows, classes))
        with torch.no_grad():
            outs.append(model(data["x"][:1, :, :7], data["ai2v.t"][:1], text, num_cond_latents=clean))
    plain, fused = outs
    assert (fused - plain).norm() / plain.norm() < 3e-3
    # One text, and where one person speaks, as many frames as hear.
    assert len(seen) == config.depth * (1 if people else 2)


IMPORTS = """
import sys, torch
from longcat_core.optimize.kernels import elementwise
x, weight = torch.randn(1, 2, 3, 64).half(), torch.randn(64)
total, out = elementwise.residual_norm(x, x, None, weight, weight, fp8=True)
elementwise.gated_product(total), elementwise.quantize(total)
sys.exit("torch._dynamo" in sys.modules)
"""


def test_outside_of_graphs_no_compiler_is_imported():
    """That would take seconds at every start."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    assert subprocess.run([sys.executable, "-c", IMPORTS], env=environment, check=False).returncode == 0
