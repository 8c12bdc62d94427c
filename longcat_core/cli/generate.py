"""The `longcat` commands that make a video: generate with one prompt, long, refine.

All three check everything before a model is loaded, and their output files appear whole or not at all.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..errors import LongCatError
from ..files.atomic import name_with, resolved
from ..files.media import Clip, Sound, VideoBeside, check_output, check_sound, estimate_bytes
from ..files.regular import read_lines
from ..generate.long_video import Finished, LongVideoRequest, long_video, new_frames, segment_folder, spread_prompts
from ..generate.media import contact_sheet
from ..generate.opened import OpenedModel
from ..generate.options import A_GPU, GUIDANCE, MORE, of_command
from ..generate.paths import ModelPaths
from ..generate.pipeline import Pipeline
from ..generate.progress import LOADING, SAVING, WRITING, sampled, segments_of
from ..generate.refine import RefineRequest, footage_of, piece_folder, refine_in_folder
from ..generate.refine import refine as refined
from ..generate.request import FilledRequest, GenerateRequest, require_filled, work_of
from ..generate.segment_folder import SegmentFolder
from ..generate.speed_fit import Loaded, loading_notes
from ..generate.speeds import REFINE
from ..optimize.block_sparse import BlockSparse
from ..optimize.plan import Work
from ..optimize.requirement import Inputs
from ..optimize.sparse.choose import in_use
from ..optimize.sparse.settings import Sparse
from .console import Progress, note, notes_from_warnings
from .models import check_sparse_fits, load_models, machine_of, model_settings, paths_of, sparse_of, with_speed
from .options import given_flags, without_effect

OUTPUT = "longcat.mp4"
LONG_OUTPUT = "longcat-long.mp4"
# Options that a request takes under the same name.
SAME_NAME = (
    *("negative_prompt", "frames", "steps", "seed", "image", "video", "fps"),
    *("guidance_until", "kv_cache", "step_cache", "sparse_kernel", "speed"),
)

# Takes the next frames of the video.
Put = Callable[[Clip], None]
PutFrames = Callable[[np.ndarray], None]
Made = TypeVar("Made")


class Task:
    """A checked command that writes one video of `shape`: frames, height and width."""

    def __init__(
        self,
        args: argparse.Namespace,
        paths: ModelPaths | OpenedModel,
        output: Path,
        sources: Sequence[Path | None],
        shape: tuple[int, int, int],
        fps: float,
        seed: int,
        sound: Path | Sound | None = None,
    ) -> None:
        """Check and hold the output file, which must not be one of `sources`; check models and machine.

        paths: of the model, or the opened one. sound: what the output has too, that of a video or samples. Raises
        LongCatError.
        """
        check_distinct(output, *sources)
        check_output(output, estimate_bytes(output, *shape))
        args.outputs.hold(output)
        self.args, self.output, self.shape, self.fps, self.seed = args, output, shape, fps, seed
        self.sound = sound
        self.device, self.model = machine_of(args, paths)
        self.started = time.monotonic()

    def speeded(self, schedule: str) -> Loaded | None:
        """Choose the model's options that --speed decides; how the model will be loaded, or None without a speed."""
        given = given_flags(self.args.argv)
        self.args, loaded = with_speed(self.args, given, schedule, self.device, self.model)
        return loaded

    def fitted(self, request: FilledRequest) -> FilledRequest:
        """The request with what --speed can do on this machine."""
        loaded = self.speeded(request.schedule)
        defaults = self.model.defaults
        return request if loaded is None else request.filled(replace(defaults, loaded=loaded))

    def settings(self) -> tuple[dict[str, Any], dict[str, str]]:
        return model_settings(self.args, self.model.paths, self.device)

    def note(self, sentences: Iterable[str], *there: str) -> None:
        """Print notes about the request and about options without effect. there: what it has; see `Option.needs`."""
        there = (*there, A_GPU) if self.device.type == "cuda" else there
        print_notes([*self.args.outputs.notes, *without_effect(self.args, there), *sentences])

    def load(self, work: Work, bar: Progress, prompts: Sequence[str], sparse: Sparse | None = None) -> Pipeline:
        """The pipeline. prompts: all that it will read. sparse: what the request asks for; its kernel is said."""
        bar.task.phase(LOADING)
        pipeline = load_models(self.args, self.model, self.device, work, prompts, bar.task.load)
        if sparse is not None:
            inputs = Inputs(self.device, pipeline.model.compute_dtype, pipeline.model.config.head_dim, False)
            note(f"sparse attention: {in_use(sparse, inputs)}")
        pipeline.on_phase = lambda name: bar.task.phase(name)
        return pipeline

    def as_finished(
        self, folder: SegmentFolder, segments: Iterable[Finished], into: list[Finished], frames: Iterator[np.ndarray]
    ) -> Iterator[Clip]:
        """What reads the clip of each segment once it is finished. frames: reads those of `into`, which gets it."""
        for segment in segments:
            if not into:
                self._name_take(folder)
            into.append(segment)
            yield partial(next, frames)

    def _name_take(self, folder: SegmentFolder) -> None:
        """Give the output the name of the take, unless the user named it or the take is the first one."""
        if self.args.output is None and folder.take.path != folder.path:
            name = name_with(self.output, f"-{folder.take.path.name}")
            self.output = self.args.outputs.default(name, new=False)

    def run(self, make: Callable[[Progress, Put], Made]) -> Made:
        """Write the clips that `make` puts, while it goes on; returns what it returns."""

        def name() -> Path:
            self.output = self.args.outputs.settled(self.output)
            return self.output

        with notes_from_warnings(), self.args.bar as bar:
            with VideoBeside(name, self.fps, self.sound) as video:
                made = make(bar, video.add)
            bar.task.worked_beside(WRITING, video.seconds)
        return made

    def run_parts(self, make: Callable[[Progress], Iterable[Clip]]) -> None:
        """Write the clips that `make` returns, while later ones are made."""

        def put_all(bar: Progress, put: Put) -> None:
            for clip in make(bar):
                put(clip)

        self.run(put_all)

    def report(self, details: str = "") -> int:
        """Print what was written; returns the exit code."""
        frames, height, width = self.shape
        print(
            f"{self.output}: {frames} frames of {height}x{width} at {self.fps:g} fps, {details}seed {self.seed}, "
            f"in {time.monotonic() - self.started:.1f} s"
        )
        return 0


