"""Kernels read parameters as the network's definition casts them, whatever dtype they are stored in.

Without a GPU they run in Triton's interpreter, which rounds bf16 toward zero; so activations are in fp16.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from longcat_core.checkpoints.load import load_transformer
from longcat_core.model import layers
from longcat_core.model.config import ModelConfig
from longcat_core.model.layers import LayerNorm, Norm, RMSNorm
from longcat_core.model.transformer import LongCatTransformer
from longcat_core.optimize import execution
from longcat_core.optimize.kernels import elementwise, text_attention
from longcat_core.optimize.optimized import OptimizedTransformer
from longcat_core.optimize.switches import Optimizations

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
CONFIG = ModelConfig.from_json(GOLDEN / "config.json")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STORED = (torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture
def model() -> OptimizedTransformer:
    model = load_transformer(GOLDEN / "dit.safetensors", config=CONFIG, dtype=torch.float16, device=DEVICE)
    generator = torch.Generator().manual_seed(5)
    for norm in norms(model):
        for parameter in norm.parameters():
            # Not 1 and 0, so that ignoring or misreading them shows.
            parameter.data += torch.randn(parameter.shape, generator=generator).to(parameter) / 2
    return model


def norms(model: nn.Module) -> list[Norm]:
    return [module for module in model.modules() if isinstance(module, Norm)]


def store(model: nn.Module, dtype: torch.dtype) -> None:
    for norm in norms(model):
        for name, parameter in norm.named_parameters():
            setattr(norm, name, nn.Parameter(parameter.data.to(dtype), requires_grad=False))


@torch.no_grad()
def run(model: OptimizedTransformer, **switches: object) -> Tensor:
    model.set_optimizations(replace(Optimizations(attention="sdpa"), **switches))
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 16, 2, 4, 4, generator=generator).to(DEVICE)
    context = torch.randn(2, 8, CONFIG.caption_channels, generator=generator).to(DEVICE)
    mask = torch.tensor([[1] * 5 + [0] * 3, [1] * 8], device=DEVICE)
    return model(latents, torch.full((2,), 500.0, device=DEVICE), context, mask)


@pytest.mark.parametrize(("dtype", "fused_text"), [*((dtype, True) for dtype in STORED), (STORED[0], False)], ids=str)
def test_kernels_agree_with_the_definition(model, dtype, fused_text, monkeypatch):
    store(model, dtype)
    monkeypatch.setattr(execution, "kernels_usable", lambda x: x.dtype == torch.float16)
    plain = run(model, fused_kernels=False)
    read: dict[str, set[torch.dtype]] = {"norm": set(), "rope": set(), "text": set()}

    def spy(module: object, name: str, kind: str, *places: int) -> None:
        own = getattr(module, name)

        def launch(*args: object) -> object:
            read[kind] |= {args[i].dtype for i in places if args[i] is not None and args[i].ndim == 1}
            return own(*args)

        monkeypatch.setattr(module, name, launch)

    spy(elementwise, "_launch_residual_norm", "norm", 3, 4)
    spy(elementwise, "_launch_norm_rope", "rope", 1)
    spy(text_attention, "_launch", "text", 1)
    fused = run(model, fused_text=fused_text)
    assert (fused - plain).norm() / plain.norm() < 3e-3
    # Where the definition widens, kernels may do so themselves, without a launch for it; the rest is rounded.
    wide = dtype if dtype.itemsize > 1 else torch.float32
    assert read == {"norm": {wide}, "rope": {torch.float16}, "text": {torch.float16} if fused_text else set()}


@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_stored_is_cast_to_activations(model, dtype):
    """In the definition as well: the same as when what is stored is in the activations' dtype from the start."""
    store(model, dtype)
    stored = run(model, fused_kernels=False)
    for norm in norms(model):
        if isinstance(norm, RMSNorm):
            store(norm, torch.float16)
        else:
            store(norm, torch.float32)
    assert torch.equal(run(model, fused_kernels=False), stored)


def test_nothing_is_copied_where_dtypes_match():
    rms, norm = RMSNorm(8, dtype=torch.bfloat16), LayerNorm(8, dtype=torch.bfloat16)
    assert rms.affine(rms.weight.device, torch.bfloat16)[0] is rms.weight
    kept = norm.affine(norm.weight.device, torch.float32, elementwise.READ)
    assert kept[0] is norm.weight and kept[1] is norm.bias
    assert [p.dtype for p in norm.affine(norm.weight.device, torch.float32)] == [torch.float32] * 2


def test_an_owner_gives_every_norm_its_parameters(model, monkeypatch):
    """Kernels and definitions ask the owner's `operations`; changing what it gives changes every output."""
    asked: set[Norm] = set()

    class Operations:
        Linear, Conv3d = nn.Linear, nn.Conv3d

        @staticmethod
        def affine(norm: Norm, *args: object) -> tuple[Tensor, ...]:
            asked.add(norm)
            return layers.affine(norm, *args)

    owned = LongCatTransformer(CONFIG, operations=Operations, dtype=torch.float16, device=DEVICE)
    owned.load_state_dict(model.state_dict())
    monkeypatch.setattr(execution, "kernels_usable", lambda x: x.dtype == torch.float16)
    for fused in (True, False):
        asked.clear()
        switches = replace(Optimizations(attention="sdpa"), fused_kernels=fused)
        latents = torch.ones(1, 16, 1, 4, 4, device=DEVICE)
        context = torch.ones(1, 3, CONFIG.caption_channels, device=DEVICE)
        with torch.no_grad():
            execution.Execution(owned, switches)(latents, torch.ones(1, device=DEVICE), context)
        assert asked == set(norms(owned))
