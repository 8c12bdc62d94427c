"""What each optimization is worth: added one after the other to the plain network, and taken alone from the full set.

Rows are made from tables of data.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch

from ..errors import LongCatError
from ..measure.clock import GIB, Budget, attempt, clean_up, measure
from ..measure.results import Report, say
from ..measure.speed import PLAIN, kernel_name, plain
from ..optimize.execution import OptimizedTransformer
from ..optimize.quantization import quantize
from ..optimize.switches import Optimizations
from . import workload
from .baseline import BaselineTransformer

EAGER, COMPILED, EXACT, FP8, FP8_8BIT = (
    "baseline, eager",
    "baseline, compiled whole",
    "exact",
    "fp8",
    "fp8 and 8-bit attention",
)
# What rows call the own kernel for text.
FUSED_TEXT = "fused_text"
# Where our own kernels do not pay, or do not run, the compiler's stand in for them.
NO_KERNELS = ", without own kernels"
# Whether a path's blocks are compiled: own kernels leave little to be gained by it, and its first call takes long. The
# other way is measured beside it.
PATH_COMPILE = {EXACT: "off", FP8: "off"}
SUFFIXES = {"off": ", not compiled", "blocks": ", compiled"}
# Seconds of a whole 480p video that the published guesses are shares of.
GUESSED_OF_S = 475.0


class Switch(NamedTuple):
    """name: a field of `Optimizations`; guess_s: the published guess in seconds of `GUESSED_OF_S`, if any."""

    name: str
    what: str
    guess_s: float | None = None


FULL = Optimizations(compile="blocks")
# In this order they are added. `attention` of the plain network is FlashAttention-2 where there is CUDA.
SWITCHES = (
    Switch("fused_qkv", "fused q, k, v", 20.0),
    Switch("fused_ffn", "fused gate and up", 15.0),
    Switch("explicit_fp32", "explicit casts, no autocast", 2.0),
    Switch("text_mode", "text padding folded", 5.0),
    Switch("reuse_text", "text keys once per prompt"),
    Switch("reuse_modulation", "modulation once per timestep"),
    Switch("attention", "fastest exact attention"),
    Switch("compile", "blocks compiled", 5.0),
    Switch("fused_step", "fused sampler step"),
    Switch("fused_kernels", "own Triton kernels"),
    Switch("fused_text", "own kernel for text"),
)
LAYOUT = Switch("layout", "one token layout", 3.0)


@dataclass
class Bench:
    """What all variants share: the model, its inputs, how long and how often."""

    model: OptimizedTransformer
    size: workload.Size
    device: torch.device
    repeats: int
    budget: Budget
    attention: str = "auto"
    say: Callable[[str], None] = say
    _inputs: dict[int, workload.Inputs] = field(default_factory=dict)

    def inputs(self, batch: int | None = None) -> workload.Inputs:
        size = self.size if batch is None else workload.Size(self.size.height, self.size.width, self.size.frames, batch)
        if size.batch not in self._inputs:
            self._inputs[size.batch] = workload.Inputs(self.model.config, size, self.device)
        return self._inputs[size.batch]

    def sized(self, size: workload.Size) -> Bench:
        """The same model and budget at another size."""
        return replace(self, size=size, _inputs={})

    def plain(self) -> dict[str, Any]:
        return plain(self.device, self.model.dtype)

    def full(self) -> dict[str, Any]:
        return {name: getattr(FULL, name) for name in PLAIN} | {"attention": self.attention}

    def path(self, name: str) -> dict[str, Any]:
        """Values of the path EXACT, FP8 or FP8_8BIT."""
        if name == FP8_8BIT:
            return self.eight_bit_paths()[FP8_8BIT]
        return self.full() | {"compile": PATH_COMPILE[name]}

    def eight_bit_paths(self) -> dict[str, dict[str, Any]]:
        """Names and values of FP8_8BIT and of the same by the other kernels."""
        fastest, *others = eight_bit()
        attends = {FP8_8BIT: fastest} | {f"{FP8_8BIT}, {other}": other for other in others}
        return {name: self.path(FP8) | {"attention": attention} for name, attention in attends.items()}

    def other_way(self, name: str) -> tuple[str, dict[str, Any]]:
        """The same path with its blocks compiled if they are not, or not if they are."""
        compiled = "blocks" if PATH_COMPILE[name] == "off" else "off"
        return name + SUFFIXES[compiled], self.full() | {"compile": compiled}

    # --- one variant ---

    def run_baseline(self, name: str, compiled: bool, **row: Any) -> dict[str, Any]:
        def run() -> dict[str, Any]:
            baseline = BaselineTransformer(self.model)
            torch._dynamo.reset()
            forward = workload.baseline_forward(baseline, self.inputs(), compiled)
            step = workload.step_of(forward, self.inputs(), Optimizations(fused_step=False))
            return measure(step, self.device, self.repeats, self.budget, warm_up=int(compiled)).as_row()

        return self._attempt({"name": name, "compiled": compiled} | row, run)

    def run_network(self, name: str, values: dict[str, Any], batch: int | None = None, **row: Any) -> dict[str, Any]:
        chosen = Optimizations(**values)
        compiled = chosen.compile != "off"

        def run() -> dict[str, Any]:
            with workload.Notes(self.model) as notes:
                workload.exactly(self.model, chosen)
                inputs = self.inputs(batch)
                step = workload.step_of(workload.network_forward(self.model, inputs), inputs, chosen)
                timing = measure(step, self.device, self.repeats, self.budget, warm_up=int(compiled))
                kernels = self.model.choose_kernels(self.device)
                out = timing.as_row() | {"notes": notes, "attention": kernel_name(kernels.attend)}
                text = self.model.embed_text(inputs.context, inputs.mask)
                own = self.model.own_text_kernel(text.tokens, text)
                out["text_attention"] = FUSED_TEXT if own else kernel_name(kernels.text or kernels.attend)
                out["weights_gib"] = sum(p.nbytes for p in self.model.parameters()) / GIB
                # Then the network ran as it is, and said so.
                out["compiled"] = compiled and not any("uncompiled" in note for note in notes)
            in_force = self.model.optimizations
            if in_force != chosen:
                raise LongCatError(f"{name} was given up at its first step: {'; '.join(notes) or in_force}")
            return out

        batch = batch or self.size.batch
        head = {"name": name, "compiled": compiled, "batch": batch, "optimizations": asdict(chosen)}
        return self._attempt(head | row, run)

    def _attempt(self, row: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        row = attempt(row, self.budget, run)
        gc.collect()
        clean_up(self.device)
        figure = f"{row['ms']:.1f} ms, first call {row['first_s']:.1f} s" if row["status"] == "ok" else row["reason"]
        self.say(f"{row['name']}: {row['status']}: {figure}")
        return row

    def quantize(self) -> dict[str, Any]:
        """The model's weights in fp8, in place; a row that says how long that took."""

        def run() -> dict[str, Any]:
            torch._dynamo.reset()
            with torch.no_grad():
                timing = measure(lambda: quantize(self.model), self.device, 0, self.budget)
            clean_up(self.device)
            return {"first_s": timing.first_s, "ms": timing.ms, "peak_gib": timing.peak_gib}

        return self._attempt({"name": "quantising the weights", "phase": "preparation"}, run)