def one(args: argparse.Namespace) -> int:
    """`longcat generate` with one prompt."""
    paths = paths_of(args)
    if args.prompt is None:
        raise LongCatError('a PROMPT is missing; say what the video shows, such as "a red circle moves right"')
    request = request_of(args, args.prompt).filled(paths.defaults)
    if args.contact_sheet is not None:
        check_distinct(args.contact_sheet, args.image, args.video, option="--contact-sheet")
        check_output(args.contact_sheet, 1 << 22, sheet=True)
        args.outputs.hold(args.contact_sheet, "--contact-sheet")
    shape = request.frames, request.height, request.width
    output = args.output or args.outputs.default(Path(OUTPUT))
    task = Task(args, paths, output, (args.image, args.video), shape, request.fps, request.seed)
    check_sparse_fits(args, request, task.model)
    request = task.fitted(request)
    task.note(request.notes(), *there_in(request))

    def make(bar: Progress, put: Put) -> np.ndarray:
        bar.plan([sampled(request.schedule, request.steps)])
        pipeline = task.load(work_of(request), bar, read_in(request), request.sparse_settings)
        made = pipeline.generate(request, bar, on_frames=request.beginning(counted(bar, put))).frames
        bar.task.finish()
        bar.task.phase(SAVING)
        return request.begun(made)

    frames = task.run(make)
    if args.contact_sheet is not None:
        contact_sheet(args.contact_sheet, frames, request.prompt, fps=request.fps)
    return task.report()


