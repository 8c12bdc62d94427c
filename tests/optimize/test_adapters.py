"""One adapted layer: what it computes, and that it makes no tensor of the output's size for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from longcat_core.optimize.adapters import adapt
from longcat_core.optimize.quantization import Fp8Linear


class Made(TorchDispatchMode):
    """Counts tensors of one shape that operations make and do not write into."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.numel, self.storages = torch.Size(shape).numel(), []

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.numel() == self.numel:
            storage = out.untyped_storage()
            if all(storage._cdata != other._cdata for other in self.storages):
                self.storages.append(storage)
        return out


def adapted(fp8: bool = False) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.Linear(32, 96).requires_grad_(False)
    layer = Fp8Linear.of(layer) if fp8 else layer
    adapt(layer, 4)
    with torch.no_grad():
        for parameter in (layer.lora_down, layer.lora_up, layer.lora_scale):
            parameter.copy_(torch.randn(parameter.shape))
    return layer


def plain(layer: nn.Module, x: Tensor) -> Tensor:
    return type(layer).__bases__[1].forward(layer, x)


def wanted(layer: nn.Module, x: Tensor) -> Tensor:
    return plain(layer, x) + x @ layer.lora_down.t() * layer.lora_scale @ layer.lora_up.t()


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_the_change_is_added_to_the_output_where_it_lies(fp8, grad):
    layer, x = adapted(fp8), torch.randn(2, 3, 5, 32)
    # One frame of two samples, whose rows do not follow each other.
    for given in (x, x[:, 1:2], x[0, 0]):
        shape = *given.shape[:-1], 96
        with torch.set_grad_enabled(grad), Made(*shape) as without:
            plain(layer, given)
        with torch.set_grad_enabled(grad), Made(*shape) as made:
            out = layer(given)
        torch.testing.assert_close(out, wanted(layer, given))
        assert len(made.storages) == len(without.storages)


def test_where_something_learns_nothing_is_written_over():
    layer, x = adapted(), torch.randn(2, 5, 32)
    for learns in (x, layer.lora_up, layer.lora_down):
        learns.requires_grad_(True)
        layer(x).square().sum().backward()
        assert learns.grad is not None and learns.grad.any()
        learns.requires_grad_(False)
