"""The error of fp8 by the choice of layers that are quantized."""

from __future__ import annotations

import copy
from typing import Any

import torch

from ...measure.fidelity import relative_error, tensor_psnr
from ...optimize.quantization import policies, quantize
from ...optimize.switches import Optimizations
from .. import workload
from ..part import Chart, Part, columns
from ..variants import Bench
from .exactness import chart, forward


@torch.no_grad()
def run(bench: Bench) -> None:
    """Rows of every policy: error of the output against the 16-bit network, on the model's first blocks."""
    model, inputs = bench.few(), bench.inputs()
    chosen = Optimizations(**(bench.full() | {"compile": "off", "fp8": True}))

    def output(network: Any) -> torch.Tensor:
        workload.exactly(network, chosen)
        return forward(network, inputs)

    expected = output(model)
    for name, policy in policies(model.config.depth).items():

        def one(policy: Any = policy) -> dict[str, Any]:
            lossy = copy.deepcopy(model)
            quantize(lossy, policy)
            out = output(lossy)
            return {"error": relative_error(out, expected), "psnr": tensor_psnr(out, expected)}

        bench.add({"name": name}, one)


PART = Part(
    text="## What to keep out of fp8\n\nError against the 16-bit network when only some layers are in fp8.",
    run=run,
    columns=("name", "error", "psnr", "status"),
    table=columns(name="in fp8", error="relative error", psnr="PSNR dB", status=""),
    charts=(Chart(chart, ("error",)),),
)
