"""How many graphs of a block the compiler makes as inputs change within and between videos."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from torch._dynamo.utils import counters

from ...measure.clock import clean_up, synchronize
from ...optimize.switches import Optimizations
from .. import workload
from ..part import Part, Row, columns
from ..variants import Bench

FRAMES = 13


class ForwardChange(NamedTuple):
    """How a forward differs from the first one; at_most: graphs that it may add."""

    name: str
    at_most: int
    batch: int = 2
    timestep: float = workload.TIMESTEP
    tokens: tuple[int, int] = workload.TEXT_TOKENS
    cond: int = 0
    cached: int = 0
    merged: float = 0.0
    wider: int = 0


CHANGES = (
    ForwardChange("first step", 1),
    ForwardChange("another timestep", 0, timestep=300.0),
    ForwardChange("another prompt, longer", 0, tokens=(300, 512)),
    ForwardChange("another prompt, of one word", 0, tokens=(2, 1)),
    ForwardChange("LoRA merged", 0, merged=1.0),
    ForwardChange("LoRA at another strength", 0, merged=-0.5),
    ForwardChange("without guidance", 1, batch=1),
    ForwardChange("one given frame", 1, cond=1),
    ForwardChange("more given frames", 1, cond=2),
    ForwardChange("given frames from a cache", 1, cached=1),
    ForwardChange("another resolution", 1, wider=2),
    ForwardChange("a third resolution", 0, wider=4),
    ForwardChange("the first again", 0),
)


def _merge(model: Any, strength: float) -> None:
    """ForwardChange weights in place, as merging a LoRA does."""
    for block in model.blocks:
        weight = block.ffn.down.weight
        weight.add_(torch.sign(weight), alpha=1e-4 * strength)


@torch.no_grad()
def run(bench: Bench) -> None:
    """Rows of `CHANGES`, one after the other on the bench's model: new graphs, and seconds of the first forward."""
    model, size, report = bench.model, bench.size, bench.report
    # Room for conditioning frames.
    size = workload.Size(size.height, size.width, max(size.frames, FRAMES), 2)
    inputs = workload.Inputs(model.config, size, bench.device)
    latents = torch.cat([inputs.latents, inputs.latents], -1)
    report.content["inputs"] |= inputs.describe() | {"size": str(size)}

    def forward(change: ForwardChange) -> None:
        x = latents[..., : inputs.latents.shape[-1] + change.wider * model.config.patch_size[2]]
        cache = model.fill_kv_cache(x[:, :, : change.cached].contiguous()) if change.cached else None
        x = x.expand(change.batch, -1, -1, -1, -1).contiguous()
        generator = torch.Generator(inputs.device).manual_seed(sum(change.tokens))
        text = model.embed_text(*workload.random_text(model.config, change.tokens[: change.batch], generator))
        timestep = torch.full((1, x.shape[2] if change.cond else 1), change.timestep, device=inputs.device)
        timestep[:, : change.cond] = 0
        model(x, timestep, text, num_cond_latents=change.cond, kv_cache=cache)

    def measured(change: ForwardChange) -> Row:
        before, started = counters["stats"]["unique_graphs"], time.perf_counter()
        if change.merged:
            _merge(model, change.merged)
        with workload.noting(model) as notes:
            forward(change)
        synchronize(bench.device)
        graphs = counters["stats"]["unique_graphs"] - before
        held = graphs <= change.at_most
        return {"first_s": time.perf_counter() - started, "graphs": graphs, "notes": notes, "held": held}

    with workload.switched(model, Optimizations(**bench.full() | {"compile": "blocks"})):
        for change in CHANGES:
            head = {"name": change.name, "at_most": change.at_most, "depth": model.config.depth}
            bench.add(head, measured, change, free=False)
    _merge(model, -sum(change.merged for change in CHANGES))
    clean_up(bench.device)


PART = Part(
    text="""## Compiling

One model with compiled blocks, changed in one way after another. *Graphs* is how many were compiled for the change.""",
    run=run,
    table=columns(name="", graphs="graphs", at_most="at most", held="held", first_s="first forward s", status=""),
)
