"""A step within less memory than the device has: what is offloaded to CPU memory, and what that costs."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ...measure.clock import GIB, clean_up, timed
from ...measure.fidelity import relative_error
from ...measure.results import markdown, shown
from ...model.config import ModelConfig
from ...optimize.execution import OptimizedTransformer
from ...optimize.kernels import elementwise
from ...optimize.plan import WORKSPACE, Plan, Weights, Work, apply_plan, choose_plan, limit_memory, needed_bytes
from ...optimize.quantization import Policy
from ...optimize.streaming import pinned
from ...optimize.switches import Optimizations
from .. import workload
from ..part import Part, Results, measured_rows, met
from ..variants import EXACT, FP8, Bench, Row

# Memory limits of a GPU for the released model; of other models, shares of what they need.
LIMITS_GIB, SHARES = (24.0, 16.0, 12.0), (0.8, 0.6, 0.45)
# The slowdown that a limit may cause in fp8, by GiB: over no limit, at OVER_FLOOR over the floor.
BOUNDS = {24.0: 1.03, 16.0: 1.10, 12.0: 1.15}
OVER_FLOOR = 12.0
UNLIMITED = "no limit"
COPIED = 1 << 28


class Limit(NamedTuple):
    """size: bytes, or None for no limit. gib: the card's memory, if the limit stands for a card."""

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
    """This process may use at most `size` bytes of a CUDA device while this context is open."""
    if size is None or device.type != "cuda":
        yield
        return
    limit_memory(device, size)
    try:
        yield
    finally:
        limit_memory(device, None)


class _Counted:
    """What a plan depends on, counted for one network."""

    def __init__(self, bench: Bench, fp8: bool) -> None:
        config, device, dtype = bench.model.config, bench.device, bench.model.dtype
        self.config, self.itemsize = config, dtype.itemsize
        self.weights = Weights.of(config, dtype, Policy() if fp8 else None)
        _, *shape = bench.size.latents(config.in_channels)
        self.work = Work((1, *shape), bench.size.batch == 2)
        self.own = elementwise.takes(dtype)
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


def run(bench: Bench) -> None:
    """Rows of every path and limit, fp8 first, which has bounds.

    ms: of a step of the sampler; ratio: slowdown over no limit; transfer_ms: of the bytes that a step copies, at the
    measured rate; floor_ms: the larger of transfer_ms and the step without a limit; peak_gib: of the whole sampling;
    difference: relative, of the latents after these steps from those without a limit.
    """
    report, fresh = bench.report, bench.fresh
    report.content["inputs"]["copy_gb_s"] = rate = copy_rate(bench.device) / 1e9
    bench.say(f"copies to the device: {rate:.1f} GB/s")
    # Two models do not fit on the device.
    bench.model = None
    for path in (*((FP8,) if bench.fp8 else ()), EXACT):
        # In a function of its own: nothing of a model may stay on the device when the next one is made and counted.
        _rows(replace(fresh(), report=report), path, rate)


def _rows(bench: Bench, path: str, rate: float) -> None:
    """Rows of one path, from the most memory to the least."""
    if path == FP8:
        if not bench.quantize():
            return
        settle(bench.model, bench.device)
    counted, first = _Counted(bench, path == FP8), {}

    def finish(row: Row) -> Row:
        out = row.pop("out")
        if row["given_gib"] is None:
            first.update(ms=row["ms"], out=out)
        elif first:
            row |= {"ratio": row["ms"] / first["ms"], "floor_ms": max(first["ms"], row["transfer_ms"])}
            row |= verdict(row) | {"difference": relative_error(out, first["out"])}
        return row

    for limit in counted.limits(bench.device):
        plan = counted.plan(limit)
        head = {"name": f"{path}, {limit.name}", "path": path, "phase": "card", "limit_gib": limit.gib}
        head |= {"plan": plan.describe(bench.model.config.depth) or "all on the device", "streamed": plan.streamed}
        head |= {"split_guidance": plan.split_guidance, "given_gib": limit.size and limit.size / GIB}
        bench.add(head, lambda limit=limit, plan=plan: _step(bench, path, limit, plan, rate), finish)


def settle(model: OptimizedTransformer, device: torch.device) -> None:
    """Move the weights to CPU memory and back, as if they had just been loaded.

    Quantizing in place fragments memory: gigabytes of gaps stay with the allocator, too small for activations.
    """
    model.to("cpu")
    clean_up(device)
    model.to(device)


def verdict(row: dict[str, Any]) -> dict[str, Any]:
    """The bound of a row, if it has one, and whether it is met."""
    limit = row["limit_gib"]
    if row["path"] != FP8 or limit not in BOUNDS:
        return {}
    over = row["ms"] / row["floor_ms"] if limit == OVER_FLOOR else row["ratio"]
    what = "the larger of compute and transfer" if limit == OVER_FLOOR else "no limit"
    return {"target": f"<= {BOUNDS[limit]:g} x {what}", "met": over <= BOUNDS[limit]}


@torch.no_grad()
def _step(bench: Bench, path: str, limit: Limit, plan: Plan, rate: float) -> Row:
    model, inputs, device = bench.model, bench.inputs(), bench.device
    workload.exactly(model, Optimizations(**bench.path(path)))
    apply_plan(model, plan)
    clean_up(device)
    with within(device, limit.size):
        row = workload.timed_sampling(model, inputs, bench.repeats)
    copied = 0 if model.stream is None else (2 if plan.split_guidance else 1) * model.stream.nbytes
    return row | {"transfer_ms": copied / rate / 1e6}


def table(results: Results, _: Any) -> str:
    lines = []
    for row in measured_rows(results):
        bound = None if row.get("target") is None else f"{row['target']}: {met(row.get('met'))}"
        figures = [row.get(name) for name in ("ms", "ratio", "transfer_ms", "floor_ms", "peak_gib", "difference")]
        lines.append((row["name"], row["plan"], *figures, bound, row["status"]))
    head = ("", "plan", "ms a step", "x no limit", "transfer ms", "floor ms", "peak GiB", "difference", "target", "")
    rate = results["inputs"].get("copy_gb_s")
    return markdown(head, lines) + (f"\n\nCopies to the GPU: {shown(rate)} GB/s." if rate else "")


PART = Part(
    text="""## Smaller cards

Steps of the sampler while PyTorch may use only as much memory as such a card has. *Plan* is what `longcat` then chooses
by itself. *Floor* is the step without a limit, or the time to copy the offloaded weights once a forward if that is
longer. Peaks are of the whole sampling. *Difference* is relative, of the latents after these steps from those without a
limit: offloaded blocks change nothing, split guidance rounds differently. The GPU keeps its own speed; a real smaller
card is slower.""",
    run=run,
    columns=("name", "ms", "ratio", "floor_ms", "peak_gib", "plan", "status"),
    table=table,
)
