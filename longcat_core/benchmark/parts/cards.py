"""A step within less memory than the device has: what is offloaded to CPU memory, and what that costs."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ...measure.clock import GIB, clean_up, timed
from ...measure.fidelity import relative_error
from ...measure.results import markdown, shown
from ...model.config import ModelConfig
from ...optimize.kernels import elementwise
from ...optimize.optimized import OptimizedTransformer
from ...optimize.plan import WORKSPACE, Plan, Weights, Work, apply_plan, choose_plan, limit_memory, needed_bytes
from ...optimize.quantization import Policy
from ...optimize.streaming import pinned
from ...optimize.switches import Optimizations
from .. import workload
from ..part import Part, Results, measured_rows, met_or_missed
from ..variants import EXACT, FP8, Bench, Row

# Memory limits of a GPU for the released model; of other models, shares of what they need.
LIMITS_GIB, SHARES = (24.0, 16.0, 12.0), (0.8, 0.6, 0.45)
# The slowdown that a limit may cause in fp8, by GiB: over no limit, at OVER_FLOOR over the floor.
BOUNDS = {24.0: 1.03, 16.0: 1.10, 12.0: 1.15}
OVER_FLOOR = 12.0
COPIED = 1 << 28


class Limit(NamedTuple):
    """size: bytes, or None for no limit. gib: the card's memory, if the limit stands for a card."""

    name: str
    size: int | None = None
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


def limits(config: ModelConfig, device: torch.device, needed: int, gibs: Sequence[float] = LIMITS_GIB) -> list[Limit]:
    """No limit, then cards for the released model on a GPU, or shares of the bytes that another model needs."""
    if device.type == "cuda" and replace(config, audio=None) == ModelConfig():
        return [Limit("no limit"), *(Limit(f"{gib:g} GiB", int(gib * GIB), gib) for gib in gibs)]
    sizes = {share: WORKSPACE + int(share * (needed - WORKSPACE)) for share in SHARES}
    return [Limit("no limit"), *(Limit(f"{100 * share:.0f} % of the need", size) for share, size in sizes.items())]


def plans(
    bench: Bench, fp8: bool, work: Work | None = None, gibs: Sequence[float] = LIMITS_GIB
) -> list[tuple[Limit, Plan]]:
    """Every limit with the plan that `longcat` chooses within it, counted for the bench's model. work: what is sampled;
    None: a video of the bench's size. gibs: of the cards for the released model."""
    config, device, dtype = bench.model.config, bench.device, bench.model.dtype
    weights = Weights.of(config, dtype, Policy() if fp8 else None)
    work = work or Work((1, *bench.size.latents(config.in_channels)[1:]), bench.size.batch == 2)
    own, others = elementwise.takes(dtype), 0
    if device.type == "cuda":
        here = sum(p.nbytes for p in bench.model.parameters() if p.device.type == "cuda")
        others = torch.cuda.memory_allocated(device) - here

    def chosen(limit: Limit) -> Plan:
        if limit.size is None:
            return Plan()
        return choose_plan(config, weights, work, dtype.itemsize, free=limit.size, own=own, others=others)[0]

    needed = needed_bytes(Plan(), config, weights, work, dtype.itemsize, own, others)
    return [(limit, chosen(limit)) for limit in limits(config, device, needed, gibs)]


def run(bench: Bench) -> None:
    """Rows of every path and limit, fp8 first, which has bounds.

    ms: of a step of the sampler; ratio: slowdown over no limit; transfer_ms: of the bytes that a step copies, at the
    measured rate; floor_ms: the larger of transfer_ms and the step without a limit; peak_gib: of the whole sampling;
    difference: relative, of the latents after these steps from those without a limit.
    """
    report = bench.report
    report.content["inputs"]["copy_gb_s"] = rate = copy_rate(bench.device) / 1e9
    bench.say(f"copies to the device: {rate:.1f} GB/s")
    # Two models do not fit on the device.
    bench.model = None
    for path in (*((FP8,) if bench.fp8 else ()), EXACT):
        # In a function of its own: nothing of a model may stay on the device when the next one is made and counted.
        _rows(replace(bench.remake(), report=report), path, rate)


