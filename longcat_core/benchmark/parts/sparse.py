"""Sparse attention: every kernel by density, choice, exact part and tail apart; steps with it beside dense ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from ...errors import LongCatError
from ...measure.clock import OK, measure
from ...measure.fidelity import relative_error
from ...measure.results import markdown
from ...optimize.attention import Inputs, resolve_kernels
from ...optimize.kernels import sparse, sparse_exact
from ...optimize.sparse.choose import BACKENDS, SparseBackend
from ...optimize.sparse.passes import MIN_BLOCKS
from ...optimize.sparse.plain import attend_sparse_plain
from ...optimize.sparse.settings import BLOCK, QUERY_BLOCKS, Sparse, kept
from ...sampling.conditioning import video_frames
from .. import workload
from ..part import STEPS, Part, Results, measured_rows, preparation, spread
from ..variants import DISTILLED, EXACT, FP8, FP8_8BIT, Bench, Row, compare_with

DENSITIES = (0.15, 0.3, 0.0625)
SETTINGS = Sparse(density=DENSITIES[0])
SPARSE, DENSE, ALONE = "sparse", "dense", "attention alone"
EIGHT_BIT = " by cudnn-fp8"
# Of dense steps by path, where FP8 is as EXACT.
DENSE_ALONE = {EXACT: f"{ALONE}, {DENSE}", FP8_8BIT: f"{ALONE}, {DENSE}, 8 bits"}
# The error is measured on the last keys and these first queries and heads, which sees a short last key block.
QUERIES, HEADS = 256, 2


def sized(bench: Bench) -> Bench:
    """Long enough for key blocks to be left out."""
    config, _, frames = bench.model.config, *bench.size.latents()[1:3]
    per_frame = bench.size.tokens(config) // frames
    frames = max(bench.size.frames, video_frames(math.ceil((MIN_BLOCKS + 1) * BLOCK / per_frame)))
    return bench.sized(replace(bench.size, frames=frames))


def _timed(bench: Bench, function: Callable[[], Any]) -> Row:
    return measure(function, bench.device, max(3, bench.repeats), bench.budget).as_row()


def _parts(bench: Bench, name: str, q: Tensor, k: Tensor, v: Tensor, keep: list[int], query_block: int) -> Row:
    """Milliseconds of the choice, the exact part and the tail of one of our own pipelines."""
    chosen, means = sparse.choose(q, k, keep, 0, query_block)
    exact = sparse_exact.attend_exact(q, k, v, chosen, query_block, name)
    calls: dict[str, Callable[[], Any]] = {
        "choose_ms": lambda: sparse.choose(q, k, keep, 0, query_block),
        "exact_ms": lambda: sparse_exact.attend_exact(q, k, v, chosen, query_block, name),
        # In place where it can be, so its output is of no use after the first call; its time is.
        "tail_ms": lambda: sparse.finish(q, k, v, exact, chosen, means, query_block, True),
    }
    return {field: _timed(bench, call)["ms"] for field, call in calls.items()}


def _kernel(
    bench: Bench, backend: SparseBackend, density: float, query_block: int, q: Tensor, k: Tensor, v: Tensor
) -> Row:
    if refused := backend.why_not(Inputs.of(q), query_block, True):
        raise LongCatError(refused)
    if backend.name == "plain" and q.is_cuda:
        raise LongCatError("the definition takes minutes at this size")
    keep = kept((density,) * q.shape[2], k.shape[1] // BLOCK)
    options: dict[str, Any] = {"sink": 0, "query_block": query_block, "tail": True}
    numbers = torch.tensor(keep, dtype=torch.int32)
    some = q[:1, :QUERIES, :HEADS], k[:1, :, :HEADS], v[:1, :, :HEADS]
    expected = attend_sparse_plain(*some, numbers[:HEADS], **options)
    found = backend.attend(q, k, v, numbers, **options)[:1, :QUERIES, :HEADS]
    row = {"error": relative_error(found, expected)}
    row |= _timed(bench, lambda: backend.attend(q, k, v, numbers, **options))
    return row | (_parts(bench, backend.name, q, k, v, keep, query_block) if backend.name in sparse_exact.NEEDS else {})


@torch.no_grad()
def _kernels(bench: Bench) -> None:
    """Rows of dense attention and of every kernel at every density, over random tokens."""
    from .backends import random_qkv

    q, k, v = random_qkv(bench, 0)

    def dense(path: str) -> Row:
        attend = resolve_kernels(bench.path(path)["attention"], Inputs.of(q)).attend
        return _timed(bench, lambda: attend(q, k, v)) | {"attention": workload.kernel_name(attend)}

    first = bench.add({"name": DENSE_ALONE[EXACT], "phase": "attention"}, dense, EXACT)
    if bench.fp8:
        bench.add({"name": DENSE_ALONE[FP8_8BIT], "phase": "attention"}, dense, FP8_8BIT)
    for density in DENSITIES:
        for backend in BACKENDS:
            for block in QUERY_BLOCKS if density == DENSITIES[0] else QUERY_BLOCKS[:1]:
                name = f"{ALONE}, {density:g}, {backend.name}{f', {block} queries' if block != BLOCK else ''}"
                head = {"name": name, "phase": "attention", "density": density, "kernel": backend.name}
                head |= {"query_block": block, "exact": backend.exact}
                row = bench.add(head, _kernel, bench, backend, density, block, q, k, v)
                if row["status"] == OK:
                    row.update(compare_with(first)(row))


def _steps(bench: Bench, path: str, settings: Sparse, phase: str) -> None:
    """Rows of a step with guidance and of one without, sparse and dense."""
    for suffix, batch in (("", bench.size.batch), (DISTILLED, 1)):
        dense = bench.network(f"{DENSE}, {path}{suffix}", bench.path(path), batch, phase="baseline")
        rows = {f"{SPARSE}, {path}{suffix}": settings}
        if path == FP8 and not suffix:
            rows[f"{SPARSE}, {path}{EIGHT_BIT}"] = replace(settings, kernel="cudnn-fp8")
        for name, chosen in rows.items():
            bench.add({"name": name, "batch": batch, "phase": phase, "density": chosen.density}, _step, bench, path,
                      name, chosen, batch, dense)  # fmt: skip


def _step(bench: Bench, path: str, name: str, settings: Sparse, batch: int, dense: Row) -> Row:
    model, inputs = bench.model, bench.inputs(batch)
    chosen = workload.Optimizations(**bench.path(path))
    with workload.attending(model, settings):
        with workload.switched(model, chosen, name) as notes:
            row = bench.step(inputs, chosen, 0, workload.network_forward(model, inputs)) | {"notes": notes}
        if model.sparse != settings:
            raise LongCatError(f"{name} was given up at its first step: {'; '.join(notes)}")
    return compare_with(dense)(row | {"attention": settings.kernel})


def run(bench: Bench) -> None:
    """Rows of steps, fp8 after exact ones, since it changes the weights; then of kernels. Ratios are to dense
    attention."""
    settings = SETTINGS
    bench.report.content["inputs"]["sparse"] = asdict(settings)
    _steps(bench, EXACT, settings, "path")
    if bench.fp8 and bench.quantize():
        _steps(bench, FP8, settings, "fp8")
        # Of these the dense steps are faster.
        _steps(bench, FP8_8BIT, settings, "fp8")
    # Last, because compiling all of them takes longest and a budget may end first.
    _kernels(bench)


def table(results: Results, targets: Any) -> str:
    """Rows of kernels and of steps; at full size with targets."""
    rows = measured_rows(results)
    fields = ("ms", "ratio", "choose_ms", "exact_ms", "tail_ms", "error", "status")
    kernels = [[row["name"], *map(row.get, fields)] for row in rows if row["phase"] == "attention"]
    head = ("", "ms", "x dense", "choice ms", "exact part ms", "tail ms", "error", "")
    steps = [
        [row["name"], row.get("ms"), spread(row), *map(row.get, ("ratio", "peak_gib", "first_s", "status"))]
        for row in rows
        if row["phase"] != "attention"
    ]
    text = markdown(head, kernels) + "\n\n"
    text += markdown(("", "ms a step", "from, to", "x dense", "peak GiB", "first call s", ""), steps)
    if targets is not None and targets.comparable(results):
        text += f"\n\n{targets.verdicts(results)}"
    return text + preparation(results)


PART = Part(
    text="""## Sparse attention

*Attention alone* is one layer's self-attention over random tokens, in which 0.15, 0.3 or 0.0625 of the key blocks are
attended to exactly and all others through their means. *Choice* finds the blocks, the *exact part* attends to them, and
the *tail* adds the others. The error is relative, against the definition on a slice. Steps keep 0.15 of the blocks.""",
    run=run,
    table=table,
    charts=(STEPS,),
    sized=sized,
)
