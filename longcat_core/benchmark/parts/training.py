"""A training step with and without gradient checkpointing: time, memory, and equality of the gradients."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from ...measure.clock import measure
from ...measure.fidelity import relative_error
from ...optimize.switches import Optimizations
from ...training.step import flow_matching_loss
from .. import workload
from ..part import Part, Row, bars, columns
from ..variants import Bench

# Recomputed gradients differ only where kernels sum in no fixed order.
SAME = 1e-2


def run(bench: Bench) -> None:
    """Rows of one loss and its gradients, batch 1, on a copy of the model's first blocks."""
    model = copy.deepcopy(bench.first_blocks())
    model.requires_grad_(True).train()
    inputs = bench.inputs(1)
    generator = torch.Generator(bench.device).manual_seed(workload.SEED)
    noise = torch.randn(inputs.latents.shape, device=bench.device, generator=generator)
    level = torch.tensor([workload.SIGMA], device=bench.device)
    expected: dict[str, Tensor] = {}

    def step() -> None:
        model.zero_grad(set_to_none=True)
        loss = flow_matching_loss(model, inputs.latents, level, inputs.context, inputs.mask, noise=noise)
        loss.backward()

    def timed(checkpointing: bool) -> Row:
        with workload.switched(model, Optimizations(gradient_checkpointing=checkpointing)):
            row = measure(step, bench.device, bench.repeats, bench.budget).as_row()
        gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
        if not checkpointing:
            expected.update(gradients)
            return row
        difference = max(
            relative_error(gradients[name], known) if known.any() else float(gradients[name].any())
            for name, known in expected.items()
        )
        return row | {"gradient_difference": difference, "equal": difference <= SAME}

    for name, checkpointing in (("without checkpointing", False), ("with gradient checkpointing", True)):
        head = {"name": name, "gradient_checkpointing": checkpointing, "depth": model.config.depth}
        bench.add(head, timed, checkpointing)
        model.zero_grad(set_to_none=True)


PART = Part(
    text="## Gradient checkpointing\n\nOne loss and its gradients, with and without recomputing each block.",
    run=run,
    table=columns(
        name="", ms="ms", peak_gib="peak GiB", gradient_difference="difference of gradients", equal="equal", status=""
    ),
    charts=(bars("A training step", "ms", "ms", "{:.1f}"),),
)
