"""Attention kernels at the model's shapes: time, rate, and error against fp32 on a slice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import LongCatError
from ..measure.clock import attempt, clean_up, measure
from ..measure.fidelity import relative_error
from ..measure.results import Report
from ..optimize.attention import BACKENDS, Backend, Inputs
from ..optimize.kernels import text_attention
from ..optimize.kernels.elementwise import missing
from .ablation import FUSED_TEXT, Bench
from .workload import SEED, TEXT_LENGTH

# The slice that is computed in fp32: queries of some heads over all keys.
QUERIES, HEADS = 256, 4


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v in fp32 of a slice of q [B, N, H, D]: [1, queries, heads, D]."""
    q, k, v = (x[:1, :, :HEADS].float().transpose(1, 2) for x in (q[:, :QUERIES], k, v))
    weights = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
    return (weights @ v).transpose(1, 2)


def random_qkv(bench: Bench, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, N, heads, head_dim] of the bench's size and dtype, and `keys` keys and values (0: as many)."""
    config, inputs = bench.model.config, bench.inputs()
    generator = torch.Generator(bench.device).manual_seed(SEED)
    tokens = inputs.size.tokens(config)

    def random(rows: int) -> Tensor:
        shape = inputs.size.batch, rows, config.num_heads, config.head_dim
        return torch.randn(shape, generator=generator, device=bench.device, dtype=bench.model.dtype)

    return random(tokens), random(keys or tokens), random(keys or tokens)


@torch.no_grad()
def kernels(bench: Bench, report: Report) -> None:
    """A row for every backend, over the video's own tokens and over the text's, and one for the own kernel for text.

    That one norms its queries as well, and has the padding as one key.
    """
    for what, keys in (("self", 0), ("cross", TEXT_LENGTH)):
        q, k, v = random_qkv(bench, keys)
        expected = reference(q, k, v)
        for backend in BACKENDS:
            row = {"name": backend.name, "attention": what, "exact": backend.exact, "shape": [*q.shape, k.shape[1]]}

            def run(backend: Backend = backend, q=q, k=k, v=v, expected=expected) -> dict[str, Any]:
                refused = backend.missing() or backend.refuses(Inputs(q.device, q.dtype, q.shape[-1], False))
                if refused:
                    raise LongCatError(refused)
                out = backend.attend(q, k, v)
                error = relative_error(out[:1, :QUERIES, :HEADS], expected)
                del out
                return _timed(bench, lambda: backend.attend(q, k, v), q, k) | {"error": error}

            _attempt(bench, report, row, run)
    _own_text_kernel(bench, report)


def _own_text_kernel(bench: Bench, report: Report) -> None:
    keys = bench.inputs().folded_keys
    q, k, v = random_qkv(bench, keys)
    weight = torch.ones(q.shape[-1], dtype=q.dtype, device=q.device)
    some = q[:, :QUERIES].clone()
    expected = text_attention.plain_text_attention(some, weight, k, v, None)[:1, :, :HEADS]
    row = {"name": FUSED_TEXT, "attention": "cross", "exact": True, "shape": [*q.shape, keys]}

    def run() -> dict[str, Any]:
        refused = missing() or text_attention.refuses(q, q.shape[-1], keys)
        if refused:
            raise LongCatError(refused)
        out = text_attention.text_attention(some, weight, k, v, None).view(some.shape)
        error = relative_error(out[:1, :, :HEADS], expected)
        return _timed(bench, lambda: text_attention.text_attention(q, weight, k, v, None), q, k) | {"error": error}

    _attempt(bench, report, row, run)


def _timed(bench: Bench, attend: Callable[[], Tensor], q: Tensor, k: Tensor) -> dict[str, Any]:
    timing = measure(attend, bench.device, max(5, bench.repeats), bench.budget)
    return timing.as_row() | {"tflops": 4 * q.numel() * k.shape[1] / timing.ms / 1e9}


def _attempt(bench: Bench, report: Report, row: dict[str, Any], run: Callable[[], dict[str, Any]]) -> None:
    row = report.add(attempt(row, bench.budget, run))
    clean_up(bench.device)
    figure = f"{row['ms']:.2f} ms, {row['tflops']:.0f} TFLOP/s" if row["status"] == "ok" else row["reason"]
    bench.say(f"{row['attention']}-attention, {row['name']}: {figure}")
