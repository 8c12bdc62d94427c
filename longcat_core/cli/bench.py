"""The `longcat` commands that measure, or show what this machine can do: bench, verify, plan, backends."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from ..benchmark.options import AVATAR_RUN, COMFYUI_RUN, RUN, add_own_of_run
from ..errors import LongCatError
from ..files.claims import claimed
from ..files.places import check_new_folder
from ..generate.options import of_command
from ..generate.paths import ModelPaths
from ..generate.request import check_frames, check_side
from ..generate.speeds import EXACT
from ..measure.charts import require_pillow
from ..measure.results import ResultsFile, markdown, say
from ..measure.verify import run_verify
from ..model.config import ModelConfig
from ..optimize.attention import Inputs, report
from ..optimize.plan import Work, plan_table
from ..optimize.sparse.choose import report as sparse_report
from ..sampling.conditioning import latent_frames, latent_shape
from .console import number, whole
from .models import check_memory, device_of, dtype_of, paths_of
from .options import Parser, given_flags

# Memory of common cards, and the size of the released text encoder's weights in 16 bits.
CARDS_GIB, UMT5_XXL_BYTES = (48, 32, 24, 16, 12, 8), 11_361_820_672
MOST_GIB = 1_000_000
# Options of generate that have an input in the workflow which bench run queues in ComfyUI.
SET_IN_COMFYUI = (
    *("model", "vae", "text_encoder", "lora", "fp8", "device", "size", "height", "width", "frames", "fps", "output"),
    *("seed", "steps", "guidance", "schedule", "distilled", "speed"),
)


def bench(args: argparse.Namespace) -> int:
    if args.part == "report":
        from ..benchmark.report import write_page

        return write_page(args.folders, args.output)
    if args.part == RUN:
        return _whole_runs(args)
    if args.part == AVATAR_RUN:
        return _avatar_runs(args)
    from ..benchmark.bench import run

    device = device_of(args.device)
    return run(args, device, dtype_of(args.dtype, device))


def _whole_runs(args: argparse.Namespace) -> int:
    """Time whole runs of `longcat generate` or in ComfyUI; write a file of results and its chart."""
    if args.runs < 1:
        raise LongCatError(f"--runs {args.runs} is too small; give at least 1")
    if args.comfyui is not None:
        _check_in_comfyui(args)
    from ..benchmark.bench import finish
    from ..benchmark.parts.run import measure

    paths = paths_of(args)
    paths.check()
    device = device_of(args.device)
    for gib in args.cards:
        check_memory(argparse.Namespace(**vars(args) | {"memory": gib}), device)
    check_new_folder(args.output, "results.json")
    if not args.no_plots:
        require_pillow(", or give --no-plots and draw them elsewhere with longcat bench report")
    own = Parser(add_help=False, allow_abbrev=False)
    add_own_of_run(own, whole, number)
    # What follows the words `bench run` and is not for this command itself.
    words = own.parse_known_args(args.argv[2:])[1]
    report: ResultsFile | None = None

    def keep(row: dict[str, Any], inputs: dict[str, Any]) -> None:
        nonlocal report
        if report is None:
            # Only now, for it asks the GPU, which the first process should find as it was.
            report = ResultsFile(RUN if args.comfyui is None else COMFYUI_RUN, args.output, device, inputs)
        report.add(row)
        if "help_s" in row:
            say(f"{row['name']}: {row['help_s']:.2f} s")
        else:
            say(f"{row['name']}: {row['wall_s']:.1f} s, {row['less_sampling_s']:.1f} s less sampling")

    args.output.mkdir(parents=True, exist_ok=True)
    with claimed(args.output / "results.json", f"another run is writing to {args.output}; give another --output"):
        if args.comfyui is None:
            measure(words, paths, args.output, args.runs, not args.no_text_cache, keep, args.cards)
        else:
            _in_comfyui(args, paths, device, keep)
        assert report is not None, "at least one run"
        finish(report, not args.no_plots)
    return 0


def _avatar_runs(args: argparse.Namespace) -> int:
    """Time a whole run of `longcat avatar` on a sound, and write a file of results."""
    from ..benchmark.bench import finish
    from ..benchmark.parts.avatar_run import measure
    from ..benchmark.workload import Size
    from .avatar import requested
    from .main import build_parser

    words = ["avatar", *args.words[args.words[:1] == ["--"] :]]
    asked = build_parser(words).parse_args(words)
    opened, request = requested(asked)
    if request.count < 2:
        raise LongCatError(f"{asked.audio[0]} takes one segment, and a second one is timed; give a longer sound")
    check_new_folder(args.output, "results.json")
    first, config, device = request.filled_first, opened.checkpoint.config, device_of(asked.device)
    size = Size(first.height, first.width, first.frames, 1)
    inputs = {
        "model": asked.model or "nano",
        "size": str(size),
        "tokens": size.tokens(config),
        "batch": size.batch,
        "steps": len(request.schedule_of(0)),
        "blocks": config.depth,
        "hidden_size": config.hidden_size,
        "dtype": str(dtype_of(asked.dtype, device)).removeprefix("torch."),
        "fp8": asked.fp8,
    }

    def keep(row: dict[str, Any]) -> None:
        # Only now, for it asks the GPU, which the process should find as it was.
        report = ResultsFile(AVATAR_RUN, args.output, device, inputs)
        report.add(row)
        say(f"{row['name']}: {row['wall_s']:.0f} s, of which each further segment takes {row['segment_s']:.1f} s")
        finish(report, False)

    args.output.mkdir(parents=True, exist_ok=True)
    with claimed(args.output / "results.json", f"another run is writing to {args.output}; give another --output"):
        measure(words[1:], args.output, request.voices.seconds, request.count, keep)
    return 0


def _check_in_comfyui(args: argparse.Namespace) -> None:
    """Raise LongCatError for options that say nothing to ComfyUI's server."""
    given = given_flags(args.argv)
    others = [row.flag for row in of_command("generate") if row.flag in given and row.name not in SET_IN_COMFYUI]
    if others:
        raise LongCatError(f"--comfyui cannot pass on {', '.join(others)} to the workflow; leave it out")
    if args.runs != 1 or args.cards:
        raise LongCatError("--comfyui starts one server; leave --runs and --cards out")
    if len(args.lora or []) > 1:
        raise LongCatError("--comfyui takes one --lora; leave the others out")


