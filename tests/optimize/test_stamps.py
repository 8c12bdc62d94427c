"""Every change of weights shows in the stamp of their layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from longcat_core.optimize.adapters import adapt, release
from longcat_core.optimize.optimized import OptimizedTransformer
from longcat_core.optimize.quantization import Policy, quantize
from longcat_core.optimize.stamps import stamp

from ..support.tiny import tiny_config


def adapted(model: OptimizedTransformer) -> None:
    adapt(model.blocks[1].ffn.down, 2)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.blocks[0].attn.qkv.weight.mul_(2),
        lambda model: model.final_layer.linear.bias.zero_(),
        lambda model: setattr(model.blocks[0].attn.qkv, "weight", nn.Parameter(model.blocks[0].attn.qkv.weight.data)),
        lambda model: setattr(model.blocks[0].attn.proj, "bias", None),
        lambda model: model.blocks[1].ffn.down.lora_scale.fill_(1),
        lambda model: release(model.blocks[1].ffn.down),
        lambda model: adapt(model.blocks[1].ffn.down, 2),
        lambda model: adapt(model.blocks[0].ffn.down, 2),
        lambda model: quantize(model, Policy(keep_last=1)),
        lambda model: setattr(model.blocks, "1", model.blocks[0]),
    ],
)
@torch.no_grad()
def test_what_changes(change: Callable[[OptimizedTransformer], object]):
    model = OptimizedTransformer(tiny_config()).requires_grad_(False)
    adapted(model)
    before, held = stamp([model])
    assert stamp([model])[0] == before and {*map(id, held)} == {*map(id, model.parameters())}
    change(model)
    assert stamp([model])[0] != before


def test_weights_that_do_not_count_writes():
    """Made in inference mode."""
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    model[0].weight = nn.Parameter(torch.zeros(3, 2), requires_grad=False)
    before, held = stamp([model])
    assert stamp([model])[0] == before and len(held) == 4
    model[0].weight.add_(1)
    assert stamp([model])[0] != before


def test_weights_made_in_inference_mode_and_moved_outside_it():
    """As ComfyUI does when it unloads models between prompts, with weights from which it took a LoRA before."""
    with torch.inference_mode():
        layer = nn.Linear(2, 3)
    layer.weight.data = layer.weight.clone()
    assert not layer.weight.is_inference()
    with pytest.raises(RuntimeError, match="do not track version counter"):
        _ = layer.weight._version
    before, _ = stamp([layer])
    assert stamp([layer])[0] == before
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
    assert stamp([layer])[0] != before