def long(args: argparse.Namespace) -> int:
    """`longcat long`: segment by segment, each kept in a folder, from which the same command resumes."""
    paths = paths_of(args)
    prompts = spread_prompts(prompts_of(args), args.segments)
    request = LongVideoRequest(
        request_of(args, prompts[0]), prompts, args.overlap, schedule_of(args), args.hand_off
    ).filled(paths.defaults)
    first = require_filled(request.first)
    shape = request.total_frames, first.height, first.width
    output, folder = kept(args, LONG_OUTPUT, shape)
    task = Task(args, paths, output, (args.image, args.video), shape, first.fps, first.seed)
    check_sparse_fits(args, first, task.model)
    first = task.fitted(first)
    model, lossy = task.settings()
    request = replace(request, first=first, model=model, lossy=lossy)
    task.note(first.notes(), *there_in(first), *(MORE for _ in prompts[1:]))
    work = work_of(first, request.overlap)
    finished: list[Finished] = []
    read = [*prompts, *read_in(first)]

    def segments(bar: Progress) -> Iterator[Clip]:
        bar.plan(segments_of(request), what="segment")
        folder.say = bar.say

        def load() -> Pipeline:
            return task.load(work, bar, read, first.sparse_settings)

        done = reported(long_video(load, request, folder, steps_of(bar)), folder, bar)
        return task.as_finished(folder, done, finished, whole())

    def whole() -> Iterator[np.ndarray]:
        frames = new_frames(folder, finished)
        yield first.begun(next(frames))
        yield from frames

    task.run_parts(segments)
    return task.report(in_segments(finished))


def kept(args: argparse.Namespace, name: str, shape: tuple[int, int, int]) -> tuple[Path, SegmentFolder]:
    """The output of a video in segments, and their folder, checked. name: of the output by default."""
    # The same command again goes on, so the default name may be there already.
    output = args.output or args.outputs.default(Path(name), new=False)
    folder = segment_folder(args.folder or name_with(output, "-segments", ""), args.lossy_change)
    _check_folder(output, folder, shape)
    if args.output is None and output.exists() and not folder.path.exists():
        raise LongCatError(f"{output} already exists and was not made by this command; choose another with --output")
    return output, folder


def in_segments(finished: Sequence[Finished]) -> str:
    """How many segments a video has, for its report."""
    return "one segment, " if len(finished) == 1 else f"{len(finished)} segments, "


def reported(segments: Iterable[Finished], folder: SegmentFolder, bar: Progress) -> Iterator[Finished]:
    """The segments, each said and counted once it is finished; then the file is saved."""
    for segment in segments:
        yield segment
        bar.task.finish(reused=segment.reused)
        bar.say(segment.summary(folder.path))
    bar.task.phase(SAVING)


def refine(args: argparse.Namespace) -> int:
    """`longcat refine`: piece by piece, kept in a folder if one is given."""
    paths = paths_of(args)
    full = args.sparsity == 0 or (args.sparsity is None and paths.is_nano)
    sparse = None if full else BlockSparse() if args.sparsity is None else BlockSparse(args.sparsity)
    height, width = args.size or (None, None)
    request = RefineRequest(
        *(args.prompt, args.seed, not args.spatial_only, height, width, args.steps, args.piece, args.overlap),
        block_sparse=sparse,
    )
    request.check()
    video = footage_of(args.video)
    assert video.fps is not None, "a file has a rate"
    request = replace(request, fps=video.fps)
    folder = None if args.folder is None else piece_folder(args.folder, args.lossy_change)
    output = args.output or args.outputs.default(name_with(args.video, "-refined", ".mp4"))
    shape = request.factor * video.frames, *request.size(video, paths.defaults)
    if folder is not None:
        _check_folder(output, folder, shape)
    # Copied if possible; otherwise a note says that it is left out or coded as AAC.
    sound, said = check_sound(args.video, output.suffix.lower()) if video.has_sound else (None, "")
    task = Task(args, paths, output, (args.video,), shape, request.factor * request.fps, request.seed, sound)
    loaded = task.speeded(REFINE)
    notes = [] if loaded is None else loading_notes(args.speed, REFINE, loaded)
    task.note([*request.notes(video, paths.defaults), *filter(None, [said]), *notes], MORE)
    video.check()
    if args.lora is None and not paths.is_nano:
        note("without --lora the model was not trained to refine; give refinement_lora.safetensors")

    def load(bar: Progress) -> Pipeline:
        return task.load(request.work(video, paths.defaults), bar, [args.prompt])

    def planned(bar: Progress) -> Callable[[int, int, Any], None]:
        bar.plan([sampled("refine", request.steps)] * len(request.pieces(video)), what="piece")
        return steps_of(bar)

    def in_folder(folder: SegmentFolder, bar: Progress) -> Iterator[Clip]:
        callback, (model, lossy), folder.say = planned(bar), task.settings(), bar.say
        pieces = refine_in_folder(lambda: load(bar), paths.defaults, video, request, folder, model, callback, lossy)
        for number, skip, reused in pieces:
            yield partial(folder.frames, number, skip)
            bar.task.finish(reused=reused)
            bar.say(f"piece {number + 1}: {'already in' if reused else 'finished and saved in'} {folder.where(number)}")
        bar.task.phase(SAVING)

    def written(bar: Progress) -> Iterator[np.ndarray]:
        callback = planned(bar)
        for frames in refined(load(bar), video, request, callback):
            bar.task.finish()
            yield frames

    task.run_parts(written if folder is None else lambda bar: in_folder(folder, bar))
    return task.report()


