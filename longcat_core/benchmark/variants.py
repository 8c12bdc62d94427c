"""The variants of the network that parts measure, and the loop that measures one and reports it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from ..measure.clock import GIB, OK, Budget, attempt, clean_up, measure
from ..measure.results import say, shown
from ..measure.speed import PLAIN, plain
from ..optimize.attention import BACKENDS
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
DISTILLED = ", distilled"
FULL = Optimizations(compile="blocks")
FP8_WEIGHTS = "fp8 weights, 16-bit GEMMs"
# Without our own kernels, the compiler's stand in for them.
NO_KERNELS = ", without own kernels"
# Fields of a row that the terminal shows as soon as the row is done.
PROGRESS = ("ms", "first_s", "seconds", "error", "graphs", "fit", "gb_s", "plan")

Row = dict[str, Any]


@dataclass
class Bench:
    """What all variants share: the model, its inputs, how long and how often to measure, and the report, a
    `ResultsFile`.

    fp8: whether lossy variants run; few_blocks: blocks of parts that need only some; variant: what `profile` profiles;
    also_compiled: whether paths also run with compiled blocks; remake: makes the bench again, with its first weights.
    """

    model: Any
    size: workload.Size
    device: torch.device
    repeats: int
    budget: Budget
    attention: str = "auto"
    report: Any = None
    fp8: bool = True
    few_blocks: int = 4
    variant: str = "exact"
    also_compiled: bool = True
    remake: Any = None
    say: Callable[[str], None] = say
    _inputs: dict[int, workload.Inputs] = field(default_factory=dict)

    def inputs(self, batch: int | None = None) -> workload.Inputs:
        size = self.size if batch is None else replace(self.size, batch=batch)
        if size.batch not in self._inputs:
            self._inputs[size.batch] = workload.Inputs(self.model.config, size, self.device)
        return self._inputs[size.batch]

    def sized(self, size: workload.Size) -> Bench:
        """The same model and budget at another size."""
        return replace(self, size=size, _inputs={})

    def first_blocks(self) -> Any:
        """The model's first blocks."""
        return workload.first_blocks(self.model, min(self.few_blocks, self.model.config.depth))

    # --- values of `Optimizations` ---

    def plain(self) -> dict[str, Any]:
        return plain(self.device, self.model.dtype)

    def full(self) -> dict[str, Any]:
        return {name: getattr(FULL, name) for name in PLAIN} | {"attention": self.attention}

    def path(self, name: str) -> dict[str, Any]:
        """Values of the path EXACT, FP8 or FP8_8BIT.

        With our own kernels, compiling the blocks gains little and makes the first call slow; `compiled` has the rest.
        """
        return self.eight_bit_paths()[FP8_8BIT] if name == FP8_8BIT else self.full() | {"compile": "off"}

    def eight_bit_paths(self) -> dict[str, dict[str, Any]]:
        """Names and values of FP8_8BIT and of its variants with the other 8-bit kernels."""
        fastest, *others = eight_bit()
        attends = {FP8_8BIT: fastest} | {f"{FP8_8BIT}, {other}": other for other in others}
        return {name: self.path(FP8) | {"attention": attention} for name, attention in attends.items()}

    def compiled(self, name: str) -> tuple[str, dict[str, Any]]:
        """Name and values of the path EXACT or FP8 with compiled blocks."""
        return f"{name}, compiled", self.full()

    # --- measuring ---

    def add(self, row: Row, run: Callable[..., Row], *args: Any, free: bool = True) -> Row:
        """Measure one variant and report its row, completed by `run(*args)`. free: drop graphs, free memory."""
        row = attempt(row, self.budget, run, *args)
        if free:
            clean_up(self.device)
        return self.keep(row)

    def keep(self, row: Row) -> Row:
        """Add a row to the report, and say what it holds."""
        self.report.add(row)
        figures = ", ".join(f"{name} {shown(row[name])}" for name in PROGRESS if row.get(name) is not None)
        self.say(f"{self.report.name}, {row['name']}: {row.get('reason') or figures}")
        return row

    def step(self, inputs: workload.Inputs, chosen: Optimizations, warm_up: int, forward: Callable[[], Any]) -> Row:
        """Timings of a denoising step around a forward."""
        step = workload.step_of(forward, inputs, chosen)
        return measure(step, self.device, self.repeats, self.budget, warm_up).as_row()

    def baseline(self, name: str, compiled: bool) -> Row:
        """A row of the baseline's step."""

        def run() -> Row:
            baseline, inputs = BaselineTransformer(self.model), self.inputs()
            torch._dynamo.reset()
            forward = workload.baseline_forward(baseline, inputs, compiled)
            return self.step(inputs, Optimizations(fused_step=False), int(compiled), forward)

        return self.add({"name": name, "compiled": compiled, "phase": "baseline"}, run)

    def network(
        self, name: str, values: dict[str, Any], batch: int = 0, finish: Callable[[Row], Row] = dict, **row: Any
    ) -> Row:
        """A row of the network's step with these optimizations. batch: 0 for the bench's; finish: completes the row."""
        chosen = Optimizations(**values)
        compiled, batch = chosen.compile != "off", batch or self.size.batch

        def run() -> Row:
            inputs = self.inputs(batch)
            with workload.switched(self.model, chosen, name) as notes:
                forward = workload.network_forward(self.model, inputs)
                out = self.step(inputs, chosen, int(compiled), forward) | {"notes": notes}
                out |= workload.kernels_of(self.model, inputs)
                out["weights_gib"] = sum(p.nbytes for p in self.model.parameters()) / GIB
                # A failed compilation leaves the network running eagerly, with a note.
                out["compiled"] = compiled and not any("uncompiled" in note for note in notes)
            return finish(out)

        head = {"name": name, "compiled": compiled, "batch": batch, "optimizations": asdict(chosen)}
        return self.add(head | row, run)

    def quantize(self) -> bool:
        """Quantize the model's weights to fp8, in place, with a row of how long that took; whether it worked."""

        @torch.no_grad()
        def run() -> Row:
            torch._dynamo.reset()
            timing = measure(lambda: quantize(self.model), self.device, 0, self.budget)
            return {"first_s": timing.first_s, "ms": timing.ms, "peak_gib": timing.peak_gib}

        return self.add({"name": "quantizing the weights", "phase": "preparation"}, run)["status"] == OK


