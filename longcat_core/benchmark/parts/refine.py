"""One evaluation of the refinement: dense and block-sparse attention, on the exact path and in fp8."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch

from ...measure.clock import measure
from ...measure.results import markdown
from ...measure.speed import kernel_name
from ...optimize.block_sparse import BlockSparse, ChunkLayout, block_sparse_attend, choose_kernel, chunk_layout
from ...optimize.switches import Optimizations
from .. import workload
from ..part import STEPS, Part, Results, measured_rows, met_or_missed, preparation, spread
from ..variants import EXACT, FP8, Bench, Row, compare_with
from .backends import random_qkv

DENSE, SPARSE = "dense", "block-sparse"
DENSE_EXACT, SPARSE_EXACT = f"{DENSE}, {EXACT}", f"{SPARSE}, {EXACT}"
DENSE_FP8, SPARSE_FP8 = f"{DENSE}, {FP8}", f"{SPARSE}, {FP8}"
EIGHT_BIT = f"{SPARSE}, 8 bits"
ALONE = {name: f"attention alone, {name}" for name in (DENSE, SPARSE, EIGHT_BIT)}


def sized(bench: Bench) -> Bench:
    """Batch 1: the refinement runs without guidance."""
    return bench.sized(replace(bench.size, batch=1))


def _layout(bench: Bench, settings: BlockSparse) -> ChunkLayout:
    _, _, frames, height, width = bench.size.latents()
    _, ph, pw = bench.model.config.patch_size
    return chunk_layout((frames, height // ph, width // pw), settings.chunk, settings.query_chunk, 0, bench.device)


def _sparse_name(bench: Bench, settings: BlockSparse, eight_bit: bool) -> str:
    """The kernel of block-sparse attention at the bench's size. eight_bit: layers run in 8 bits."""
    layout = _layout(bench, settings)
    one = torch.empty((1, 1, 1, bench.model.config.head_dim), dtype=bench.model.dtype, device=bench.device)
    return f"{SPARSE}, {choose_kernel(settings, one, layout.q_chunk, layout.k_chunk, layout.padded, eight_bit)}"


def _evaluation(bench: Bench, name: str, path: str, settings: BlockSparse | None, phase: str, first: Row) -> Row:
    # Dense attention takes a minute on a GPU, and its kernels are warm: one call is enough.
    bench = bench if settings or bench.device.type != "cuda" else replace(bench, repeats=0)

    def finish(row: Row) -> Row:
        name = {} if settings is None else {"attention": _sparse_name(bench, settings, path == FP8)}
        return compare_with(first)(row | name)

    with workload.attending(bench.model, settings):
        return bench.network(name, bench.path(path), finish=finish, phase=phase)


@torch.no_grad()
def _alone(bench: Bench, settings: BlockSparse) -> None:
    """Rows of one layer's self-attention alone; block-sparse includes the choice of chunks, not their layout."""
    q, k, v = random_qkv(bench, 0)
    layout = _layout(bench, settings)

    def timed(attend: Any, tensors: Any, name: str) -> Row:
        timing = measure(lambda: attend(*tensors), bench.device, max(5, bench.repeats), bench.budget)
        return timing.as_row() | {"attention": name}

    def dense() -> Row:
        with workload.switched(bench.model, Optimizations(**bench.path(EXACT))):
            attend = bench.model.choose_kernels(bench.device).attend
        return timed(attend, (q, k, v), kernel_name(attend))

    def sparse(settings: BlockSparse) -> Row:
        name = _sparse_name(bench, settings, False)
        arranged = tuple(map(layout.arrange, (q, k, v)))
        return compare_with(first)(timed(block_sparse_attend(layout, settings), arranged, name))

    first = bench.add({"name": ALONE[DENSE], "phase": "attention"}, dense)
    bench.add({"name": ALONE[SPARSE], "phase": "attention"}, sparse, settings)
    if bench.fp8:
        bench.add({"name": ALONE[EIGHT_BIT], "phase": "attention"}, sparse, replace(settings, kernel="cudnn-fp8"))


def run(bench: Bench) -> None:
    """Rows of one layer's attention and of one evaluation; fp8 last, since it changes the weights.

    Ratios are to dense attention on the exact path, or of attention alone to dense attention alone.
    """
    settings = BlockSparse()
    bench.report.content["inputs"]["block_sparse"] = asdict(settings)
    _alone(bench, settings)
    found = _evaluation(bench, SPARSE_EXACT, EXACT, settings, "path", {})
    first = _evaluation(bench, DENSE_EXACT, EXACT, None, "baseline", {})
    if found["status"] == "ok":
        found.update(compare_with(first)(found))
    if bench.fp8 and bench.quantize():
        _evaluation(bench, SPARSE_FP8, FP8, settings, "fp8", first)
        _evaluation(bench, DENSE_FP8, FP8, None, "fp8", first)


def table(results: Results, targets: Any) -> str:
    """Rows, at full size with targets and the public implementation's figure."""
    judged = targets is not None and targets.comparable(results)
    wanted = {target.name: target for target in targets.of("refine")} if judged else {}
    lines = []
    for row in measured_rows(results):
        ms = row.get("ms")
        line = [row["name"], ms, spread(row), row.get("ratio")]
        if judged:
            target = wanted.get(row["name"])
            verdict = None if target is None or ms is None else met_or_missed(target.is_met(ms / 1000))
            public = targets.public_refine_s * 1000 / ms if ms and row.get("phase") != "attention" else None
            line += [target and target.bound, verdict, public]
        lines.append((*line, row.get("peak_gib"), row.get("first_s"), row.get("attention"), row["status"]))
    head = ("", "ms", "from, to", "x dense", *(("target", "reached", "x public") if judged else ()))
    text = markdown((*head, "peak GiB", "first call s", "attention", ""), lines) + preparation(results)
    if judged:
        text += f"\n\nThe public code takes {targets.public_refine_s} s on an H100, block-sparse and eager."
    return text


PART = Part(
    text="""## Refining to 720p

One evaluation of the network without guidance, with dense and with block-sparse attention. *Attention alone* is the
attention of one layer; for block-sparse attention it includes the choice of chunks.""",
    run=run,
    table=table,
    charts=(STEPS,),
    sized=sized,
)
