"""What the bridge to ComfyUI asks of the network, without ComfyUI."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longcat_core.model import text
from longcat_core.model.config import ModelConfig
from longcat_core.optimize import attention as backends
from longcat_core.optimize import fused, requirement
from longcat_core.optimize.memory import activation_bytes
from longcat_core.optimize.optimized import OptimizedTransformer
from longcat_core.optimize.switches import Optimizations
from longcat_core.sampling.frames import count_clean, noisy_frames

from ..support.tiny import tiny_config

SMALL = tiny_config(num_heads=4, caption_channels=24, ffn_hidden=256)


@pytest.fixture(scope="module")
def model() -> OptimizedTransformer:
    torch.manual_seed(0)
    return OptimizedTransformer(SMALL).eval().requires_grad_(False)


@pytest.fixture
def inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x, context = torch.randn(1, 16, 3, 4, 4, generator=generator), torch.randn(1, 5, 24, generator=generator)
    return x, torch.tensor([400.0]), context


def test_frames_of_a_mask():
    mask = torch.ones(2, 1, 5, 2, 2)
    mask[:, :, :2] = 0
    mask[1, :, 2] = 0
    mask[0, :, 2, 0, 0] = 0
    noisy = noisy_frames(mask)
    assert noisy.tolist() == [[False, False, True, True, True], [False, False, False, True, True]]
    assert count_clean(noisy) == 2, "clean in every video"
    assert count_clean(noisy_frames(torch.zeros(1, 1, 3, 2, 2))) == 0, "where nothing is generated, nothing is given"
    later = torch.ones(1, 1, 4, 2, 2)
    later[:, :, 3] = 0
    assert count_clean(noisy_frames(later)) == 0, "only at the front"


def test_text_is_cut_to_its_tokens():
    context = torch.zeros(2, 8, 3)
    context[0, :3], context[1, 4] = 1, 2
    assert text.real_tokens(context).sum().item() == 4
    assert text.trim_text(context, 512).shape == (2, 5, 3)
    assert text.trim_text(context, 4).shape == (2, 4, 3)
    assert text.trim_text(torch.zeros(1, 8, 3), 512).shape == (1, 1, 3), "a text of nothing keeps a row"


def test_around_block_may_skip_and_change(model, inputs):
    plain = model(*inputs)
    seen = []

    def around(i, run, tokens):
        seen.append((i, tokens.shape))
        return run(tokens)

    assert torch.equal(model(*inputs, around_block=around), plain)
    assert seen == [(0, (1, 3, 4, 64)), (1, (1, 3, 4, 64))]
    skipped = model(*inputs, around_block=lambda i, run, tokens: tokens if i == 1 else run(tokens))
    assert not torch.allclose(skipped, plain)


def test_kernels_may_be_handed_in(model, inputs):
    chosen = model.choose_kernels(torch.device("cpu"))
    calls = []
    counting = chosen._replace(attend=lambda q, k, v: calls.append(q.shape) or chosen.attend(q, k, v))
    assert torch.equal(model(*inputs, kernels=counting), model(*inputs))
    assert len(calls) == 4, "self- and cross-attention of two blocks"


def test_owners_layers_run_whole(inputs):
    """An owner that says so keeps its layers in one piece, whatever the switches."""

    class Operations:
        Linear, Conv3d = nn.Linear, nn.Conv3d
        sliceable = staticmethod(lambda layer, x: False)

    off = Optimizations(fused_qkv=False, fused_ffn=False)
    torch.manual_seed(0)
    model = OptimizedTransformer(SMALL, off, operations=Operations).requires_grad_(False)
    whole = []
    for layer in (model.blocks[0].attn.qkv, model.blocks[0].cross_attn.kv, model.blocks[0].ffn.gate_up):
        layer.register_forward_hook(lambda *args: whole.append(1))
    model(*inputs)
    assert len(whole) == 3


def test_backends_are_listed_without_importing_them(monkeypatch):
    monkeypatch.setattr(requirement, "load", lambda module: pytest.fail(f"{module} is imported"))
    monkeypatch.setattr(requirement, "needs_cuda", lambda capability, exactly=False: "")
    monkeypatch.setattr(requirement, "find_spec", lambda name: object() if name == "sageattention" else None)
    listed = backends.listed()
    assert listed[0] == "auto" and {"sage", "sdpa", "sdpa-math"} <= set(listed)
    assert not {"flash2", "flash3", "flash4", "xformers"} & set(listed)


class Live(TorchDispatchMode):
    """Bytes of all tensors that live at once, beyond those of `own`."""

    def __init__(self, own: list[torch.Tensor]) -> None:
        super().__init__()
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in own}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 16, 24, 60, 104), (2, 16, 24, 60, 104), (1, 16, 24, 88, 160)])
def test_activation_bytes_are_those_of_a_counted_forward(monkeypatch, dtype, shape):
    """On the released model's sizes, by tensors that hold no data; one block, since blocks give memory back."""
    monkeypatch.setattr(fused, "attend_with_bias", lambda q, k, v, bias: torch.empty_like(q))
    config = replace(ModelConfig(), depth=1)
    model = OptimizedTransformer(config, dtype=dtype, device="meta").requires_grad_(False)
    x, t = torch.empty(shape, device="meta", dtype=dtype), torch.empty(shape[0], shape[2], device="meta")
    context = torch.empty(shape[0], 512, config.caption_channels, device="meta", dtype=dtype)
    own = [parameter.data for parameter in model.parameters()]
    with Live(own) as live:
        model(x, t, context, kernels=backends.Kernels(lambda q, k, v: torch.empty_like(q), None))
    assert live.peak == pytest.approx(activation_bytes(config, shape, dtype.itemsize), rel=0.02)
