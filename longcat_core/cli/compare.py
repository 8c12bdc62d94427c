"""`longcat compare`: two or more settings at the same seeds, and the noise floor."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import LongCatError
from ..files.media import estimate_bytes, write_video
from ..files.places import check_place
from ..generate.progress import LOADING
from ..generate.request import check_seed
from ..generate.segments import Segment
from ..measure.charts import fidelity_plot, side_by_side
from ..measure.clock import clean_up, is_out_of_memory, synchronize
from ..measure.fidelity import FLOOR, Fidelity, Setting, described, distance, other_kernel, picks
from ..measure.fidelity import text as fidelity_text
from ..measure.results import ResultsFile, written
from ..optimize import attention as backends
from ..sampling.sampler import Interrupted, Step
from .console import Progress, notes_from_warnings
from .generate import print_notes, prompts_of
from .models import dtype_of
from .pages import hold_page, prefix_of, write_page
from .subjects import Heard, Subject
from .versus import Side, by_model, load, sides_of, switch, without_effect_in

OUTPUT = "longcat-compare"
REPORT, PLOT, SIDE_BY_SIDE = "report.md", "plot.png", "side-by-side.png"
TITLE = "# What an option costs"
MAX_SEEDS = 1000
ABOUT = """\
Every setting renders the same seeds, and each video is compared with that of A, frame by frame, to show what the option
changes. A score of a single video does not show that, since a different video may look as good. Two correct runs differ
too, because kernels round differently and sampling amplifies that. How much they differ is the noise floor."""
SPOKEN = """\
A video is the first segment of an avatar's video and the second one, which begins at frame {joins[0]} and sees the
first frame and the last {overlap} frames of the first segment. Every setting, and the noise floor too, continues its
own first segment, as it does for a user. So the second segment shows what a setting changes there, and also how far its
first segment had drifted from that of A. Frames that both segments have count once, as those of the first one."""


def compare(args: argparse.Namespace) -> int:
    """`longcat compare`: everything is checked before a model is loaded, and files appear whole or not at all."""
    prompts = prompts_of(args)
    if not prompts:
        raise LongCatError('a PROMPT is missing; say what the video shows, such as "a red circle moves right"')
    if not 1 <= args.seeds <= MAX_SEEDS:
        raise LongCatError(f"{args.seeds} seeds are out of range; give 1 to {MAX_SEEDS}")
    check_seed(args.seed + args.seeds - 1)
    sides = sides_of(args, prompts[0])
    first = sides[0]
    seeds = range(args.seed, args.seed + args.seeds)
    videos = [(prompt, seed) for prompt in prompts for seed in seeds]
    for video in videos:
        first.subject.at(*video).filled(first.opened.defaults)
    _check_floor(args)
    folder = _check_output(args, first.subject, len(videos) * (len(sides) + 1))
    notes = [*args.outputs.notes, *without_effect_in(sides)]
    print_notes(dict.fromkeys([*notes, *(sentence for side in sides for sentence in side.subject.notes())]))

    with notes_from_warnings(), args.bar as bar:
        fidelity = _Run(sides, videos, folder, bar).compare()
    _write(fidelity, args, first, prompts, folder)
    for setting in fidelity.others:
        faster = fidelity.faster(setting)
        speed = "" if faster is None else f" {faster:.2f} times as fast."
        print(f"{setting.title}. {fidelity.verdict(setting)}{speed}")
    print(f"{folder}: {REPORT}, {PLOT}, {SIDE_BY_SIDE}, {len(videos) * (1 + len(fidelity.compared))} videos")
    return 0


def _check_floor(args: argparse.Namespace) -> None:
    if args.floor in ("auto", "off"):
        return
    backends.check(args.floor)
    for option, name in (("--floor", args.floor), ("--attention", args.attention)):
        if not backends.is_exact(name):
            raise LongCatError(
                f"{option} {name} is lossy; the noise floor takes two exact kernels, so name another or --floor off"
            )
    if args.floor == args.attention:
        raise LongCatError(f"--floor {args.floor} is A's own attention; name another one, or leave it out")


def _check_output(args: argparse.Namespace, subject: Subject, videos: int) -> Path:
    folder: Path = args.output or args.outputs.default(Path(OUTPUT))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LongCatError(f"{folder} already exists and is not empty; choose another with --output")
    # The folder is created when there is something to put into it; until then its name is checked as if of a file.
    probe = folder / "A-1.mkv" if folder.is_dir() else folder
    shape = subject.frames, subject.first.height, subject.first.width
    check_place(probe, videos * estimate_bytes(folder / "A-1.mkv", *shape))
    args.outputs.hold(probe)
    if args.page is not None:
        hold_page(args.page, TITLE, (PLOT, SIDE_BY_SIDE), "compare", args.outputs)
    return folder


# --- running ---------------------------------------------------------------------------------------------------------


class _Run:
    """Runs all settings. Those that can share a loaded model take turns, video by video, so that a machine that slows
    down for a while slows all of them. videos: prompt and seed of each."""

    def __init__(self, sides: Sequence[Side], videos: Sequence[tuple[str, int]], folder: Path, bar: Progress) -> None:
        self.sides, self.videos, self.folder, self.bar = sides, videos, folder, bar
        subject = sides[0].subject
        self.given = subject.first.cond_frames
        self.picks = picks(subject.frames, self.given)
        self.settings = {side.name: Setting(side.name, side.options) for side in sides}
        self.no_floor = ""
        # The only reference to the loaded model, and what it hears.
        self.pipeline: Any = None
        self.heard: Heard = {}
        # Videos of A, with which the others are compared.
        self.frames: list[np.ndarray] = []

    def compare(self) -> Fidelity:
        first = self.sides[0]
        groups = by_model(self.sides)
        for group in groups:
            self._load(group)
            if first in group:
                group[1:1] = self._floor(first)
                self._plan(groups)
            self._run(group)
        self.pipeline = None
        reference, *others = (self.settings[side.name] for side in self.sides)
        subject, request = first.subject, first.request
        size, dtype = (subject.frames, request.height, request.width), dtype_of(first.args.dtype, first.device)
        what = described(
            len(self.videos),
            size,
            request.steps,
            request.guidance_scale,
            first.device,
            dtype,
            subject.audio_guidance,
            1 + len(subject.joins),
        )
        floor = self.settings.get(FLOOR)
        return Fidelity(reference, others, floor, self.no_floor, what, self.picks, joins=subject.joins)

    def _plan(self, groups: Sequence[Sequence[Side]]) -> None:
        """One bar for all videos of all settings, in the order in which they are made."""
        sides = [side for group in groups for _ in self.videos for side in group]
        parts = [part for side in sides for part in side.subject.parts(side.name)]
        self.bar.plan(parts, what="video" if len(parts) == len(sides) else "segment")

    def _load(self, group: Sequence[Side]) -> None:
        side = group[0]
        if self.pipeline is not None:
            # Two models at once may not fit.
            self.pipeline = None
            clean_up(side.device)
        self.heard = side.subject.hear([seed for _, seed in self.videos], side.opened, side.device, self.bar)
        self.bar.task.phase(LOADING)
        prompts = [prompt for prompt, _ in self.videos]
        self.pipeline = load(group, prompts=prompts, on_load=self.bar.task.load)
        self.pipeline.on_phase = lambda name: self.bar.task.phase(name)

    def _floor(self, side: Side) -> list[Side]:
        """A with another exact kernel, or nothing if this machine has none; `no_floor` then has the reason."""
        kernel, own = side.args.floor, side.args.attention
        if kernel == "off":
            self.no_floor = "it was not asked for"
            return []
        if not backends.is_exact(own):
            self.no_floor = f"the attention of A's speed, {own}, is lossy"
            return []
        dtype = dtype_of(side.args.dtype, side.device)
        inputs = backends.Inputs(side.device, dtype, self.pipeline.model.config.head_dim, False)
        if kernel == "auto":
            try:
                kernel = other_kernel(own, inputs)
            except LongCatError as error:
                self.no_floor = str(error)
                return []
        elif backends.resolve(kernel, inputs).name == backends.resolve(own, inputs).name:
            raise LongCatError(f"--floor {kernel} is the backend that A runs with; name another one, or leave it out")
        self.settings[FLOOR] = Setting(FLOOR, f"attention {kernel}")
        args = argparse.Namespace(**{**vars(side.args), "attention": kernel})
        return [replace(side, name=FLOOR, args=args)]

    def _run(self, group: list[Side]) -> None:
        for side in group:
            if side.name != FLOOR:
                self.settings[side.name].first_s = self._first_step(side)
        for i in range(len(self.videos)):
            for side in tuple(group):
                try:
                    self._video(side, i)
                except (MemoryError, RuntimeError) as error:
                    # The other kernel may need more memory than there is; the comparison can do without it.
                    if side.name != FLOOR or not is_out_of_memory(error):
                        raise
                    group.remove(side)
                    self.bar.task.drop(FLOOR)
                    del self.settings[FLOOR]
                    self.no_floor = f"the other exact kernel, {side.args.attention}, ran out of memory"

    def _subject(self, side: Side, i: int) -> Subject:
        """Video `i` of a setting, which the loaded model is ready for."""
        switch(self.pipeline, side)
        return side.subject.at(*self.videos[i])

    def _video(self, side: Side, i: int) -> None:
        setting, subject = self.settings[side.name], self._subject(side, i)
        clock, shown = _Clock(self.bar, side.device), []
        before: Segment | None = None
        for number in range(1 + len(subject.joins)):
            if before is not None:
                self.bar.task.finish()
            clock.begin()
            # Each setting continues its own segment, as it would for a user.
            before = subject.segment(self.pipeline, number, self.heard, before, clock)
            shown.append(subject.new(number, before.frames))
        frames = np.concatenate(shown)
        if side.name != FLOOR:
            setting.seconds.append(clock.seconds)
        setting.computed.append(clock.computed)
        setting.steps = clock.steps
        if i == 0:
            setting.shots = frames[self.picks]
        if side is self.sides[0]:
            self.frames.append(frames)
        else:
            setting.distances.append(distance(frames, self.frames[i], self.given, side.device))
        self.folder.mkdir(exist_ok=True)
        name = f"{side.name.replace(' ', '-')}-{i + 1}.mkv"
        write_video(self.folder / name, frames, subject.first.fps, subject.track)
        self.bar.task.finish()

    def _first_step(self, side: Side) -> float:
        """Seconds until one step of each segment is done, so that compiling and choosing kernels does not count in the
        samplings."""

        def stop(_: Step) -> None:
            synchronize(side.device)
            raise Interrupted

        started, subject = time.perf_counter(), self._subject(side, 0)
        for number in range(1 + len(subject.joins)):
            with suppress(Interrupted):
                subject.segment(self.pipeline, number, self.heard, None, stop)
        return time.perf_counter() - started


class _Clock:
    """Callback of a video's samplings. seconds: up to the last step of each, with the prompt's encoding; computed: the
    work that was not skipped, in steps, of which there are `steps`."""

    def __init__(self, bar: Progress, device: torch.device) -> None:
        self.bar, self.device = bar, device
        self.started = self.seconds = self.computed = 0.0
        self.steps = 0

    def begin(self) -> None:
        self.started = time.perf_counter()

    def __call__(self, step: Step) -> None:
        self.computed += step.computed
        if step.index == step.total - 1:
            synchronize(self.device)
            self.seconds += time.perf_counter() - self.started
            self.steps += step.total
        self.bar(step)


# --- writing ---------------------------------------------------------------------------------------------------------


def _write(fidelity: Fidelity, args: argparse.Namespace, first: Side, prompts: Sequence[str], folder: Path) -> None:
    request, subject = first.request, first.subject
    size = f"{request.height}x{request.width}"
    inputs: dict[str, Any] = {"prompts": list(dict.fromkeys(prompts)), "seed": args.seed, "seeds": args.seeds}
    inputs |= {"size": size, "frames": subject.frames, "given": request.cond_frames, "no_floor": fidelity.no_floor}
    if subject.track is not None:
        inputs |= {"sound": str(args.audio[0]), "joins": subject.joins, "overlap": subject.overlap}
    report = ResultsFile("fidelity", folder, first.device, inputs, name=Path(REPORT).stem)
    for setting in (fidelity.reference, *fidelity.compared):
        row = setting.as_row(fidelity.joins)
        if setting in fidelity.others:
            row |= {"verdict": fidelity.verdict(setting), "times_as_fast": fidelity.faster(setting)}
        report.rows.append(row)
    pictures = {PLOT: fidelity_plot(fidelity), SIDE_BY_SIDE: side_by_side(fidelity)}
    write_page(folder / REPORT, _page(fidelity, report.content, ""), pictures)
    if args.page is not None:
        prefix = prefix_of(args.page)
        write_page(args.page, _page(fidelity, report.content, prefix), pictures, prefix)
    # Last, because its presence says that everything is there.
    report.write()


def _page(fidelity: Fidelity, content: dict[str, Any], prefix: str) -> str:
    inputs = content["inputs"]
    seeds = f"seed {inputs['seed']}" if inputs["seeds"] == 1 else f"{inputs['seeds']} seeds from {inputs['seed']} on"
    prompts = "\n".join(f"- {prompt}" for prompt in inputs["prompts"])
    spoken = SPOKEN.format(**inputs) if inputs.get("joins") else ""
    parts = (
        TITLE,
        ABOUT,
        *filter(None, [spoken]),
        written(content["date"], content["command"], content["commit"]),
        fidelity_text(fidelity),
        "Seconds are those of the fastest video's whole sampling, with the prompt's encoding. A first step, with any "
        "compiling, runs before and is listed separately. Settings of one model take turns; if something else keeps "
        "the machine busy, the number of computed steps is the better measure. A step without guidance counts as its "
        "share of the evaluations: a half, or a third where the two scales of an avatar differ.",
        f"![PSNR and SSIM of every frame]({prefix}{PLOT})",
        f"Prompts, {seeds}:\n\n{prompts}",
        f"The first prompt, side by side:\n\n![Frames and differences]({prefix}{SIDE_BY_SIDE})",
    )
    return "\n\n".join(parts) + "\n"
