"""The `longcat` commands that make videos: generate, long, refine. PyTorch is imported when one runs.

All three check everything before a model is loaded, and their output files appear whole or not at all.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LongCatError
from .console import note, notes_from_warnings, progress
from .models import load_models, machine_of, model_settings
from .options import add_options

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ..generate.opened import OpenedModel
    from ..generate.segments import SegmentFolder

OUTPUT = "longcat.mp4"
LONG_OUTPUT = "longcat-long.mp4"


def add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", metavar="PROMPT", help="what the video shows")
    add_options(parser, "generate")


def add_long(parser: argparse.ArgumentParser) -> None:
    text = "what the video shows: one prompt for all segments, or one for each"
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help=text)
    add_options(parser, "long")


def add_refine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("video", type=Path, metavar="VIDEO", help="the finished video")
    add_options(parser, "refine")


@dataclass(frozen=True)
class _Job:
    """A checked command that writes one video: `frames` frames of height x width pixels at `fps`."""

    args: argparse.Namespace
    model: OpenedModel
    device: torch.device
    output: Path
    frames: int
    height: int
    width: int
    fps: float
    seed: int

    @classmethod
    def checked(
        cls, args: argparse.Namespace, paths: Any, output: Path, sources: Sequence[Path | None], **video: Any
    ) -> _Job:
        """Check the output file, which must not be one of `sources`, then models and machine. Raises LongCatError."""
        from ..files.media import check_output, estimate_bytes

        _check_distinct(output, *sources)
        check_output(output, estimate_bytes(output, video["frames"], video["height"], video["width"]))
        device, model = machine_of(args, paths)
        return cls(args, model, device, output, **video)

    def settings(self) -> dict[str, Any]:
        return model_settings(self.args, self.model.paths, self.device)

    def load(self, work: Any) -> Any:
        return load_models(self.args, self.model, self.device, work)

    def write(self, frames: Any) -> None:
        """Write the video. frames: uint8 [F, H, W, 3], or clips of that shape one after the other."""
        from ..files.media import write_video

        write_video(self.output, frames, self.fps)

    def report(self, started: float, details: str = "") -> None:
        """Print what was written. started: of `time.monotonic`."""
        print(
            f"{self.output}: {self.frames} frames of {self.height}x{self.width} at {self.fps:g} fps, {details}"
            f"seed {self.seed}, in {time.monotonic() - started:.1f} s"
        )


def generate(args: argparse.Namespace) -> int:
    """`longcat generate`."""
    from ..files.media import check_output, contact_sheet
    from ..generate.request import work_of

    paths = paths_of(args)
    request = request_of(args, args.prompt).filled(paths.defaults)
    if args.contact_sheet is not None:
        _check_distinct(args.contact_sheet, args.image, args.video, option="--contact-sheet")
        check_output(args.contact_sheet, 1 << 22, sheet=True)
    job = _Job.checked(
        args,
        paths,
        args.output or free_name(Path(OUTPUT)),
        (args.image, args.video),
        frames=request.frames,
        height=request.height,
        width=request.width,
        fps=request.fps,
        seed=request.seed,
    )
    _note_all(request.notes())
    started = time.monotonic()
    with notes_from_warnings():
        pipeline = job.load(work_of(request))
        with progress() as bar:
            generation = pipeline.generate(request, bar)
    job.write(generation.frames)
    if args.contact_sheet is not None:
        contact_sheet(args.contact_sheet, generation.frames, request.prompt, fps=request.fps)
    job.report(started)
    return 0


def long(args: argparse.Namespace) -> int:
    """`longcat long`: segment by segment, each kept in a folder, from which the same command resumes."""
    from dataclasses import replace

    from ..generate.long_video import LongVideoRequest, long_video, new_frames, segment_folder, spread_prompts
    from ..generate.request import work_of

    paths = paths_of(args)
    prompts = spread_prompts(prompts_of(args), args.segments)
    request = LongVideoRequest(
        request_of(args, prompts[0]), prompts, args.overlap, _schedule(args), args.hand_off
    ).filled(paths.defaults)
    output = args.output or Path(LONG_OUTPUT)
    folder = segment_folder(args.folder or output.with_name(f"{output.stem}-segments"))
    if args.output is None and output.exists() and not folder.path.exists():
        raise LongCatError(f"{output} already exists and was not made by this command; choose another with --output")
    first = request.first
    job = _Job.checked(
        args,
        paths,
        output,
        (args.image, args.video),
        frames=request.total_frames,
        height=first.height,
        width=first.width,
        fps=first.fps,
        seed=first.seed,
    )
    request = replace(request, model=job.settings())
    _note_all(first.notes())
    work = work_of(first, request.overlap)
    started, finished = time.monotonic(), []
    with notes_from_warnings(), progress() as bar:
        for segment in long_video(lambda: job.load(work), request, folder, _labeled(bar, "segment")):
            finished.append(segment)
            bar.say(segment.summary(folder.path))
    job.write(new_frames(folder, finished))
    job.report(started, f"{len(finished)} segments, ")
    return 0


def refine(args: argparse.Namespace) -> int:
    """`longcat refine`: piece by piece, kept in a folder if one is given."""
    from ..files.media import read_video
    from ..generate.refine import RefineRequest, check_video, piece_folder, refine, refine_in_folder
    from ..optimize.block_sparse import BlockSparse

    paths = paths_of(args)
    height, width = args.size or (None, None)
    full = args.sparsity == 0 or (args.sparsity is None and paths.is_nano)
    sparse = None if full else BlockSparse() if args.sparsity is None else BlockSparse(args.sparsity)
    video, fps = read_video(args.video)
    request = RefineRequest(
        args.prompt,
        args.seed,
        not args.spatial_only,
        height,
        width,
        args.steps,
        args.piece,
        args.overlap,
        fps,
        sparse,
    )
    request.check()
    check_video(video)
    folder = None if args.folder is None else piece_folder(args.folder)
    rate = 2 if request.doubled else 1
    height, width = request.size(video, paths.defaults)
    job = _Job.checked(
        args,
        paths,
        args.output or free_name(args.video.with_name(f"{args.video.stem}-refined.mp4")),
        (args.video,),
        frames=rate * len(video),
        height=height,
        width=width,
        fps=rate * fps,
        seed=request.seed,
    )
    if args.lora is None and not paths.is_nano:
        note("without --lora the model was not trained to refine; give refinement_lora.safetensors")

    def load() -> Any:
        return job.load(request.work(video, paths.defaults))

    started = time.monotonic()
    with notes_from_warnings(), progress() as bar:
        callback = _labeled(bar, "piece")

        def kept(folder: SegmentFolder) -> Iterator[np.ndarray]:
            # All pieces first: one that fails must not leave an encoder waiting.
            done = []
            pieces = refine_in_folder(load, paths.defaults, video, request, folder, job.settings(), callback)
            for number, skip, reused in pieces:
                done.append((number, skip))
                bar.say(f"piece {number + 1}: {'already in' if reused else 'finished and saved in'} {folder.path}")
            for number, skip in done:
                yield folder.frames(number, skip)

        job.write(refine(load(), video, request, callback) if folder is None else kept(folder))
    job.report(started)
    return 0


def paths_of(args: argparse.Namespace) -> Any:
    """Where the models lie that the options name."""
    from ..generate.paths import ModelPaths

    return ModelPaths.of(args.model, args.vae, args.text_encoder)


def request_of(args: argparse.Namespace, prompt: str) -> Any:
    """The request that the options describe, before defaults are filled in."""
    from ..generate.request import GenerateRequest

    height, width = _sides(args)
    return GenerateRequest(
        prompt,
        negative_prompt=args.negative_prompt,
        height=height,
        width=width,
        frames=args.frames,
        steps=args.steps,
        guidance_scale=args.guidance,
        seed=args.seed,
        schedule=_schedule(args),
        image=args.image,
        video=args.video,
        num_cond_frames=args.cond_frames,
        kv_cache=args.kv_cache,
        step_cache=args.step_cache,
        fps=args.fps,
    )


def prompts_of(args: argparse.Namespace) -> list[str]:
    """The prompts given, or those of --prompts-file. Raises LongCatError for both, or for a file without prompts."""
    if args.prompts_file is None:
        return args.prompts
    if args.prompts:
        raise LongCatError("prompts and --prompts-file exclude each other; give one of them")
    try:
        lines = args.prompts_file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise LongCatError(f"{args.prompts_file} is not UTF-8 text; save it as UTF-8, one prompt a line") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise LongCatError(f"{args.prompts_file} holds no prompts; write one a line")
    return prompts


def free_name(path: Path) -> Path:
    """`path`, or with a number if it exists: a default name must not overwrite a file that nobody named."""
    number = 1
    candidate = path
    while candidate.exists():
        number += 1
        candidate = path.with_stem(f"{path.stem}-{number}")
    return candidate


def _labeled(bar: Any, what: str) -> Callable[[int, int, Any], None]:
    """A callback of a task in parts that shows `segment 2/5` on the bar."""
    return lambda number, total, step: bar(step, f"{what} {number + 1}/{total}")


def _note_all(sentences: Sequence[str]) -> None:
    for sentence in sentences:
        note(sentence)


def _sides(args: argparse.Namespace) -> tuple[int | None, int | None]:
    if args.size is None:
        return args.height, args.width
    if args.height is not None or args.width is not None:
        raise LongCatError("--size excludes --height and --width; give one or the other")
    return args.size


def _schedule(args: argparse.Namespace) -> str | None:
    if args.distilled and args.schedule not in (None, "distilled"):
        raise LongCatError(f"--distilled and --schedule {args.schedule} exclude each other; give one of them")
    return "distilled" if args.distilled else args.schedule


def _check_distinct(output: Path, *sources: Path | None, option: str = "--output") -> None:
    if any(source is not None and output.resolve() == source.resolve() for source in sources):
        raise LongCatError(f"output {output} is the input itself; give another name to {option}")


# Name -> options, what runs, and a line of help.
TASKS = {
    "generate": (add_generate, generate, "Generate a video from a prompt, with the bundled model by default."),
    "long": (add_long, long, "Generate a long video segment by segment; run it again to resume."),
    "refine": (add_refine, refine, "Double a finished video's resolution and frame rate: the second stage."),
}