def eight_bit() -> list[str]:
    """8-bit attention kernels, installed ones first, in order of speed."""
    lossy = [backend for backend in BACKENDS if not backend.exact]
    return [backend.name for backend in sorted(lossy, key=lambda backend: bool(backend.needs.missing()))]


def compare_with(first: Row, before: Row | None = None, removed: bool = False) -> Callable[[Row], Row]:
    """Completes a row by its ratio to the row `first` and by what the variant is worth over the row `before`.

    worth_ms: milliseconds saved by the optimization; share: of the time of `first`. removed: the row is `before`
    without the optimization.
    """

    def finish(row: Row) -> Row:
        if first.get("status") != OK:
            return row
        row = row | {"ratio": first["ms"] / row["ms"]}
        if before is None or before.get("status") != OK:
            return row
        worth = row["ms"] - before["ms"] if removed else before["ms"] - row["ms"]
        return row | {"worth_ms": worth, "share": worth / first["ms"], "over": before["name"]}

    return finish


def lossy_rows(bench: Bench, first: Row, full: Row, paths: bool) -> None:
    """Rows of fp8 weights: with 8-bit GEMMs, with 8-bit attention, and for paths distilled and in the other mode of
    compilation, else with 16-bit GEMMs and without own kernels. first, full: the rows of EAGER and of EXACT."""
    if not bench.quantize():
        return
    values, finish = bench.path(FP8), compare_with(first, full)
    row = bench.network(FP8, values, finish=finish, phase="fp8")
    if paths:
        bench.network(f"{FP8}{DISTILLED}", values, 1, phase="distilled")
        if bench.also_compiled:
            bench.network(*bench.compiled(FP8), finish=finish, phase="fp8")
    for name, other in bench.eight_bit_paths().items():
        bench.network(name, other, finish=compare_with(first, row), phase="fp8")
    if not paths:
        bench.network(FP8_WEIGHTS, values | {"fp8": False}, finish=finish, phase="fp8")
        bench.network(f"{FP8}{NO_KERNELS}", bench.full() | {"fused_kernels": False}, finish=finish, phase="fp8")