def request_of(args: argparse.Namespace, prompt: str) -> GenerateRequest:
    """The request that the options describe, before defaults are filled in; what a command lacks has its default."""
    usual = {row.name: None if row.filled else row.default for row in of_command("generate")}
    args = argparse.Namespace(**(usual | vars(args)))
    height, width = args.size or (args.height, args.width)
    if args.size is not None and (args.height is not None or args.width is not None):
        raise LongCatError("--size excludes --height and --width; give one or the other")
    return GenerateRequest(
        prompt,
        height=height,
        width=width,
        guidance_scale=args.guidance,
        schedule=schedule_of(args),
        num_cond_frames=args.cond_frames,
        sparse=sparse_of(args),
        **{name: getattr(args, name) for name in SAME_NAME},
    )


def prompts_of(args: argparse.Namespace) -> list[str]:
    """The prompts given, or those of --prompts-file. Raises LongCatError for both, or for a file without prompts."""
    if args.prompts_file is None:
        return list(args.prompts)
    if args.prompts:
        raise LongCatError("prompts and --prompts-file exclude each other; give one of them")
    prompts = read_lines(args.prompts_file)
    if not prompts:
        raise LongCatError(f"{args.prompts_file} holds no prompts; write one a line")
    return prompts


def there_in(request: FilledRequest) -> tuple[str, ...]:
    """What a filled request has that options work on; see `Option.needs`."""
    found = {GUIDANCE: request.guidance_scale != 1, "sparse": request.sparse, "step_cache": request.step_cache}
    return tuple(name for name, there in found.items() if there)


def read_in(request: FilledRequest) -> list[str]:
    """The prompts that the text encoder reads for a filled request."""
    return [request.prompt, *([request.negative_prompt] if request.guidance_scale != 1 else [])]


def counted(bar: Progress, put: PutFrames) -> PutFrames:
    """`put`, with what it takes counted by the bar."""

    def add(frames: np.ndarray) -> None:
        bar.task.decoded(len(frames))
        put(frames)

    return add


def print_notes(sentences: Iterable[str]) -> None:
    for sentence in sentences:
        note(sentence)


def steps_of(bar: Progress) -> Callable[[int, int, Any], None]:
    """A callback of a task in parts."""
    return lambda number, total, step: bar(step)


def schedule_of(args: argparse.Namespace) -> str | None:
    if args.distilled and args.schedule not in (None, "distilled"):
        raise LongCatError(f"--distilled and --schedule {args.schedule} exclude each other; give one of them")
    return "distilled" if args.distilled else args.schedule


def _check_folder(output: Path, folder: SegmentFolder, shape: tuple[int, int, int]) -> None:
    if resolved(output) == resolved(folder.path):
        raise LongCatError(f"output {output} and --folder {folder.path} are the same; give another name to one")
    # Lossless frames take about half of what their pixels do in memory.
    folder.check_place(2 * math.prod(shape))


def check_distinct(output: Path, *sources: Path | None, option: str = "--output") -> None:
    if any(source is not None and resolved(output) == resolved(source) for source in sources):
        raise LongCatError(f"output {output} is the input itself; give another name to {option}")