def eight_bit() -> list[str]:
    """8-bit attention kernels, the fastest of those that are there first."""
    from ..optimize.attention import BACKENDS

    lossy = [backend for backend in BACKENDS if not backend.exact]
    return [backend.name for backend in sorted(lossy, key=lambda backend: bool(backend.missing()))]


# --- the lists of variants -------------------------------------------------------------------------------------------


def ablation(bench: Bench, report: Report, fp8: bool = True) -> None:
    """Rows of the phases baseline, added, removed and, last, since they change the weights, fp8."""
    first = report.add(bench.run_baseline(EAGER, False, phase="baseline"))
    report.add(bench.run_baseline(COMPILED, True, phase="baseline"))
    values, before = bench.plain(), first
    row = bench.run_network(LAYOUT.what, values, phase="added", switch=LAYOUT.name, guess_s=LAYOUT.guess_s)
    before = report.add(compared(row, first, before))
    for switch, values in added(bench):
        row = bench.run_network(switch.what, values, phase="added", switch=switch.name, guess_s=switch.guess_s)
        row = compared(row, first, before)
        report.add(row)
        before = row if row["status"] == "ok" else before
    full = before
    for switch, values in removed(bench):
        row = bench.run_network(f"without {switch.what}", values, phase="removed", switch=switch.name)
        report.add(compared(row, first, full, removed=True) | {"guess_s": switch.guess_s})
    if fp8:
        lossy(bench, report, first, full)


