"""`longcat calibrate`: how sparse the attention of each head may be, on the user's own weights."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

from ..errors import LongCatError
from ..generate.calibration import check_calibration_place, write_calibration
from ..generate.options import A_GPU
from ..generate.progress import LOADING, duration
from ..generate.request import GenerateRequest, work_of
from ..measure.calibrate import PipelineSubject, Recipe, Search, Videos, check_calibration, default_prompts
from ..measure.calibration_report import CURVE, LAYERS, TITLE, page, pictures, text
from ..measure.charts import require_pillow
from ..measure.results import command, commit, written
from ..optimize.attention import is_exact
from .console import notes_from_warnings
from .generate import print_notes, prompts_of, read_in, request_of, there_in
from .models import load_models, machine_of, paths_of
from .options import without_effect
from .pages import hold_page, prefix_of, write_page

OUTPUT = "longcat-calibration.json"
STEPS, DISTILLED_STEPS = 10, 16


def calibrate(args: argparse.Namespace) -> int:
    """`longcat calibrate`: everything is checked before a model is loaded, and the file appears whole or not at all."""
    started = time.monotonic()
    paths, recipe = paths_of(args), Recipe(args.budget, args.dense_steps, video=not args.no_video)
    prompts = prompts_of(argparse.Namespace(prompts=args.prompt or [], prompts_file=args.prompts_file))
    if not is_exact(args.attention):
        raise LongCatError(f"--attention {args.attention} is lossy; calibrate against an exact backend, such as auto")
    if not prompts and (args.image or args.video):
        raise LongCatError("an image or a clip needs a prompt of its own; give --prompt")
    prompts = prompts or default_prompts(paths.world, args.seed)
    requests = [_request(args, prompt).filled(paths.defaults) for prompt in prompts]
    first, videos = requests[0], Videos.of(requests)
    output: Path = args.output or args.outputs.default(Path(OUTPUT))
    check_calibration_place(output)
    args.outputs.hold(output)
    if args.page is not None:
        require_pillow()
        hold_page(args.page, TITLE, (LAYERS, CURVE), "calibrate", args.outputs)
    device, opened = machine_of(args, paths)
    check_calibration(videos, recipe, opened.checkpoint.config.patch_size)
    there = (*there_in(first), *((A_GPU,) if device.type == "cuda" else ()))
    print_notes([*args.outputs.notes, *without_effect(args, there), *first.notes()])

    with notes_from_warnings(), args.bar as bar:
        task = bar.plan(Search.parts(videos, recipe), what="video")
        search = Search(videos, recipe, task)
        task.phase(LOADING)
        pipeline = load_models(
            args, opened, device, work_of(first), [text for each in requests for text in read_in(each)]
        )
        pipeline.on_phase = task.phase
        loaded = time.monotonic()
        found = search.run(PipelineSubject(pipeline, requests), [lora.path.name for lora in opened.loras])
        output = args.outputs.settled(output)
        write_calibration(output, found)
    if args.page is not None:
        prefix = prefix_of(args.page)
        made = page(found, output.name, written(found.date, command(), commit()), prefix)
        write_page(args.page, made, pictures(found), prefix)
    print(text(found))
    count = "one prompt" if len(prompts) == 1 else f"{len(prompts)} prompts"
    took = f"in {duration(time.monotonic() - started)}, of which {duration(loaded - started)} for loading"
    print(f"{output}: budget {recipe.budget:g}, {count}, {took}")
    return 0


def _request(args: argparse.Namespace, prompt: str) -> GenerateRequest:
    """The request of one video, with everything exact."""
    request = request_of(args, prompt)
    usual = DISTILLED_STEPS if request.schedule == "distilled" else STEPS
    return request if request.steps is not None else replace(request, steps=usual)
