"""A denoising step with given frames (I2V, continuation) by the sampler: their keys at every step, or from a cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ..errors import LongCatError
from ..measure.clock import GIB, Laps, attempt, clean_up, peak_gib, reset_peak, synchronize
from ..measure.fidelity import relative_error
from ..measure.results import Report
from ..model.kv_cache import KVCache, KVMode
from ..optimize.execution import OptimizedTransformer
from ..optimize.switches import Optimizations
from ..sampling.conditioning import video_frames
from ..sampling.sampler import sample
from ..sampling.schedules import make_schedule
from . import workload
from .ablation import EXACT, Bench

# Given latent frames: of the end of a clip, and of an image.
LATENTS = (4, 1)


class Variant(NamedTuple):
    """How the sampler is asked to keep the given frames' keys and values."""

    name: str
    kv_cache: KVMode
    offload: bool = False


# The first is what the others are compared with.
VARIANTS = (
    Variant("off", "off"),
    Variant("exact", "exact"),
    Variant("official", "official"),
    Variant("exact, offloaded", "exact", True),
)


def with_room(size: workload.Size) -> workload.Size:
    """`size`, or as long that the most given frames leave one to generate."""
    return replace(size, frames=max(size.frames, video_frames(max(LATENTS) + 1)))


@contextmanager
def _filling(model: OptimizedTransformer, device: torch.device) -> Iterator[dict[str, float]]:
    """What it takes the sampler to fill a cache while this is entered, and how large the cache is."""
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
def _generate(bench: Bench, latents: int, variant: Variant) -> dict[str, Any]:
    """One generation of a step more than is measured: the first one embeds the text and meets new shapes."""
    model, inputs, device = bench.model, bench.inputs(), bench.device
    chosen = Optimizations(**bench.path(EXACT))
    given = inputs.latents[:, :, :latents].contiguous()
    guidance = {"guidance_scale": 1.0}
    if inputs.size.batch == 2:
        negative = {"negative_context": inputs.context[:1], "negative_mask": inputs.mask[:1]}
        guidance = {"guidance_scale": workload.GUIDANCE, **negative}
    laps = Laps(device)
    with workload.Notes(model) as notes:
        workload.exactly(model, chosen)
        if variant.kv_cache != "off":
            # What compiles at its first use is no part of filling a cache; where memory is pinned for it, that is.
            model.fill_kv_cache(given)
        clean_up(device)
        reset_peak(device)
        with _filling(model, device) as filled:
            out = sample(
                model,
                inputs.latents,
                make_schedule("base", 1 + bench.repeats),
                inputs.context[-1:],
                inputs.mask[-1:],
                cond_latents=given,
                kv_cache=variant.kv_cache,
                offload_kv_cache=variant.offload,
                callback=laps.mark,
                **guidance,
            )
    if model.optimizations != chosen:
        raise LongCatError(f"{variant.name} was given up at its first step: {'; '.join(notes)}")
    times = laps.times_ms()
    measured = {"ms": statistics.median(times), "times_ms": times, "peak_gib": peak_gib(device), "notes": notes}
    return measured | filled | {"out": out[:, :, latents:]}


def continuation(bench: Bench, report: Report, latents: tuple[int, ...] = LATENTS) -> None:
    """A row for every number of given latents and every way to keep their keys and values.

    ms: of a step; ratio: how much faster than without a cache; once_ms: filling it, once a generation; peak_gib: of the
    whole generation; difference: of the frames after these steps from those without a cache, relative.
    """
    for count in latents:
        first: dict[str, Any] = {}
        for variant in VARIANTS:
            head = {"name": f"{count} given, {variant.name}", "given": count, "kv_cache": variant.kv_cache}
            head |= {"offloaded": variant.offload, "batch": bench.size.batch, "depth": bench.model.config.depth}
            head["phase"] = "baseline" if variant.kv_cache == "off" else "path"
            row = attempt(head, bench.budget, lambda count=count, variant=variant: _generate(bench, count, variant))
            clean_up(bench.device)
            out = row.pop("out", None)
            if variant.kv_cache == "off":
                first = {"ms": row.get("ms"), "out": out}
            elif out is not None and first["out"] is not None:
                row |= {"ratio": first["ms"] / row["ms"], "difference": relative_error(out, first["out"])}
            report.add(row)
            figure = f"{row['ms']:.1f} ms a step" if row["status"] == "ok" else row["reason"]
            bench.say(f"continuation, {row['name']}: {figure}")
