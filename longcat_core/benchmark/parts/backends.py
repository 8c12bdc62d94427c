"""Attention kernels at the model's shapes: time, rate, and error against fp32 on a slice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...errors import LongCatError
from ...measure.charts import BLUE, ORANGE
from ...measure.clock import measure
from ...measure.fidelity import relative_error
from ...optimize.attention import BACKENDS, Backend, Inputs
from ...optimize.kernels import text_attention
from ..part import Part, Row, bars, columns
from ..variants import Bench
from ..workload import FUSED_TEXT, SEED, TEXT_LENGTH

# The error is measured on a slice: these queries and heads over all keys.
QUERIES, HEADS = 256, 4


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v in fp32 for the slice of q [B, N, H, D]; returns [1, queries, heads, D]."""
    q, k, v = (x[:1, :, :HEADS].float().transpose(1, 2) for x in (q[:, :QUERIES], k, v))
    weights = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
    return (weights @ v).transpose(1, 2)


def random_qkv(bench: Bench, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, N, heads, head_dim] at the bench's size and dtype, and `keys` keys and values (0: N)."""
    config, inputs = bench.model.config, bench.inputs()
    generator = torch.Generator(bench.device).manual_seed(SEED)
    tokens = inputs.size.tokens(config)

    def random(rows: int) -> Tensor:
        shape = inputs.size.batch, rows, config.num_heads, config.head_dim
        return torch.randn(shape, generator=generator, device=bench.device, dtype=bench.model.dtype)

    return random(tokens), random(keys or tokens), random(keys or tokens)


@torch.no_grad()
def run(bench: Bench) -> None:
    """Rows of every backend, over the video's own tokens and over the text's, and one of our own kernel for text.

    That kernel also norms its queries and folds the padding into one key.
    """
    for what, keys in (("self", 0), ("cross", TEXT_LENGTH)):
        q, k, v = random_qkv(bench, keys)
        expected = reference(q, k, v)
        for backend in BACKENDS:
            head = {"name": backend.name, "attention": what, "exact": backend.exact, "shape": [*q.shape, k.shape[1]]}
            bench.add(head, _backend, bench, backend, q, k, v, expected)
    keys = bench.inputs().folded_keys
    q, k, v = random_qkv(bench, keys)
    head = {"name": FUSED_TEXT, "attention": "cross", "exact": True, "shape": [*q.shape, keys]}
    bench.add(head, _own_text_kernel, bench, q, k, v)


def _backend(bench: Bench, backend: Backend, q: Tensor, k: Tensor, v: Tensor, expected: Tensor) -> Row:
    if refused := backend.needs.why_not(Inputs.of(q)):
        raise LongCatError(refused)
    error = relative_error(backend.attend(q, k, v)[:1, :QUERIES, :HEADS], expected)
    return _timed(bench, lambda: backend.attend(q, k, v), q, k) | {"error": error}


def _own_text_kernel(bench: Bench, q: Tensor, k: Tensor, v: Tensor) -> Row:
    if refused := text_attention.NEEDS.why_not(Inputs.of(q)) or text_attention.refuses(q.shape[-1], k.shape[1]):
        raise LongCatError(refused)
    weight, some = torch.ones(q.shape[-1], dtype=q.dtype, device=q.device), q[:, :QUERIES].clone()
    expected = text_attention.plain_text_attention(some, weight, k, v, None)[:1, :, :HEADS]
    out: Any = text_attention.text_attention(some, weight, k, v, None)
    error = relative_error(out.view(some.shape)[:1, :, :HEADS], expected)
    return _timed(bench, lambda: text_attention.text_attention(q, weight, k, v, None), q, k) | {"error": error}


def _timed(bench: Bench, attend: Callable[[], Any], q: Tensor, k: Tensor) -> Row:
    timing = measure(attend, bench.device, max(5, bench.repeats), bench.budget)
    return timing.as_row() | {"tflops": 4 * q.numel() * k.shape[1] / timing.ms / 1e9}


CHART = bars(
    "Self-attention of one block (orange: lossy)",
    "ms",
    "ms",
    "{:.1f}",
    color=lambda row: BLUE if row["exact"] else ORANGE,
    label=lambda row: f"{row['name']}, {row['tflops']:.0f} TFLOP/s",
    rows=lambda rows: sorted((row for row in rows if row["attention"] == "self"), key=lambda row: row["ms"]),
)

PART = Part(
    text="## Attention kernels\n\nAt the model's shapes. The error is relative, against fp32 on a slice.",
    run=run,
    table=columns(name="", attention="attention", ms="ms", tflops="TFLOP/s", error="error", exact="exact", status=""),
    charts=(CHART,),
)
