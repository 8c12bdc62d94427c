"""What lives at once in a forward of the released model, followed tensor by tensor, and what is counted for it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longcat_core.model.config import ModelConfig
from longcat_core.model.text import TextTokens
from longcat_core.optimize import attention as backends
from longcat_core.optimize import execution, quantization
from longcat_core.optimize.kernels import elementwise as kernels
from longcat_core.optimize.kernels import text_attention
from longcat_core.optimize.memory import forward_bytes
from longcat_core.optimize.optimized import OptimizedTransformer
from longcat_core.optimize.requirement import HALF
from longcat_core.optimize.switches import Optimizations

ONE = replace(ModelConfig(), depth=1)
META, BF16 = torch.device("meta"), torch.bfloat16
REFINED = 48, 88, 160


class Live(TorchDispatchMode):
    """Bytes of the storages that were made while this is entered and are still there; and the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            key = x.untyped_storage()._cdata if isinstance(x, Tensor) else None
            if key is not None and key not in given and key not in self.sizes:
                self.sizes[key] = x.untyped_storage().nbytes()
                self.now += self.sizes[key]
                self.peak = max(self.peak, self.now)
                weakref.finalize(x.untyped_storage(), self._gone, key)
        return out

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


@pytest.fixture(params=[True, False], ids=["own kernels", "PyTorch's"])
def own(request, monkeypatch) -> bool:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q.new_empty(q.shape)

    def scaled_mm(a: Tensor, b: Tensor, *scales: Tensor, out_dtype: torch.dtype, **options: object) -> Tensor:
        return a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype)

    # In place, as outside of graphs.
    monkeypatch.setattr(kernels, "_launch_norm_rope", lambda x, weight, cos, sin, out: out)
    monkeypatch.setattr(kernels, "_launch_residual_norm", lambda *_: None)
    monkeypatch.setattr(text_attention, "_launch", lambda q, weight, k, v, bias, out: out)
    for module, name in ((kernels, "usable"), (execution, "kernels_usable")):
        monkeypatch.setattr(module, name, lambda x: request.param and x.dtype in HALF)
    monkeypatch.setattr(quantization, "missing", lambda device: "")
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    monkeypatch.setattr(execution.Execution, "_give_up", lambda self, *_: False)
    chosen = backends.Kernels(attend, None, attend)
    monkeypatch.setattr(execution.Execution, "choose_kernels", lambda self, device: chosen)
    return request.param


@torch.no_grad()
def peak(batch: int, grid: tuple[int, int, int], fp8: bool) -> int:
    model = OptimizedTransformer(ONE, Optimizations(), dtype=BF16, device=META).requires_grad_(False)
    if fp8:
        quantization.quantize(model)
    text = TextTokens(torch.empty(batch, 127, ONE.hidden_size, dtype=BF16, device=META), lengths=[126] * batch)
    x, timestep = torch.empty(batch, 16, *grid, device=META), torch.empty(1, 1, device=META)
    # The text's keys are kept from the first one on.
    model(x, timestep, text)
    with Live() as live:
        model(x, timestep, text)
    return live.peak


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("batch", "grid"), [(1, (24, 60, 104)), (2, (24, 60, 104)), (1, REFINED)])
def test_the_count_covers_what_lives_at_once(own, batch, grid, fp8):
    counted = forward_bytes(ONE, (batch, 16, *grid), 2, own, fp8)
    found = peak(batch, grid, fp8)
    assert 0.65 * counted < found <= counted
    if own:
        # All tokens in 16 bits, so many times: their queries, keys and values, the attention's output and themselves
        # take five.
        frames, height, width = grid
        assert found < 5.6 * batch * frames * height // 2 * width // 2 * ONE.hidden_size * 2