def added(bench: Bench) -> Iterator[tuple[Switch, dict[str, Any]]]:
    """Each switch with the values of it and all before it."""
    values, full = bench.plain(), bench.full()
    for switch in SWITCHES:
        values = values | {switch.name: full[switch.name]}
        yield switch, values


def removed(bench: Bench) -> Iterator[tuple[Switch, dict[str, Any]]]:
    """Each switch with the full set but for it."""
    plain, full = bench.plain(), bench.full()
    for switch in SWITCHES:
        if plain[switch.name] != full[switch.name]:
            yield switch, full | {switch.name: plain[switch.name]}


def paths(bench: Bench, report: Report, part: str = "all", both_ways: bool = True) -> None:
    """The baselines, the exact path, fp8, and each as the distilled model runs it: batch 1, without guidance.

    part: `exact` stops before the weights are quantised, `fp8` begins there, on a report that has the first rows.
    both_ways: compiled paths uncompiled as well, and uncompiled ones compiled.
    """
    if part != "fp8":
        first = report.add(bench.run_baseline(EAGER, False, phase="baseline"))
        report.add(bench.run_baseline(COMPILED, True, phase="baseline"))
        report.add(compared(bench.run_network(EXACT, bench.path(EXACT), phase="path"), first, None))
        report.add(bench.run_network(f"{EXACT}, distilled", bench.path(EXACT), 1, phase="distilled"))
        if both_ways:
            name, values = bench.other_way(EXACT)
            report.add(compared(bench.run_network(name, values, phase="path"), first, None))
    if part != "exact":
        by_name = {row["name"]: row for row in report.rows}
        lossy(bench, report, by_name.get(EAGER, {}), by_name.get(EXACT, {}), distilled=True, both_ways=both_ways)


def lossy(
    bench: Bench, report: Report, first: dict, full: dict, distilled: bool = False, both_ways: bool = True
) -> None:
    """fp8 weights: with 8-bit GEMMs, with 16-bit ones, with 8-bit attention."""
    if report.add(bench.quantize())["status"] != "ok":
        return
    values = bench.path(FP8)
    row = report.add(compared(bench.run_network(FP8, values, phase="fp8"), first, full))
    if distilled:
        report.add(bench.run_network(f"{FP8}, distilled", values, 1, phase="distilled"))
        if both_ways:
            name, other = bench.other_way(FP8)
            report.add(compared(bench.run_network(name, other, phase="fp8"), first, full))
    for name, other in bench.eight_bit_paths().items():
        report.add(compared(bench.run_network(name, other, phase="fp8"), first, row))
    if not distilled:
        row = bench.run_network("fp8 weights, 16-bit GEMMs", values | {"fp8": False}, phase="fp8")
        report.add(compared(row, first, full))
        other = bench.full() | {"fused_kernels": False}
        report.add(compared(bench.run_network(f"{FP8}{NO_KERNELS}", other, phase="fp8"), first, full))


def compared(row: dict[str, Any], first: dict, before: dict | None, removed: bool = False) -> dict[str, Any]:
    """With the ratio to the eager baseline and, over the row before (or the full set), what this one is worth.

    worth_ms: faster by so much for having the optimization; share: of the eager baseline's time.
    """
    if row.get("status") != "ok" or first.get("status") != "ok":
        return row
    row = row | {"ratio": first["ms"] / row["ms"]}
    if before is None or before.get("status") != "ok":
        return row
    worth = row["ms"] - before["ms"] if removed else before["ms"] - row["ms"]
    return row | {"worth_ms": worth, "share": worth / first["ms"], "over": before["name"]}
