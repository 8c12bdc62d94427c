"""`longcat bench`: a run of one part or of all."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch

from ..errors import LongCatError
from ..files.atomic import atomic_path
from ..files.claims import claimed
from ..files.places import check_new_folder
from ..measure.charts import require_pillow
from ..measure.clock import Budget, clean_up
from ..measure.results import ResultsFile, aligned, say
from ..optimize import attention
from ..optimize.quantization import quantized_layers
from . import workload
from .options import PARTS
from .part import Part
from .parts import paths, profile
from .variants import Bench
from .workload import FULL_RANDOM, NANO, Size

# Parts that `all` runs on the first blocks of the model, in this order, after those that need the whole model.
FEW = (
    *("exactness", "memory", "recompiles", "load", "training", "ablation", "policies", "scale", "cards"),
    *("decode", "continuation", "sparse", "avatar", "gpus", "gpus_run", "refine"),
)
# Height, width and frames on a GPU and on a CPU: of a video, and of its refinement.
VIDEO = {"cuda": (480, 832, 93), "cpu": (32, 48, 5)}
REFINED = {"cuda": (704, 1280, 189), "cpu": (64, 96, 29)}


def part(name: str) -> Part:
    """The record of a part."""
    return import_module(f".parts.{name}", __package__).PART


def run(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> int:
    """Run one part, or all. Bad input raises LongCatError before a model is made; a failing variant becomes a row."""
    args.model = args.model or (FULL_RANDOM if device.type == "cuda" else NANO)
    *sides, frames = (REFINED if profile.refines(args.part, args.variant) else VIDEO)[device.type]
    args.size, args.frames = args.size or tuple(sides), args.frames or frames
    for name in ("repeats", "steps", "blocks", "few_blocks"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise LongCatError(f"--{name.replace('_', '-')} {value} is too small; give at least 1")
    if args.budget is not None and not args.budget > 0:
        raise LongCatError(f"--budget {args.budget} must be a positive number of seconds")
    attention.check(args.attention)
    profile.check(args.variant)
    if args.parts is not None:
        args.parts = [name.strip() for name in args.parts.split(",")]
        unknown = [name for name in args.parts if name not in PARTS]
        if unknown:
            raise LongCatError(f"--parts has no part {unknown[0]!r}; choose from {', '.join(PARTS)}")
    height, width = args.size
    size = Size(height, width, args.frames, args.batch)
    size.latents()
    if args.model not in (FULL_RANDOM, NANO) and not Path(args.model).exists():
        raise LongCatError(f"--model {args.model} does not exist; give nano, full-random or the path of a checkpoint")
    check_new_folder(args.output, "results.json")
    if not args.no_plots:
        require_pillow(", or give --no-plots and draw them elsewhere with longcat bench report")
    job = Job(args, device, dtype, Budget(args.budget))
    args.output.mkdir(parents=True, exist_ok=True)
    with claimed(args.output / "results.json", f"another run is writing to {args.output}; give another --output"):
        if args.part == "all":
            _everything(job, size)
        else:
            job.measure(args.part, job.bench(size, args.blocks), args.variant)
    return 0


@dataclass
class Job:
    """The checked options, and what the parts of a run share."""

    args: argparse.Namespace
    device: torch.device
    dtype: torch.dtype
    budget: Budget

    def bench(self, size: Size, blocks: int | None) -> Bench:
        """A bench with a new model."""
        args = self.args
        clean_up(self.device)
        model = workload.load_model(args.model, self.device, self.dtype, blocks)
        size.check(model.config)
        also_compiled = args.part != "all" or args.parts is None
        options = {"fp8": not args.no_fp8, "few_blocks": args.few_blocks, "also_compiled": also_compiled}
        return Bench(model, size, self.device, args.repeats, self.budget, args.attention, **options)

    def report(self, kind: str, bench: Bench) -> ResultsFile:
        args, config = self.args, bench.model.config
        inputs = bench.inputs().describe() | {
            "size": str(bench.size),
            "model": args.model,
            "blocks": config.depth,
            "hidden_size": config.hidden_size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "steps": args.steps,
            "repeats": args.repeats,
            "attention": args.attention,
        }
        name = profile.file_name(bench.variant) if kind == "profile" else kind
        return ResultsFile(kind, args.output, self.device, inputs, name)

    def measure(self, kind: str, bench: Bench, variant: str = "exact") -> None:
        """Run one part on a bench; print its table, write its results and charts. variant: of `profile`."""
        record = part(kind)
        bench.variant = variant
        bench = record.sized(bench)
        size, depth = bench.size, bench.model.config.depth
        bench.report, bench.remake = self.report(kind, bench), lambda: self.bench(size, depth)
        assert record.run is not None, "a part of PARTS"
        record.run(bench)
        finish(bench.report, not self.args.no_plots)

    def guarded(self, kind: str, bench: Bench, variant: str = "exact") -> None:
        """`measure`, except that a part that fails as a whole does not end the others."""
        if self.budget.used_up:
            say(f"{kind}: not run: the budget was used up")
            return
        try:
            self.measure(kind, bench, variant)
        except Exception as error:
            say(f"{kind} failed: {type(error).__name__}: {' '.join(str(error).split())[:500]}")
        clean_up(self.device)


def finish(report: ResultsFile, plots: bool) -> None:
    """Print the table of results; write the file and, if `plots`, its charts."""
    record = part(report.content["kind"])
    report.write()
    say(f"\n{report.name}\n{aligned(record.table(report.content, None))}")
    for row in report.rows:
        for sentence in filter(None, (row.get("reason"), *row.get("notes", ()))):
            say(f"  {row['name']}: {sentence}")
    say(str(report.path))
    for name, data in record.draw(report.content).items() if plots else ():
        with atomic_path(report.path.with_name(name)) as temporary:
            temporary.write_bytes(data)


def _everything(job: Job, size: Size) -> None:
    """Parts that need the whole model, which is quantized as late as possible; then parts on its first blocks."""
    args = job.args
    wanted, depth = args.parts or list(PARTS), args.blocks
    if {"paths", "profile", "backends"} & set(wanted):
        bench = job.bench(size, depth)
        depth = bench.model.config.depth
        report = bench.report = job.report("paths", bench)
        if "paths" in wanted:
            # Before all others, so that first calls do not find kernels in a cache.
            paths.exact_paths(bench)
            finish(report, not args.no_plots)
        if "profile" in wanted:
            job.guarded("profile", bench)
        if bench.fp8 and "paths" in wanted:
            bench.report = report
            paths.lossy_paths(bench)
            finish(report, not args.no_plots)
        ran = {row["name"] for row in report.rows if row["status"] == "ok"}
        for variant in ("fp8", "fp8+8bit"):
            if profile.VARIANTS[variant] in ran and "profile" in wanted:
                job.guarded("profile", bench, variant)
        if "backends" in wanted:
            job.guarded("backends", bench)
        del bench
    few = args.few_blocks if depth is None else min(args.few_blocks, depth)
    small: Bench | None = None
    for kind, variant in (*((kind, "exact") for kind in FEW), *(("profile", variant) for variant in profile.REFINING)):
        if kind not in wanted or (variant in profile.REFINING and "refine" not in wanted):
            continue
        if args.no_fp8 and (kind == "policies" or variant == "refine+fp8"):
            continue
        if small is None or small.model is None or quantized_layers(small.model):
            # An earlier part quantized or dropped the model.
            small = job.bench(size, few)
        if profile.refines(kind, variant):
            small = small.sized(Size(*REFINED[job.device.type]))
        job.guarded(kind, small, variant)
    say(f"results are in {args.output}")
