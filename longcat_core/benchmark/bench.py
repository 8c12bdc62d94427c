"""`longcat bench`: its options, its parts, and the tables that they print. PyTorch is imported when a part runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LongCatError

if TYPE_CHECKING:
    import torch

    from ..measure.results import Report
    from .ablation import Bench

# Each with what it measures; `all` runs them in this order on as few models as it can.
PARTS = {
    "backends": "Every attention backend at the model's shapes.",
    "paths": "The baselines, the exact path and fp8, side by side; the distilled model's steps.",
    "profile": "Kernels of one step by family, and the profiler's trace.",
    "exactness": "Error of every path against fp32, on the first blocks.",
    "memory": "Measured peak of a forward over the counted.",
    "ablation": "Each optimization added one at a time, and taken alone from the full set.",
    "policies": "What fp8 costs by which layers are in it.",
    "training": "A training step with and without gradient checkpointing.",
    "scale": "Tokens against time and memory.",
    "continuation": "A step with given frames: their keys and values at every step, or from a cache.",
    "refine": "One evaluation of the refinement to 720p: attention in full and block-sparse, exact and fp8.",
    "cards": "A step within the memory of smaller cards: 24, 16 and 12 GiB, exact and fp8.",
    "load": "Loading a checkpoint, beside reading its file.",
    "recompiles": "Graphs of a block over steps, prompts, LoRAs, given frames and sizes.",
}
# Parts of `all` that need no whole model, in their order, and on how many of its blocks they run.
FEW = (
    *("exactness", "memory", "recompiles", "load", "training", "ablation", "policies", "scale", "cards"),
    *("continuation", "refine"),
)
FEW_BLOCKS = 4
# Height, width and frames on a GPU and on a CPU: of a video, and of what refining makes of it.
VIDEO = (480, 832, 93), (32, 48, 5)
REFINED = (704, 1280, 189), (64, 96, 29)
COLUMNS = {
    "ablation": ("name", "ms", "first_s", "peak_gib", "ratio", "worth_ms", "share", "guess_s", "status"),
    "paths": ("name", "ms", "first_s", "peak_gib", "ratio", "attention", "status"),
    "profile": ("name", "ms", "calls", "share", "status"),
    "exactness": ("name", "error", "ratio", "psnr", "status"),
    "policies": ("name", "error", "psnr", "status"),
    "memory": ("name", "counted_gib", "measured_gib", "fit", "status"),
    "training": ("name", "ms", "peak_gib", "gradient_difference", "status"),
    "scale": ("size", "tokens", "ms", "peak_gib", "status"),
    "continuation": ("name", "ms", "ratio", "once_ms", "cache_gib", "peak_gib", "difference", "status"),
    "refine": ("name", "ms", "peak_gib", "ratio", "attention", "status"),
    "cards": ("name", "ms", "ratio", "floor_ms", "peak_gib", "plan", "status"),
    "load": ("name", "seconds", "gb_s", "share", "status"),
    "recompiles": ("name", "graphs", "at_most", "first_s", "status"),
    "backends": ("name", "attention", "ms", "tflops", "error", "status"),
}

Kind = Callable[[str], Any]


def add_arguments(parser: argparse.ArgumentParser, *, size: Kind, whole: Kind, number: Kind, dtypes: Any) -> None:
    """Options of every part. size, whole, number: how the command reads such values."""
    parts = parser.add_subparsers(metavar="PART", required=True, dest="part")
    for name, summary in (*PARTS.items(), ("all", "All of these on one model, until the budget is used up.")):
        sub = parts.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        sub.add_argument("--size", type=size, metavar="HxW", help="pixels (default: 480x832, for refine 704x1280; "
                         "on a CPU 32x48 and 64x96)")  # fmt: skip
        sub.add_argument("--frames", type=whole, metavar="N", help="4k+1 (default: 93, for refine 189; on a CPU 5 "
                         "and 29)")  # fmt: skip
        sub.add_argument(
            "--batch", type=whole, default=2, choices=(1, 2), help="2: with guidance (default), 1: without"
        )
        sub.add_argument("--steps", type=whole, default=50, metavar="N", help="of a whole video (default: 50)")
        sub.add_argument(
            "--repeats", type=whole, default=3, metavar="N", help="calls to take the median of (default: 3)"
        )
        sub.add_argument("--blocks", type=whole, metavar="N", help="blocks of the model (default: all)")
        sub.add_argument("--few-blocks", type=whole, default=FEW_BLOCKS, metavar="N",
                         help="blocks where few will do: exactness, policies, training; in `all` all parts but "
                         f"backends, paths and profile (default: {FEW_BLOCKS})")  # fmt: skip
        sub.add_argument("--model", metavar="NAME", help="nano, full-random or a checkpoint's path (default: "
                         "full-random; on a CPU nano)")  # fmt: skip
        sub.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
        sub.add_argument("--dtype", choices=dtypes, default="auto", help="auto: bfloat16 on a GPU, float32 on a CPU")
        sub.add_argument("--attention", default="auto", metavar="NAME", help="of the full set (see longcat backends)")
        sub.add_argument("--variant", default="exact", metavar="NAME", help="for profile: exact (default), fp8, "
                         "fp8+8bit, plain, baseline, refine or refine+fp8")  # fmt: skip
        sub.add_argument("--parts", metavar="NAMES", help="for all: these alone, separated by commas")
        sub.add_argument("--no-fp8", action="store_true", help="leave fp8 out")
        sub.add_argument("--no-plots", action="store_true", help="numbers only; `report` draws the plots later")
        sub.add_argument(
            "--output", type=Path, default=Path("outputs/bench"), metavar="DIR", help="default: %(default)s"
        )
        sub.add_argument("--budget", type=number, metavar="S", help="seconds after which nothing new is begun")
    sub = parts.add_parser("report", help="Write the page of performance from results.", allow_abbrev=False)
    sub.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="what --output of bench named")
    sub.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="the page, for instance docs/performance.md"
    )


@dataclass
class Settings:
    """The options, checked, and what the parts share."""

    args: argparse.Namespace
    device: torch.device
    dtype: torch.dtype
    budget: Any
    known: dict[str, Any]


def run(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> int:
    """One part, or all. Bad input is told before a model is made; a part that fails is a row of its results."""
    from ..measure import results
    from ..measure.clock import Budget
    from ..optimize import attention as backends
    from . import profiling
    from .plots import require_matplotlib
    from .workload import FULL_RANDOM, NANO, Size

    cuda = device.type == "cuda"
    args.model = args.model or (FULL_RANDOM if cuda else NANO)
    *sides, frames = _default(REFINED if profiling.refines(args.part, args.variant) else VIDEO, device)
    args.size, args.frames = args.size or tuple(sides), args.frames or frames
    for name in ("repeats", "steps", "blocks", "few_blocks"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise LongCatError(f"--{name.replace('_', '-')} {value} is too small; give at least 1")
    if args.budget is not None and not args.budget > 0:
        raise LongCatError(f"--budget {args.budget} is no time; give seconds above 0")
    backends.check(args.attention)
    profiling.check(args.variant)
    if args.parts is not None:
        args.parts = [part.strip() for part in args.parts.split(",")]
        unknown = [part for part in args.parts if part not in PARTS]
        if unknown:
            raise LongCatError(f"--parts has no part {unknown[0]!r}; choose from {', '.join(PARTS)}")
    size = Size(*args.size, args.frames, args.batch)
    size.latents()
    if args.model not in (FULL_RANDOM, NANO) and not Path(args.model).exists():
        raise LongCatError(f"--model {args.model} does not exist; give nano, full-random or a checkpoint's path")
    results.check_folder(args.output)
    if not args.no_plots:
        require_matplotlib(", or give --no-plots and draw them elsewhere with longcat bench report")
    known = {"machine": results.machine(device), "commit": results.commit()}
    settings = Settings(args, device, dtype, Budget(args.budget), known)
    _everything(settings, size) if args.part == "all" else _part(settings, size)
    return 0


def _default(sizes: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[int, ...]:
    return sizes[0 if device.type == "cuda" else 1]


def _bench(settings: Settings, size: Any, blocks: int | None) -> Bench:
    from ..measure.clock import clean_up
    from .ablation import Bench
    from .workload import load_model

    args = settings.args
    clean_up(settings.device)
    model = load_model(args.model, settings.device, settings.dtype, blocks)
    size.check(model.config)
    return Bench(model, size, settings.device, args.repeats, settings.budget, args.attention)


def _report(kind: str, bench: Bench, settings: Settings, name: str = "") -> Report:
    from ..measure.results import Report

    args, config = settings.args, bench.model.config
    inputs = bench.inputs().describe() | {
        "size": str(bench.size),
        "model": args.model,
        "blocks": config.depth,
        "hidden_size": config.hidden_size,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "steps": args.steps,
        "repeats": args.repeats,
        "attention": args.attention,
    }
    return Report(kind, args.output, settings.device, inputs, settings.known, name)


def _measure(kind: str, bench: Bench, settings: Settings, variant: str = "exact") -> None:
    """One part on a model that is there; its table and its plots. variant: of `profile`."""
    from . import (
        ablation,
        cards,
        continuation,
        exactness,
        gradients,
        kernels,
        loading,
        profiling,
        recompiles,
        refine_step,
        scale,
    )

    args = settings.args
    if kind == "continuation":
        bench = bench.sized(continuation.with_room(bench.size))
    elif profiling.refines(kind, variant):
        bench = bench.sized(replace(bench.size, batch=1))
    report = _report(kind, bench, settings, profiling.file_name(variant) if kind == "profile" else "")
    if kind == "ablation":
        ablation.ablation(bench, report, fp8=not args.no_fp8)
    elif kind == "paths":
        ablation.paths(bench, report, "exact" if args.no_fp8 else "all")
    elif kind == "exactness":
        exactness.exactness(bench, report, args.few_blocks, fp8=not args.no_fp8)
        if not args.no_fp8:
            exactness.generation(report, bench.device, settings.dtype, 16, bench.budget, bench.say)
    elif kind == "policies":
        exactness.policies(bench, report, args.few_blocks)
    elif kind == "profile":
        profiling.profile_step(bench, report, variant)
    elif kind == "refine":
        refine_step.refine(bench, report, fp8=not args.no_fp8)
    elif kind == "cards":
        size, blocks = bench.size, bench.model.config.depth
        # Two of them do not fit the device.
        bench.model = None
        cards.cards(bench, report, lambda: _bench(settings, size, blocks), fp8=not args.no_fp8)
    elif kind == "training":
        gradients.training(bench, report, args.few_blocks)
    else:
        parts = {"backends": kernels.kernels, "memory": scale.memory, "scale": scale.scale}
        parts |= {"recompiles": recompiles.recompiles, "continuation": continuation.continuation}
        (parts | {"load": loading.loading})[kind](bench, report)
    finish(report, args.no_plots)


def finish(report: Report, no_plots: bool) -> None:
    """The table on the screen, the file and the pictures on disk."""
    from ..files.media import atomic_path
    from ..measure.results import say, table
    from .plots import pictures

    report.write()
    columns = COLUMNS[report.content["kind"]]
    say(f"\n{report.content['name']}")
    say(table(columns, [[row.get(name) for name in columns] for row in report.rows]))
    for row in report.rows:
        for sentence in (row.get("reason"), *row.get("notes", ())):
            if sentence:
                say(f"  {row['name']}: {sentence}")
    say(str(report.path))
    if not no_plots:
        for name, data in pictures(report.content).items():
            with atomic_path(report.path.with_name(name)) as temporary:
                temporary.write_bytes(data)


def _part(settings: Settings, size: Any) -> None:
    args = settings.args
    _measure(args.part, _bench(settings, size, args.blocks), settings, args.variant)


def _everything(settings: Settings, size: Any) -> None:
    """One whole model for what needs it, quantised last of all; then its first blocks alone."""
    from ..measure.results import say
    from ..optimize.quantization import quantised_layers
    from . import ablation, workload
    from .profiling import REFINING, VARIANTS, refines

    args = settings.args
    wanted = args.parts or list(PARTS)
    depth = args.blocks
    if {"paths", "profile", "backends"} & set(wanted):
        bench = _bench(settings, size, args.blocks)
        depth = bench.model.config.depth
        report = _report("paths", bench, settings)
        if "paths" in wanted:
            # First, so that a first call is one: what compiles a kernel later finds it in a cache.
            ablation.paths(bench, report, "exact", both_ways=args.parts is None)
            finish(report, args.no_plots)
        if "profile" in wanted:
            _guarded("profile", bench, settings)
        if not args.no_fp8 and "paths" in wanted:
            ablation.paths(bench, report, "fp8", both_ways=args.parts is None)
            finish(report, args.no_plots)
        ran = {row["name"] for row in report.rows if row["status"] == "ok"}
        for variant in ("fp8", "fp8+8bit"):
            if VARIANTS[variant] in ran and "profile" in wanted:
                _guarded("profile", bench, settings, variant)
        if "backends" in wanted:
            _guarded("backends", bench, settings)
        del bench
    few = args.few_blocks if depth is None else min(args.few_blocks, depth)
    bench = None
    kinds = [(kind, "exact") for kind in FEW] + [("profile", variant) for variant in REFINING]
    for kind, variant in kinds:
        if kind not in wanted or (variant in REFINING and "refine" not in wanted):
            continue
        if args.no_fp8 and (kind == "policies" or variant == "refine+fp8"):
            continue
        if bench is None or bench.model is None or quantised_layers(bench.model):
            # A part left it so, and the exact path would be none.
            bench = _bench(settings, size, few)
        if refines(kind, variant):
            bench = bench.sized(workload.Size(*_default(REFINED, settings.device)))
        _guarded(kind, bench, settings, variant)
    say(f"results are in {args.output}")


def _guarded(kind: str, bench: Bench, settings: Settings, variant: str = "exact") -> None:
    """A part that fails as a whole must not end the others."""
    from ..measure.clock import clean_up
    from ..measure.results import say

    if settings.budget.used_up:
        say(f"{kind}: not run: the budget was used up")
        return
    try:
        _measure(kind, bench, settings, variant)
    except Exception as error:
        say(f"{kind} failed: {type(error).__name__}: {' '.join(str(error).split())[:500]}")
    clean_up(bench.device)