def _in_comfyui(
    args: argparse.Namespace,
    paths: ModelPaths,
    device: torch.device,
    keep: Callable[[dict[str, Any], dict[str, Any]], None],
) -> None:
    """Time the start of ComfyUI's server and two prompts."""
    from ..benchmark.parts.comfyui_run import rows, wanted_of
    from ..benchmark.parts.run import PROMPTS
    from ..benchmark.workload import Size
    from .generate import request_of

    request = request_of(args, PROMPTS[0]).filled(paths.defaults)
    size = Size(request.height, request.width, request.frames, 1 if request.guidance_scale == 1 else 2)
    inputs = {
        "model": args.model or "nano",
        "size": str(size),
        "batch": size.batch,
        "steps": request.steps,
        "dtype": "ComfyUI's dtype",
        "fp8": args.fp8,
    }
    lora = args.lora[0] if args.lora else None
    wanted = wanted_of(request, paths, PROMPTS, lora=lora, fp8=args.fp8, speed=args.speed or EXACT)
    python, port = args.comfyui_python, args.port
    # Kept at the end, because describing this machine takes memory of its GPU.
    for row in list(rows(args.comfyui, wanted, cpu=device.type == "cpu", python=python, port=port, said=say)):
        keep(row, inputs)


def verify(args: argparse.Namespace) -> int:
    return run_verify(args.directory)


def plan(args: argparse.Namespace) -> int:
    for name, side in zip(("height", "width"), args.size, strict=True):
        check_side(name, side)
    check_frames(args.frames)
    given = latent_frames(args.cond_frames) if args.cond_frames else 0
    if given >= latent_frames(args.frames):
        raise LongCatError(
            f"{args.frames} frames leave nothing to generate after {args.cond_frames} conditioning frames; "
            "give more --frames"
        )
    for gib in args.memory:
        if not 0 < gib <= MOST_GIB:
            raise LongCatError(f"{gib:g} GiB of memory are out of range; give a number above 0 and up to {MOST_GIB:g}")
    work = Work((1, *latent_shape(args.frames, *args.size)), not args.no_guidance, given)
    rows = plan_table(args.memory or CARDS_GIB, ModelConfig(), work, torch.bfloat16, UMT5_XXL_BYTES)
    print(markdown(("free", "bf16", "fp8"), rows))
    return 0


def backends(args: argparse.Namespace) -> int:
    # The released model's dtype and head size.
    inputs = Inputs(torch.device("cuda"), torch.bfloat16, 128, False) if torch.cuda.is_available() else None
    rows, sparse = report(inputs), sparse_report(inputs)
    width = max(len(name) for name, _, _ in (*rows, *sparse))
    for heading, found in (("attention", rows), ("sparse attention", sparse)):
        print(f"{heading}:")
        for name, available, reason in found:
            print(f"{name:<{width}}  {'yes' if available else 'no ':<3}  {reason}")
    return 0