def _rows(bench: Bench, path: str, rate: float) -> None:
    """Rows of one path, from the most memory to the least."""
    if path == FP8:
        if not bench.quantize():
            return
        settle(bench.model, bench.device)
    first: Row = {}
    for limit, plan in plans(bench, path == FP8):
        head = {"name": f"{path}, {limit.name}", "path": path, "phase": "card", "limit_gib": limit.gib}
        head |= {"plan": plan.describe(bench.model.config.depth) or "all on the device", "streamed": plan.streamed}
        head |= {"split_guidance": plan.split_guidance, "given_gib": limit.size and limit.size / GIB}
        bench.add(head, _step, bench, path, limit, plan, rate, first)


def settle(model: OptimizedTransformer, device: torch.device) -> None:
    """Move the weights to CPU memory and back, as if they had just been loaded.

    Quantizing in place fragments memory: gigabytes of gaps stay with the allocator, too small for activations.
    """
    model.to("cpu")
    clean_up(device)
    model.to(device)


def verdict(path: str, limit_gib: float | None, ratio: float, over_floor: float) -> Row:
    """The bound of a path within a limit, if it has one, and whether it is met by a slowdown."""
    if path != FP8 or limit_gib not in BOUNDS:
        return {}
    over, what = ratio, "no limit"
    if limit_gib == OVER_FLOOR:
        over, what = over_floor, "the larger of compute and transfer"
    return {"target": f"<= {BOUNDS[limit_gib]:g} x {what}", "met": over <= BOUNDS[limit_gib]}


@torch.no_grad()
def _step(bench: Bench, path: str, limit: Limit, plan: Plan, rate: float, first: Row) -> Row:
    """first: ms and latents without a limit, which the first row fills in."""
    model, inputs, device = bench.model, bench.inputs(), bench.device
    with workload.switched(model, Optimizations(**bench.path(path))) as notes:
        apply_plan(model, plan)
        clean_up(device)
        with within(device, limit.size):
            row = workload.timed_sampling(model, inputs, bench.repeats)
    out, copied = row.pop("out"), 0 if model.stream is None else (1 + plan.split_guidance) * model.stream.nbytes
    row |= {"notes": notes, "transfer_ms": copied / rate / 1e6}
    if limit.size is None:
        first |= {"ms": row["ms"], "out": out}
    elif first:
        ratio, floor_ms = row["ms"] / first["ms"], max(first["ms"], row["transfer_ms"])
        row |= {"ratio": ratio, "floor_ms": floor_ms, "difference": relative_error(out, first["out"])}
        row |= verdict(path, limit.gib, ratio, row["ms"] / floor_ms)
    return row


def table(results: Results, _: Any) -> str:
    lines = []
    for row in measured_rows(results):
        bound = None if row.get("target") is None else f"{row['target']}: {met_or_missed(row['met'])}"
        figures = [row.get(name) for name in ("ms", "ratio", "transfer_ms", "floor_ms", "peak_gib", "difference")]
        lines.append((row["name"], row["plan"], *figures, bound, row["status"]))
    head = ("", "plan", "ms a step", "x no limit", "transfer ms", "floor ms", "peak GiB", "difference", "target", "")
    rate = results["inputs"].get("copy_gb_s")
    return markdown(head, lines) + (f"\n\nCopies to the GPU: {shown(rate)} GB/s." if rate else "")


PART = Part(
    text="""## Smaller cards

Steps of the sampler while PyTorch may use only as much memory as such a card has. *Plan* is what `longcat` then chooses
by itself. *Floor* is the step without a limit, or the time to copy the offloaded weights once for each forward,
whichever is longer. Peaks are of the whole sampling. *Difference* is relative: the latents after these steps against
those without a limit. Offloading blocks changes nothing; split guidance rounds differently. The GPU keeps its own
speed; a real smaller card is slower.""",
    run=run,
    table=table,
)
