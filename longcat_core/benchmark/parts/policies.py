"""The error of fp8 by the choice of layers that are quantized."""

from __future__ import annotations

import copy
from typing import Any

import torch

from ...optimize.quantization import Policy, policies, quantize
from ...optimize.switches import Optimizations
from .. import workload
from ..part import Part, Row, columns
from ..variants import Bench
from .exactness import CHART, errors


@torch.no_grad()
def run(bench: Bench) -> None:
    """Rows of every policy: error of the output against the 16-bit network, on the model's first blocks."""
    model, inputs = bench.first_blocks(), bench.inputs()
    chosen = Optimizations(**bench.full() | {"compile": "off", "fp8": True})

    def output(network: Any) -> torch.Tensor:
        with workload.switched(network, chosen):
            return workload.network_forward(network, inputs)()

    expected = output(model)

    def lossy(policy: Policy) -> Row:
        network = copy.deepcopy(model)
        quantize(network, policy)
        return errors(output(network), expected)

    for name, policy in policies(model.config.depth).items():
        bench.add({"name": name}, lossy, policy)


PART = Part(
    text="## What to keep out of fp8\n\nError against the 16-bit network when only some layers are in fp8.",
    run=run,
    table=columns(name="in fp8", error="relative error", psnr="PSNR dB", status=""),
    charts=(CHART,),
)
