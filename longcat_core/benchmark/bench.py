"""`longcat bench`: its options, its parts, and a run of one part or of all. PyTorch is imported when a part runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LongCatError

if TYPE_CHECKING:
    import torch

    from ..measure.clock import Budget
    from ..measure.results import ResultsFile
    from .part import Part
    from .variants import Bench

# What each part measures. Its record lies in the file of its name, which imports PyTorch: --help does without.
PARTS = {
    "backends": "Every attention backend at the model's shapes.",
    "paths": "The baselines, the exact path and fp8, side by side; the distilled model's steps.",
    "profile": "Kernels of one step by family, and the profiler's trace.",
    "exactness": "Error of every path against fp32, on the first blocks.",
    "memory": "Measured peak of a forward over the estimate.",
    "ablation": "Each optimization added in turn, and removed alone from the full set.",
    "policies": "Error of fp8 by the layers in it.",
    "training": "A training step with and without gradient checkpointing.",
    "scale": "Time and memory by the number of tokens.",
    "continuation": "A step with given frames: their keys and values at every step, or from a KV cache.",
    "refine": "One evaluation of the refinement to 720p: dense and block-sparse attention, exact and fp8.",
    "cards": "A step within the memory of smaller cards: 24, 16 and 12 GiB, exact and fp8.",
    "load": "Loading a checkpoint, beside reading its file.",
    "recompiles": "Graphs of a block over steps, prompts, LoRAs, given frames and sizes.",
}
# Order of sections on the page.
PAGE = (
    *("paths", "ablation", "profile", "backends", "exactness", "policies", "memory", "scale", "recompiles"),
    *("cards", "load", "training", "continuation", "refine"),
)
# Parts that `all` runs on the first blocks of the model, in this order, after those that need the whole model.
FEW = (
    *("exactness", "memory", "recompiles", "load", "training", "ablation", "policies", "scale", "cards"),
    *("continuation", "refine"),
)
FEW_BLOCKS = 4
# Height, width and frames on a GPU and on a CPU: of a video, and of its refinement.
VIDEO = (480, 832, 93), (32, 48, 5)
REFINED = (704, 1280, 189), (64, 96, 29)

Kind = Callable[[str], Any]


def add_arguments(parser: argparse.ArgumentParser, *, size: Kind, whole: Kind, number: Kind, dtypes: Any) -> None:
    """Add the options of every part. size, whole, number: how the command parses such values."""
    parts = parser.add_subparsers(metavar="PART", required=True, dest="part")
    for name, summary in (*PARTS.items(), ("all", "All of these on one model, until the budget runs out.")):
        sub = parts.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        option = sub.add_argument
        option("--size", type=size, metavar="HxW",
               help="pixels (default: 480x832, for refine 704x1280; on a CPU 32x48 and 64x96)")  # fmt: skip
        option("--frames", type=whole, metavar="N",
               help="4k+1 (default: 93, for refine 189; on a CPU 5 and 29)")  # fmt: skip
        option("--batch", type=whole, default=2, choices=(1, 2), help="2: with guidance (default), 1: without")
        option("--steps", type=whole, default=50, metavar="N", help="steps of a whole video (default: 50)")
        option("--repeats", type=whole, default=3, metavar="N", help="timed calls, of which the median counts "
               "(default: 3)")  # fmt: skip
        option("--blocks", type=whole, metavar="N", help="blocks of the model (default: all)")
        option("--few-blocks", type=whole, default=FEW_BLOCKS, metavar="N",
               help="blocks for exactness, policies and training, and in `all` for all parts but backends, paths and "
               f"profile (default: {FEW_BLOCKS})")  # fmt: skip
        option("--model", metavar="NAME", help="nano, full-random or the path of a checkpoint (default: full-random; "
               "on a CPU nano)")  # fmt: skip
        option("--device", default="auto", help="auto, cpu, cuda or cuda:N")
        option("--dtype", choices=dtypes, default="auto", help="auto: bfloat16 on a GPU, float32 on a CPU")
        option("--attention", default="auto", metavar="NAME",
               help="attention of the full set (see longcat backends)")  # fmt: skip
        option("--variant", default="exact", metavar="NAME", help="for profile: exact (default), fp8, fp8+8bit, "
               "plain, baseline, refine or refine+fp8")  # fmt: skip
        option("--parts", metavar="NAMES", help="for all: run only these parts, separated by commas")
        option("--no-fp8", action="store_true", help="leave fp8 out")
        option("--no-plots", action="store_true", help="write numbers only; `report` draws the plots later")
        option("--output", type=Path, default=Path("outputs/bench"), metavar="DIR", help="default: %(default)s")
        option("--budget", type=number, metavar="S", help="start nothing new after this many seconds")
    sub = parts.add_parser("report", help="Write the page of performance from results.", allow_abbrev=False)
    sub.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="folders that bench wrote to (--output)")
    sub.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="the page, for instance docs/performance.md"
    )


def part(name: str) -> Part:
    """The record of a part; imports PyTorch."""
    return import_module(f".parts.{name}", __package__).PART


def run(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> int:
    """Run one part, or all. Bad input raises LongCatError before a model is made; a failing variant becomes a row."""
    from ..files.places import check_new_folder
    from ..measure.charts import require_pillow
    from ..measure.clock import Budget
    from ..measure.results import commit, machine
    from ..optimize import attention
    from .parts import profile
    from .workload import FULL_RANDOM, NANO, Size

    cuda = device.type == "cuda"
    args.model = args.model or (FULL_RANDOM if cuda else NANO)
    *sides, frames = _default(REFINED if profile.refines(args.part, args.variant) else VIDEO, device)
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
    size = Size(*args.size, args.frames, args.batch)
    size.latents()
    if args.model not in (FULL_RANDOM, NANO) and not Path(args.model).exists():
        raise LongCatError(f"--model {args.model} does not exist; give nano, full-random or the path of a checkpoint")
    check_new_folder(args.output, "results.json")
    if not args.no_plots:
        require_pillow(", or give --no-plots and draw them elsewhere with longcat bench report")
    known = {"machine": machine(device), "commit": commit()}
    job = Job(args, device, dtype, Budget(args.budget), known)
    if args.part == "all":
        _everything(job, size)
    else:
        job.measure(args.part, job.bench(size, args.blocks), args.variant)
    return 0


def _default(sizes: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[int, ...]:
    return sizes[0 if device.type == "cuda" else 1]


@dataclass
class Job:
    """The checked options, and what the parts of a run share."""

    args: argparse.Namespace
    device: torch.device
    dtype: torch.dtype
    budget: Budget
    known: dict[str, Any]

    def bench(self, size: Any, blocks: int | None) -> Bench:
        """A bench with a new model."""
        from ..measure.clock import clean_up
        from .variants import Bench
        from .workload import load_model

        args = self.args
        clean_up(self.device)
        model = load_model(args.model, self.device, self.dtype, blocks)
        size.check(model.config)
        both_ways = args.part != "all" or args.parts is None
        options = {"fp8": not args.no_fp8, "few_blocks": args.few_blocks, "both_ways": both_ways}
        return Bench(model, size, self.device, args.repeats, self.budget, args.attention, **options)

    def report(self, kind: str, bench: Bench) -> ResultsFile:
        from ..measure.results import ResultsFile
        from .parts.profile import file_name

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
        name = file_name(bench.variant) if kind == "profile" else kind
        return ResultsFile(kind, args.output, self.device, inputs, self.known, name)

    def measure(self, kind: str, bench: Bench, variant: str = "exact") -> None:
        """Run one part on a bench; print its table, write its results and charts. variant: of `profile`."""
        record = part(kind)
        bench.variant = variant
        bench = record.sized(bench)
        size, depth = bench.size, bench.model.config.depth
        bench.report, bench.fresh = self.report(kind, bench), lambda: self.bench(size, depth)
        record.run(bench)
        self.finish(bench.report)

    def finish(self, report: ResultsFile) -> None:
        """Print the table; write the file and its charts."""
        from ..files.atomic import atomic_path
        from ..measure.results import aligned, say

        record = part(report.content["kind"])
        report.write()
        say(f"\n{report.content['name']}")
        say(aligned(record.table(report.content, None)))
        for row in report.rows:
            for sentence in (row.get("reason"), *row.get("notes", ())):
                if sentence:
                    say(f"  {row['name']}: {sentence}")
        say(str(report.path))
        for name, data in {} if self.args.no_plots else record.draw(report.content).items():
            with atomic_path(report.path.with_name(name)) as temporary:
                temporary.write_bytes(data)

    def guarded(self, kind: str, bench: Bench, variant: str = "exact") -> None:
        """`measure`, except that a part that fails as a whole does not end the others."""
        from ..measure.clock import clean_up
        from ..measure.results import say

        if self.budget.used_up:
            say(f"{kind}: not run: the budget was used up")
            return
        try:
            self.measure(kind, bench, variant)
        except Exception as error:
            say(f"{kind} failed: {type(error).__name__}: {' '.join(str(error).split())[:500]}")
        clean_up(self.device)


def _everything(job: Job, size: Any) -> None:
    """Parts that need the whole model, which is quantized as late as possible; then parts on its first blocks."""
    from ..measure.results import say
    from ..optimize.quantization import quantized_layers
    from .parts import paths
    from .parts.profile import REFINING, VARIANTS, refines
    from .workload import Size

    args = job.args
    wanted, depth = args.parts or list(PARTS), args.blocks
    if {"paths", "profile", "backends"} & set(wanted):
        bench = job.bench(size, depth)
        depth = bench.model.config.depth
        report = bench.report = job.report("paths", bench)
        if "paths" in wanted:
            # Before all others, so that first calls do not find kernels in a cache.
            paths.exact_paths(bench)
            job.finish(report)
        if "profile" in wanted:
            job.guarded("profile", bench)
        if bench.fp8 and "paths" in wanted:
            bench.report = report
            paths.lossy_paths(bench)
            job.finish(report)
        ran = {row["name"] for row in report.rows if row["status"] == "ok"}
        for variant in ("fp8", "fp8+8bit"):
            if VARIANTS[variant] in ran and "profile" in wanted:
                job.guarded("profile", bench, variant)
        if "backends" in wanted:
            job.guarded("backends", bench)
        del bench
    few = args.few_blocks if depth is None else min(args.few_blocks, depth)
    bench = None
    kinds = [(kind, "exact") for kind in FEW] + [("profile", variant) for variant in REFINING]
    for kind, variant in kinds:
        if kind not in wanted or (variant in REFINING and "refine" not in wanted):
            continue
        if args.no_fp8 and (kind == "policies" or variant == "refine+fp8"):
            continue
        if bench is None or bench.model is None or quantized_layers(bench.model):
            # An earlier part quantized or dropped the model.
            bench = job.bench(size, few)
        if refines(kind, variant):
            bench = bench.sized(Size(*_default(REFINED, job.device)))
        job.guarded(kind, bench, variant)
    say(f"results are in {args.output}")
