"""A denoising step with given frames (I2V, continuation): their keys at every step, or from a KV cache."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ...measure.clock import GIB, clean_up, synchronize
from ...measure.fidelity import relative_error
from ...model.kv_cache import KVCache, KVMode
from ...optimize.switches import Optimizations
from ...sampling.conditioning import video_frames
from .. import workload
from ..part import STEPS, Part, columns
from ..variants import EXACT, Bench, Row

# Given latent frames: of the end of a clip, and of an image.
LATENTS = (4, 1)


class Cache(NamedTuple):
    """How the sampler keeps the keys and values of given frames."""

    name: str
    kv_cache: KVMode
    offload: bool = False


# The others are compared with the first.
CACHES = (
    Cache("off", "off"),
    Cache("exact", "exact"),
    Cache("official", "official"),
    Cache("exact, offloaded", "exact", True),
)


def sized(bench: Bench) -> Bench:
    """Long enough to leave a frame to generate after the given ones."""
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


@torch.no_grad()
def _generate(bench: Bench, latents: int, cache: Cache) -> Row:
    model, inputs = bench.model, bench.inputs()
    chosen = Optimizations(**bench.path(EXACT))
    given = inputs.latents[:, :, :latents].contiguous()
    workload.exactly(model, chosen)
    if cache.kv_cache != "off":
        # Filled once before: compilation does not count, pinning memory does.
        model.fill_kv_cache(given)
    clean_up(bench.device)
    options = {"cond_latents": given, "kv_cache": cache.kv_cache, "offload_kv_cache": cache.offload}
    with _filling(model, bench.device) as filled:
        row = workload.timed_sampling(model, inputs, bench.repeats, **options)
    workload.require(model, chosen, row["notes"], cache.name)
    return row | filled | {"out": row["out"][:, :, latents:]}


def run(bench: Bench) -> None:
    """Rows of every number of given latents and every cache.

    ms: of a step; ratio: speedup over no cache; once_ms: filling the cache, once a generation; peak_gib: of the whole
    generation; difference: relative, of the generated latents from those without a cache.
    """
    for count in LATENTS:
        first: Row = {}

        def finish(row: Row) -> Row:
            out = row.pop("out")
            if row["kv_cache"] == "off":
                first.update(ms=row["ms"], out=out)  # noqa: B023
                return row
            if not first:  # noqa: B023
                return row
            return row | {"ratio": first["ms"] / row["ms"], "difference": relative_error(out, first["out"])}  # noqa: B023

        for cache in CACHES:
            head = {"name": f"{count} given, {cache.name}", "given": count, "kv_cache": cache.kv_cache}
            head |= {"offloaded": cache.offload, "batch": bench.size.batch, "depth": bench.model.config.depth}
            head["phase"] = "baseline" if cache.kv_cache == "off" else "path"
            bench.add(head, lambda count=count, cache=cache: _generate(bench, count, cache), finish)


PART = Part(
    text="""## Given frames from a KV cache

Steps of the sampler with clean latents in front: one of an image, or four from the end of a clip. *Off* computes their
keys and values at every step. *Exact* caches them together with what guidance needs of these frames; *official* leaves
the latter out. *Once* is the time to fill the cache, once a generation, including pinning memory for an offloaded one.
Peaks are of the whole generation. *Difference* is relative, of the generated frames from those without a cache.""",
    run=run,
    columns=("name", "ms", "ratio", "once_ms", "cache_gib", "peak_gib", "difference", "status"),
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
