"""`longcat calibrate`: how sparse the attention of each head may be, on the user's own weights."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import LongCatError
from ..files.media import read_sound
from ..generate.audio import combine
from ..generate.avatar import AvatarRequest
from ..generate.calibration import check_calibration_place, write_calibration
from ..generate.opened import OpenedModel
from ..generate.options import A_GPU, GUIDANCE
from ..generate.paths import ModelPaths
from ..generate.pipeline import Pipeline
from ..generate.progress import LOADING, duration
from ..generate.request import GenerateRequest, work_of
from ..measure.calibrate import PipelineSubject, Recipe, Search, Videos, check_calibration, default_prompts
from ..measure.calibrate_avatar import SPEAKING, AvatarSubject, check_segments, shortened, videos_of
from ..measure.calibration_report import CURVE, LAYERS, TITLE, page, pictures, text
from ..measure.charts import require_pillow
from ..measure.results import command, commit, written
from ..nano.avatar.world import prompts as avatar_prompts
from ..optimize.attention import is_exact
from ..optimize.plan import Work
from ..sampling.schedules import DMD_STEPS, is_newer
from .avatar import embeddings_of, refuse_official_cache
from .console import Progress, notes_from_warnings
from .generate import print_notes, prompts_of, read_in, request_of, schedule_of, there_in
from .models import avatar_of, load_models, machine_of, paths_of
from .options import without_effect
from .pages import hold_page, prefix_of, write_page

OUTPUT = "longcat-calibration.json"
STEPS, DISTILLED_STEPS = 10, 16


def calibrate(args: argparse.Namespace) -> int:
    """`longcat calibrate`: everything is checked before a model is loaded, and the file appears whole or not at all."""
    started = time.monotonic()
    recipe = Recipe(args.budget, args.dense_steps, video=not args.no_video)
    sought = paths_of(args) if args.audio is None else avatar_of(args, 1)
    prompts = prompts_of(argparse.Namespace(prompts=args.prompt or [], prompts_file=args.prompts_file))
    if not is_exact(args.attention):
        raise LongCatError(f"--attention {args.attention} is lossy; calibrate against an exact backend, such as auto")
    if not prompts and (args.image or args.video):
        raise LongCatError("an image or a clip needs a prompt of its own; give --prompt")
    task = _videos(args, prompts, sought) if isinstance(sought, ModelPaths) else _segments(args, prompts, sought)
    output: Path = args.output or args.outputs.default(Path(OUTPUT))
    check_calibration_place(output)
    args.outputs.hold(output)
    if args.page is not None:
        require_pillow()
        hold_page(args.page, TITLE, (LAYERS, CURVE), "calibrate", args.outputs)
    device, opened = machine_of(args, sought)
    task.check(recipe, opened.checkpoint.config.patch_size)
    there = (*task.there, *((A_GPU,) if device.type == "cuda" else ()))
    print_notes([*args.outputs.notes, *without_effect(args, there), *task.notes])

    with notes_from_warnings(), args.bar as bar:
        shown = bar.plan(Search.parts(task.videos, recipe), what="video")
        search = Search(task.videos, recipe, shown)

        def load() -> Pipeline:
            shown.phase(LOADING)
            pipeline = load_models(args, opened, device, task.work, task.reads, shown.load)
            pipeline.on_phase = shown.phase
            return pipeline

        subject = task.subject(load, device, bar)
        loaded = time.monotonic()
        found = search.run(subject, [lora.path.name for lora in opened.loras])
        output = args.outputs.settled(output)
        write_calibration(output, found)
    if args.page is not None:
        prefix = prefix_of(args.page)
        made = page(found, output.name, written(found.date, command(), commit()), prefix)
        write_page(args.page, made, pictures(found), prefix)
    print(text(found))
    known = len(task.videos.prompts)
    count = "one prompt" if known == 1 else f"{known} prompts"
    took = f"in {duration(time.monotonic() - started)}, of which {duration(loaded - started)} for loading"
    print(f"{output}: budget {recipe.budget:g}, {count}, {took}")
    return 0


@dataclass(frozen=True)
class _Task:
    """What is sampled. check: raises LongCatError where it cannot be calibrated; subject: loads what samples it;
    reads: all prompts that the text encoder reads; there, notes: see `without_effect` and `print_notes`."""

    videos: Videos
    work: Work
    reads: list[str]
    there: tuple[str, ...]
    notes: list[str]
    check: Callable[[Recipe, Sequence[int]], Any]
    subject: Callable[[Callable[[], Pipeline], torch.device, Progress], PipelineSubject]


def _videos(args: argparse.Namespace, prompts: Sequence[str], paths: ModelPaths) -> _Task:
    prompts = prompts or default_prompts(paths.world, args.seed)
    requests = [_request(args, prompt).filled(paths.defaults) for prompt in prompts]
    first, videos = requests[0], Videos.of(requests)
    reads = [text for each in requests for text in read_in(each)]

    def check(recipe: Recipe, patch: Sequence[int]) -> None:
        check_calibration(videos, recipe, patch)

    def subject(load: Callable[[], Pipeline], device: torch.device, bar: Progress) -> PipelineSubject:
        return PipelineSubject(load(), requests)

    return _Task(videos, work_of(first), reads, there_in(first), first.notes(), check, subject)


def _segments(args: argparse.Namespace, prompts: Sequence[str], opened: OpenedModel) -> _Task:
    """Of an avatar, which hears --audio: the first segment of each prompt and the one behind it."""
    refuse_official_cache(args)
    if schedule_of(args) == "enhance_hf":
        raise LongCatError("--schedule enhance_hf continues clips; calibrate an avatar with base, or with --distilled")
    audio = opened.checkpoint.config.audio
    assert audio is not None, "an avatar"
    voices, newer = combine([read_sound(args.audio)]), is_newer(audio)
    known = SPEAKING if opened.paths.world is None else avatar_prompts(len(SPEAKING), args.seed)
    requests = []
    for prompt in prompts or known:
        first = _request(args, prompt)
        if newer and args.distilled and args.steps is None:
            first = replace(first, steps=DMD_STEPS)
        made = AvatarRequest(first, voices, (prompt,), audio_guidance=args.audio_guidance, schedule=first.schedule)
        requests.append(shortened(made.filled(opened.defaults)))
    request = requests[0]
    first_segment, reads = request.filled_first, [text for each in requests for text in each.reads()]
    there = *there_in(first_segment), *[GUIDANCE] * request.guided

    def check(recipe: Recipe, patch: Sequence[int]) -> None:
        check_segments(requests, recipe, patch)

    def subject(load: Callable[[], Pipeline], device: torch.device, bar: Progress) -> PipelineSubject:
        (embeddings,) = embeddings_of([request], opened, device, bar)
        return AvatarSubject(load(), requests, embeddings)

    return _Task(videos_of(requests), request.work(), reads, there, request.notes(), check, subject)


def _request(args: argparse.Namespace, prompt: str) -> GenerateRequest:
    """The request of one video, with everything exact."""
    request = request_of(args, prompt)
    usual = DISTILLED_STEPS if request.schedule == "distilled" else STEPS
    return request if request.steps is not None else replace(request, steps=usual)
