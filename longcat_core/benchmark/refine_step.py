"""One evaluation of the refinement: attention in full and block-sparse, by the exact path and by fp8."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch

from ..measure.clock import attempt, clean_up, measure
from ..measure.results import Report
from ..measure.speed import kernel_name
from ..optimize.block_sparse import BlockSparse, ChunkLayout, block_sparse_attend, choose_kernel, chunk_layout
from ..optimize.execution import OptimizedTransformer
from ..optimize.switches import Optimizations
from . import workload
from .ablation import EXACT, FP8, Bench, compared
from .kernels import random_qkv

DENSE, SPARSE = "dense", "block-sparse"
DENSE_EXACT, SPARSE_EXACT = f"{DENSE}, {EXACT}", f"{SPARSE}, {EXACT}"
DENSE_FP8, SPARSE_FP8 = f"{DENSE}, {FP8}", f"{SPARSE}, {FP8}"
ALONE = {DENSE: f"attention alone, {DENSE}", SPARSE: f"attention alone, {SPARSE}"}


@contextmanager
def attending(model: OptimizedTransformer, settings: BlockSparse | None) -> Iterator[None]:
    before, model.block_sparse = model.block_sparse, settings
    try:
        yield
    finally:
        model.block_sparse = before


def _layout(bench: Bench, settings: BlockSparse) -> ChunkLayout:
    _, _, frames, height, width = bench.size.latents()
    _, ph, pw = bench.model.config.patch_size
    return chunk_layout((frames, height // ph, width // pw), settings.chunk, settings.query_chunk, 0, bench.device)


def sparse_name(bench: Bench, settings: BlockSparse) -> str:
    """What block-sparse attention runs by at the bench's size."""
    layout = _layout(bench, settings)
    one = torch.empty((1, 1, 1, bench.model.config.head_dim), dtype=bench.model.dtype, device=bench.device)
    return f"{SPARSE}, {choose_kernel(settings, one, layout.q_chunk, layout.k_chunk, layout.padded)}"


def _evaluation(bench: Bench, name: str, path: str, settings: BlockSparse | None, phase: str) -> dict[str, Any]:
    # In full it takes a minute, and its kernels have run before: once is enough.
    bench = bench if settings is not None or bench.device.type != "cuda" else replace(bench, repeats=0)
    with attending(bench.model, settings):
        row = bench.run_network(name, bench.path(path), phase=phase)
    if settings is not None and row["status"] == "ok":
        row["attention"] = sparse_name(bench, settings)
    return row


@torch.no_grad()
def _alone(bench: Bench, report: Report, settings: BlockSparse) -> None:
    """Rows of one layer's self-attention by itself; block-sparse with its choice of chunks, on tokens laid out."""
    q, k, v = random_qkv(bench, 0)
    layout = _layout(bench, settings)

    def dense() -> dict[str, Any]:
        workload.exactly(bench.model, Optimizations(**bench.path(EXACT)))
        attend = bench.model.choose_kernels(bench.device).attend
        timing = measure(lambda: attend(q, k, v), bench.device, max(5, bench.repeats), bench.budget)
        return timing.as_row() | {"attention": kernel_name(attend)}

    def sparse() -> dict[str, Any]:
        attend, laid = block_sparse_attend(layout, settings), tuple(map(layout.arrange, (q, k, v)))
        timing = measure(lambda: attend(*laid), bench.device, max(5, bench.repeats), bench.budget)
        return timing.as_row() | {"attention": sparse_name(bench, settings)}

    first: dict[str, Any] = {}
    for what, run in ((DENSE, dense), (SPARSE, sparse)):
        row = attempt({"name": ALONE[what], "phase": "attention"}, bench.budget, run)
        clean_up(bench.device)
        row = report.add(compared(row, first, None))
        first = first or row
        bench.say(f"{row['name']}: {row['ms']:.2f} ms" if row["status"] == "ok" else f"{row['name']}: {row['reason']}")


def refine(bench: Bench, report: Report, fp8: bool = True, settings: BlockSparse | None = None) -> None:
    """Rows of one evaluation at the bench's size, and of one layer's attention; fp8 last, since it changes the weights.

    The ratio is to dense attention by the exact path, of attention alone to dense attention alone. settings: of
    block-sparse attention; None: the released model's.
    """
    settings = settings or BlockSparse()
    report.content["inputs"]["block_sparse"] = asdict(settings)
    _alone(bench, report, settings)
    found = report.add(_evaluation(bench, SPARSE_EXACT, EXACT, settings, "path"))
    first = report.add(_evaluation(bench, DENSE_EXACT, EXACT, None, "baseline"))
    found.update(compared(found, first, None))
    if not fp8 or report.add(bench.quantize())["status"] != "ok":
        return
    for name, sparse in ((SPARSE_FP8, settings), (DENSE_FP8, None)):
        report.add(compared(_evaluation(bench, name, FP8, sparse, "fp8"), first, None))
