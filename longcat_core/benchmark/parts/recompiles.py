"""How many graphs of a block the compiler makes as inputs change within and between videos."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from ...measure.clock import attempt, clean_up, synchronize
from ...optimize.switches import Optimizations
from .. import workload
from ..part import Part, columns
from ..variants import Bench

FRAMES = 13


class Change(NamedTuple):
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
    Change("first step", 1),
    Change("another timestep", 0, timestep=300.0),
    Change("another prompt, longer", 0, tokens=(300, 512)),
    Change("another prompt, of one word", 0, tokens=(2, 1)),
    Change("LoRA merged", 0, merged=1.0),
    Change("LoRA at another strength", 0, merged=-0.5),
    Change("without guidance", 1, batch=1),
    Change("one given frame", 1, cond=1),
    Change("more given frames", 1, cond=2),
    Change("given frames from a cache", 1, cached=1),
    Change("another resolution", 1, wider=2),
    Change("a third resolution", 0, wider=4),
    Change("the first again", 0),
)


def _text(inputs: workload.Inputs, tokens: tuple[int, int], batch: int) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor(tokens[:batch], device=inputs.device)
    mask = (torch.arange(workload.TEXT_LENGTH, device=inputs.device)[None] < lengths[:, None]).long()
    shape = batch, workload.TEXT_LENGTH, inputs.config.caption_channels
    generator = torch.Generator(inputs.device).manual_seed(sum(tokens))
    return torch.randn(shape, generator=generator, device=inputs.device) * mask[..., None], mask


def _merge(model: Any, strength: float) -> None:
    """Change weights in place, as merging a LoRA does."""
    for block in model.blocks:
        weight = block.ffn.down.weight
        weight.add_(torch.sign(weight), alpha=1e-4 * strength)


@torch.no_grad()
def run(bench: Bench) -> None:
    """Rows of `CHANGES`, one after the other on the bench's model: new graphs, and seconds of the first forward."""
    model, size, report = bench.model, bench.size, bench.report
    # Room for given frames.
    size = workload.Size(size.height, size.width, max(size.frames, FRAMES), 2)
    inputs = workload.Inputs(model.config, size, bench.device)
    latents = torch.cat([inputs.latents, inputs.latents], -1)
    report.content["inputs"] |= inputs.describe() | {"size": str(size)}
    workload.exactly(model, Optimizations(**bench.full() | {"compile": "blocks"}))

    def forward(change: Change) -> None:
        x = latents[..., : inputs.latents.shape[-1] + change.wider * model.config.patch_size[2]]
        cache = model.fill_kv_cache(x[:, :, : change.cached].contiguous()) if change.cached else None
        x = x.expand(change.batch, -1, -1, -1, -1).contiguous()
        context, mask = _text(inputs, change.tokens, change.batch)
        frames = x.shape[2] if change.cond else 1
        timestep = torch.full((1, frames), change.timestep, device=inputs.device)
        timestep[:, : change.cond] = 0
        text = model.embed_text(context, mask)
        model(x, timestep, text, num_cond_latents=change.cond, kv_cache=cache)

    def one(change: Change) -> Iterator[tuple[str, Any]]:
        before, started = counters["stats"]["unique_graphs"], time.perf_counter()
        if change.merged:
            _merge(model, change.merged)
        with workload.Notes(model) as notes:
            forward(change)
        synchronize(bench.device)
        yield "first_s", time.perf_counter() - started
        yield "graphs", counters["stats"]["unique_graphs"] - before
        yield "notes", notes

    def finish(row: dict[str, Any]) -> dict[str, Any]:
        return row | {"held": row["graphs"] <= row["at_most"]}

    for change in CHANGES:
        head = {"name": change.name, "at_most": change.at_most, "depth": model.config.depth}
        # Freeing memory as `Bench.add` does would drop the graphs.
        row = attempt(head, bench.budget, lambda change=change: dict(one(change)))
        report.add(finish(row) if row["status"] == "ok" else row)
        bench.say(f"recompiles, {change.name}: {row.get('reason') or row['graphs']}")
    _merge(model, -sum(change.merged for change in CHANGES))
    clean_up(bench.device)


PART = Part(
    text="""## Compiling

One model with compiled blocks, and one change after the other. *Graphs* is how many were compiled for the change.""",
    run=run,
    columns=("name", "graphs", "at_most", "first_s", "status"),
    table=columns(name="", graphs="graphs", at_most="at most", held="held", first_s="first forward s", status=""),
)
