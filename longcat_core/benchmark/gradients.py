"""A training step with and without gradient checkpointing: time, memory, and whether the gradients are the same."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ..measure.clock import attempt, clean_up, measure
from ..measure.fidelity import relative_error
from ..measure.results import Report
from ..optimize.switches import Optimizations
from ..training.step import flow_matching_loss
from . import workload
from .ablation import Bench

# Gradients of the same mathematics, recomputed: equal but for kernels whose sums have no fixed order.
SAME = 1e-2


def training(bench: Bench, report: Report, depth: int = 2) -> None:
    """Rows of one loss and its gradients, batch 1, on a copy of the model's first blocks."""
    model = copy.deepcopy(workload.first_blocks(bench.model, min(depth, bench.model.config.depth)))
    model.requires_grad_(True).train()
    inputs = bench.inputs(1)
    noise = torch.randn(inputs.latents.shape, device=bench.device, generator=_seeded(bench.device))
    level = torch.tensor([workload.SIGMA], device=bench.device)
    expected: dict[str, Tensor] = {}

    for name, checkpointing in (("without checkpointing", False), ("with gradient checkpointing", True)):

        def step() -> None:
            model.zero_grad(set_to_none=True)
            loss = flow_matching_loss(model, inputs.latents, level, inputs.context, inputs.mask, noise=noise)
            loss.backward()

        def run(checkpointing: bool = checkpointing, step=step) -> dict[str, Any]:
            chosen = Optimizations(gradient_checkpointing=checkpointing)
            workload.exactly(model, chosen)
            row = measure(step, bench.device, bench.repeats, bench.budget).as_row()
            if not checkpointing:
                expected.update({name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None})
                return row
            difference = max(
                relative_error(p.grad.cpu(), expected[name]) if expected[name].any() else float(p.grad.any())
                for name, p in model.named_parameters()
                if name in expected
            )
            return row | {"gradient_difference": difference, "equal": difference <= SAME}

        row = {"name": name, "gradient_checkpointing": checkpointing, "depth": model.config.depth}
        row = report.add(attempt(row, bench.budget, run))
        model.zero_grad(set_to_none=True)
        clean_up(bench.device)
        bench.say(f"training step {name}: {row.get('ms') or row['reason']}")


def _seeded(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(workload.SEED)
