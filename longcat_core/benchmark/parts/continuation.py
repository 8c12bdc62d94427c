"""A denoising step with conditioning frames (I2V, continuation): their keys at every step, or from a KV cache."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from ...measure.clock import GIB, clean_up, synchronize
from ...measure.fidelity import relative_error
from ...model.kv_cache import KVCache, KVMode
from ...optimize.switches import Optimizations
from ...sampling.conditioning import video_frames
from .. import workload
from ..part import STEPS, Part, columns
from ..variants import EXACT, Bench, Row

# Conditioning latents: of the end of a clip, and of an image.
LATENTS = (4, 1)


# How the sampler keeps their keys and values: `kv_cache` and whether it is offloaded. The first is compared with.
CACHES: dict[str, tuple[KVMode, bool]] = {
    "off": ("off", False),
    "exact": ("exact", False),
    "official": ("official", False),
    "exact, offloaded": ("exact", True),
}


def sized(bench: Bench) -> Bench:
    """Long enough to leave a frame to generate after the conditioning frames."""
    frames = max(bench.size.frames, video_frames(max(LATENTS) + 1))
    return bench.sized(replace(bench.size, frames=frames))


@contextmanager
def _filling(model: Any, device: torch.device) -> Iterator[dict[str, float]]:
    """Measures filling the cache while this context is open: its time and the size of the cache."""
    seen: dict[str, float] = {}
    fill = model.fill_kv_cache

    def watched(*args: Any, **kwargs: Any) -> KVCache:
        synchronize(device)
        started = time.perf_counter()
        cache = fill(*args, **kwargs)
        synchronize(device)
        seen.update(once_ms=1000 * (time.perf_counter() - started), cache_gib=cache.nbytes / GIB)
        return cache

    model.fill_kv_cache = watched
    try:
        yield seen
    finally:
        del model.fill_kv_cache


def run(bench: Bench) -> None:
    """Rows of every number of conditioning latents and every cache.

    ms: of a step; ratio: speedup over no cache; once_ms: filling the cache, once a generation; peak_gib: of the whole
    generation; difference: relative, of the generated latents from those without a cache.
    """
    for count in LATENTS:
        first: Row = {}
        for cache, (mode, offload) in CACHES.items():
            head = {"name": f"{count} given, {cache}", "given": count, "kv_cache": mode, "offloaded": offload}
            head |= {"batch": bench.size.batch, "depth": bench.model.config.depth}
            head["phase"] = "baseline" if mode == "off" else "path"
            bench.add(head, _generate, bench, cache, count, first)


@torch.no_grad()
def _generate(bench: Bench, cache: str, count: int, first: Row) -> Row:
    """first: ms and generated latents without a cache, which the first row fills in."""
    model, inputs, (mode, offload) = bench.model, bench.inputs(), CACHES[cache]
    given = inputs.latents[:, :, :count].contiguous()
    with workload.switched(model, Optimizations(**bench.path(EXACT)), cache) as notes:
        if mode != "off":
            # Filled once before: compilation does not count, pinning memory does.
            model.fill_kv_cache(given)
        clean_up(bench.device)
        options = {"cond_latents": given, "kv_cache": mode, "offload_kv_cache": offload}
        with _filling(model, bench.device) as filled:
            row = workload.timed_sampling(model, inputs, bench.repeats, **options) | {"notes": notes}
    out = row.pop("out")[:, :, count:]
    if mode == "off":
        first |= {"ms": row["ms"], "out": out}
    elif first:
        row |= {"ratio": first["ms"] / row["ms"], "difference": relative_error(out, first["out"])}
    return row | filled


PART = Part(
    text="""## Conditioning frames from a KV cache

Steps of the sampler with clean latents in front: one of an image, or four from the end of a clip. *Off* computes their
keys and values at every step. *Exact* caches them together with what guidance needs of these frames; *official* caches
the keys and values alone. *Once* is the time to fill the cache, which happens once a generation; for an offloaded cache
it includes pinning memory. Peaks are of the whole generation. *Difference* is relative: generated frames against those
without a cache.""",
    run=run,
    table=columns(
        name="",
        ms="ms a step",
        ratio="x off",
        once_ms="once ms",
        cache_gib="cache GiB",
        peak_gib="peak GiB",
        difference="difference",
        status="",
    ),
    charts=(STEPS,),
    sized=sized,
)
