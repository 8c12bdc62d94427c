"""The guard against spoiled output: the first output under lossy switches is checked before it is trusted."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from .attention import is_exact
from .switches import Optimizations

SPARSE = "sparse attention"


def lossy_switches(optimizations: Optimizations, eight_bit: bool) -> list[tuple[str, Optimizations]]:
    """The lossy switches that are on: each in words, and the optimizations without it. eight_bit: of the network.

    Sparse attention is lossy too, but not a switch of `Optimizations`; see `Execution`.
    """
    found = []
    if not is_exact(optimizations.attention):
        found.append((f"attention backend {optimizations.attention!r}", replace(optimizations, attention="auto")))
    if optimizations.fp8 and eight_bit:
        found.append(("fp8", replace(optimizations, fp8=False)))
    if optimizations.lossy_exchange:
        found.append((f"exchange in {optimizations.exchange}", replace(optimizations, exchange="exact")))
    return found


def is_spoiled(out: Tensor) -> bool:
    """Whether a sample of out [B, ...] has NaN or infinity in it, or is zero throughout (a black picture)."""
    return not bool((out.isfinite().flatten(1).all(1) & (out != 0).flatten(1).any(1)).all())
