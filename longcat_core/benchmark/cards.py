"""A step within less memory than the device has: what waits in CPU memory then, and what that costs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from ..measure.clock import GIB, Laps, attempt, clean_up, peak_gib, reset_peak, timed
from ..measure.fidelity import relative_error
from ..measure.results import Report
from ..model.config import ModelConfig
from ..optimize.execution import OptimizedTransformer
from ..optimize.kernels.elementwise import HALF
from ..optimize.kernels.elementwise import missing as kernels_missing
from ..optimize.plan import WORKSPACE, Plan, Weights, Work, apply_plan, choose_plan, limit_memory, needed_bytes
from ..optimize.quantization import Policy
from ..optimize.streaming import pinned
from ..optimize.switches import Optimizations
from ..sampling.sampler import sample
from ..sampling.schedules import make_schedule
from . import workload
from .ablation import EXACT, FP8, Bench

# Of a GPU, for the released model; of what another model needs.
LIMITS_GIB, SHARES = (24.0, 16.0, 12.0), (0.8, 0.6, 0.45)
# How much longer than without a limit a step of fp8 may take, by GiB; at 12 than the larger of that and the transfer.
TARGETS = {24.0: 1.03, 16.0: 1.10, 12.0: 1.15}
OVER_FLOOR = 12.0
UNLIMITED = "no limit"
COPIED = 1 << 28


class Limit(NamedTuple):
    """size: bytes, None for all there is. gib: of those that have a target."""

    name: str
    size: int | None
    gib: float | None = None


def copy_rate(device: torch.device) -> float:
    """Bytes a second from pinned CPU memory to the device."""
    source, target = pinned(COPIED), torch.empty(COPIED, dtype=torch.uint8, device=device)
    target.copy_(source)
    seconds = [timed(lambda: target.copy_(source, non_blocking=True), device) for _ in range(5)]
    return COPIED / statistics.median(seconds)


@contextmanager
def within(device: torch.device, size: int | None) -> Iterator[None]:
    """A CUDA device gives this process no more than `size` bytes while this is entered."""
    if size is None or device.type != "cuda":
        yield
        return
    limit_memory(device, size)
    try:
        yield
    finally:
        limit_memory(device, None)


class _Counted:
    """What plans are made of, for one network."""

    def __init__(self, bench: Bench, fp8: bool) -> None:
        config, device, dtype = bench.model.config, bench.device, bench.model.dtype
        self.config, self.itemsize = config, dtype.itemsize
        self.weights = Weights.of(config, dtype, Policy() if fp8 else None)
        _, *shape = bench.size.latents(config.in_channels)
        self.work = Work((1, *shape), bench.size.batch == 2)
        self.own = dtype in HALF and not kernels_missing()
        self.others = 0
        if device.type == "cuda":
            here = sum(p.nbytes for p in bench.model.parameters() if p.device.type == "cuda")
            self.others = torch.cuda.memory_allocated(device) - here

    def limits(self, device: torch.device) -> list[Limit]:
        needed = needed_bytes(Plan(), self.config, self.weights, self.work, self.itemsize, self.own, self.others)
        limits = [Limit(UNLIMITED, None)]
        if device.type == "cuda" and self.config == ModelConfig():
            return limits + [Limit(f"{gib:g} GiB", int(gib * GIB), gib) for gib in LIMITS_GIB]
        return limits + [
            Limit(f"{100 * share:.0f} % of the need", WORKSPACE + int(share * (needed - WORKSPACE))) for share in SHARES
        ]

    def plan(self, limit: Limit) -> Plan:
        if limit.size is None:
            return Plan()
        settings = {"free": limit.size, "own": self.own, "others": self.others}
        return choose_plan(self.config, self.weights, self.work, self.itemsize, **settings)[0]


def cards(bench: Bench, report: Report, fresh: Callable[[], Bench], fp8: bool = True) -> None:
    """A row for every path and limit, fp8 first, which has targets. fresh: the same again with weights as they were.

    ms: of a step by the sampler; ratio: how many times as long as without a limit; transfer_ms: what a step copies, at
    the measured rate; floor_ms: the larger of the unlimited step and that; peak_gib: of the whole sampling.
    difference: of the latents after these steps from those without a limit, relative.
    """
    report.content["inputs"]["copy_gb_s"] = rate = copy_rate(bench.device) / 1e9
    bench.say(f"copies to the device: {rate:.1f} GB/s")
    for path in (*((FP8,) if fp8 else ()), EXACT):
        # In a function of its own: nothing of a model may be left on the device when the next one is made and counted.
        _rows(fresh(), path, report, rate)


def _rows(bench: Bench, path: str, report: Report, rate: float) -> None:
    """Rows of one path, from the most memory to the least."""
    if path == FP8:
        if report.add(bench.quantize())["status"] != "ok":
            return
        settle(bench.model, bench.device)
    counted, first, whole = _Counted(bench, path == FP8), None, None
    for limit in counted.limits(bench.device):
        plan = counted.plan(limit)
        head = {"name": f"{path}, {limit.name}", "path": path, "phase": "card", "limit_gib": limit.gib}
        head |= {"plan": plan.told(bench.model.config.depth) or "all on the device", "streamed": plan.streamed}
        head |= {"split_guidance": plan.split_guidance, "given_gib": limit.size and limit.size / GIB}
        row = attempt(head, bench.budget, lambda limit=limit, plan=plan: _step(bench, path, limit, plan, rate))
        clean_up(bench.device)
        out = row.pop("out", None)
        if limit.size is None:
            first, whole = row.get("ms"), out
        elif first is not None and out is not None:
            row |= {"ratio": row["ms"] / first, "floor_ms": max(first, row["transfer_ms"])}
            row |= verdict(row) | {"difference": relative_error(out, whole)}
        report.add(row)
        figure = f"{row['ms']:.1f} ms a step" if row["status"] == "ok" else row["reason"]
        bench.say(f"{row['name']}: {row['plan']}: {figure}")


def settle(model: OptimizedTransformer, device: torch.device) -> None:
    """Weights to CPU memory and back, as if they had been loaded so.

    Weights that were quantised in place lie in pieces of what was there before and while they were made. The gaps
    between them, gigabytes of the released model's, are the allocator's and still too small for activations.
    """
    model.to("cpu")
    clean_up(device)
    model.to(device)


def verdict(row: dict[str, Any]) -> dict[str, Any]:
    """The target of a row that has one, and whether it is met."""
    limit = row["limit_gib"]
    if row["path"] != FP8 or limit not in TARGETS:
        return {}
    over = row["ms"] / row["floor_ms"] if limit == OVER_FLOOR else row["ratio"]
    what = "the larger of compute and transfer" if limit == OVER_FLOOR else "no limit"
    return {"target": f"<= {TARGETS[limit]:g} x {what}", "met": over <= TARGETS[limit]}


@torch.no_grad()
def _step(bench: Bench, path: str, limit: Limit, plan: Plan, rate: float) -> dict[str, Any]:
    """Steps of the sampler, one more than is measured: the first one embeds the text."""
    model, inputs, device = bench.model, bench.inputs(), bench.device
    workload.exactly(model, Optimizations(**bench.path(path)))
    apply_plan(model, plan)
    guidance: dict[str, Any] = {"guidance_scale": 1.0}
    if inputs.size.batch == 2:
        negative = {"negative_context": inputs.context[:1], "negative_mask": inputs.mask[:1]}
        guidance = {"guidance_scale": workload.GUIDANCE, **negative}
    clean_up(device)
    laps = Laps(device)
    with within(device, limit.size), workload.Notes(model) as notes:
        reset_peak(device)
        out = sample(
            model,
            inputs.latents,
            make_schedule("base", 1 + bench.repeats),
            inputs.context[-1:],
            inputs.mask[-1:],
            callback=laps.mark,
            **guidance,
        )
        peak = peak_gib(device)
    times, halves = laps.times_ms(), 2 if plan.split_guidance else 1
    copied = 0 if model.stream is None else halves * model.stream.nbytes
    return {
        "ms": statistics.median(times),
        "times_ms": times,
        "peak_gib": peak,
        "transfer_ms": copied / rate / 1e6,
        "notes": notes,
        "out": out,
    }
