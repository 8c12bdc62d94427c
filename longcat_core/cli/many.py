"""`longcat generate`: one video, or with --prompts-file one for each prompt, from one load of the models."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ..errors import LongCatError
from ..files.atomic import name_with
from ..files.claims import claimed
from ..files.media import VideoBeside, estimate_bytes
from ..files.media.writing import VIDEO_SUFFIXES
from ..files.places import check_new_folder, check_place, check_suffix
from ..generate.batch import Batch, record_of, requests_of, settings_of
from ..generate.pipeline import Pipeline
from ..generate.progress import SAVING, sampled
from ..generate.request import FilledRequest, work_of
from .console import Progress, note, notes_from_warnings
from .generate import OUTPUT, Task, check_distinct, counted, one, prompts_of, read_in, request_of, there_in
from .models import check_sparse_fits, paths_of
from .outputs import Outputs


def generate(args: argparse.Namespace) -> int:
    """`longcat generate`."""
    return one(args) if args.prompts_file is None else many(args)


def many(args: argparse.Namespace) -> int:
    """A video for each prompt of a file; the same command again makes those that are missing."""
    paths = paths_of(args)
    prompts = prompts_of(
        argparse.Namespace(prompts=[args.prompt] if args.prompt else [], prompts_file=args.prompts_file)
    )
    if args.contact_sheet is not None:
        raise LongCatError("--contact-sheet shows one video; leave it out with --prompts-file")
    first = request_of(args, prompts[0]).filled(paths.defaults)
    for request in requests_of(first, prompts):
        request.filled(paths.defaults)
    name = _name(args)
    _make_folder(name.parent, args.outputs)
    args.outputs.hold(record_of(name))
    shape = first.frames, first.height, first.width
    task = Task(args, paths, name, (args.image, args.video, args.prompts_file), shape, first.fps, first.seed)
    check_sparse_fits(args, first, task.model)
    first = task.fitted(first)
    requests = requests_of(first, prompts)
    batch = Batch(name, prompts, settings_of(first, *task.settings()))
    for file in (batch.record, *batch.files):
        check_distinct(file, args.image, args.video, args.prompts_file)
    missing = batch.check()
    check_place(batch.files[-1], len(missing) * estimate_bytes(name, *shape))
    task.note(first.notes(), *there_in(first))
    try:
        with notes_from_warnings(), args.bar as bar:
            _make(task, requests, batch, missing, bar)
    except BaseException:
        if batch.finished:
            note(
                f"{batch.finished} of {len(prompts)} videos are finished and kept in {name.parent}; run the same "
                "command again to make the others"
            )
        raise
    finally:
        batch.end()
    frames, height, width = shape
    videos = "one video" if len(prompts) == 1 else f"{len(prompts)} videos"
    print(
        f"{batch.files[0]}{'' if len(prompts) == 1 else f' to {batch.files[-1].name}'}: {videos} of {frames} frames of "
        f"{height}x{width} at {first.fps:g} fps, seed {first.seed}, in {time.monotonic() - task.started:.1f} s"
    )
    return 0


def _make(task: Task, requests: Sequence[FilledRequest], batch: Batch, missing: Sequence[int], bar: Progress) -> None:
    """Make the missing videos, in order; a file is there when the next video begins."""
    bar.plan([sampled(request.schedule, request.steps) for request in requests], what="video")
    pipeline: Pipeline | None = None
    for number, (request, file) in enumerate(zip(requests, batch.files, strict=True)):
        reused = number not in missing
        if not reused:
            if pipeline is None:
                read = [prompt for each in missing for prompt in read_in(requests[each])]
                pipeline = task.load(work_of(request), bar, list(dict.fromkeys(read)), request.sparse_settings)
                batch.begin()
            refusal = f"another run is writing {file}; wait for its end or give another name to --output"
            with claimed(file, refusal), VideoBeside(file, request.fps) as video:
                pipeline.generate(request, bar, on_frames=request.beginning(counted(bar, video.add)))
                bar.task.phase(SAVING)
            batch.finish(number)
        bar.task.finish(reused=reused)
        state = "already in" if reused else f"seed {request.seed}, finished and saved in"
        bar.say(f"video {number + 1} of {len(requests)}: {state} {file}")


def _name(args: argparse.Namespace) -> Path:
    """The name that all videos have with their numbers: --output itself, or one in the folder that it names."""
    given: Path | None = args.output
    if given is None:
        return name_with(args.prompts_file, "-videos", "") / OUTPUT
    if not given.suffix or given.is_dir():
        return given / OUTPUT
    check_suffix(given, VIDEO_SUFFIXES, why="; the ending selects the format, and a new folder has none in its name")
    return given


def _make_folder(folder: Path, outputs: Outputs) -> None:
    """Make the folder, and remove it at the end of the command if nothing is in it."""
    check_new_folder(folder, OUTPUT)
    for new in [place for place in (folder, *folder.parents) if not place.exists()][::-1]:
        try:
            new.mkdir(exist_ok=True)
        except OSError as error:
            raise LongCatError(f"{new} cannot be made ({error.strerror}); choose another --output") from error
        outputs.callback(_remove_if_empty, new)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
