"""The `longcat` commands about small models and their worlds: score-nano, lesson-nano, train-nano."""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from ..errors import LongCatError
from ..files.places import check_place, check_suffix
from ..generate.paths import NANO_WEIGHTS
from ..generate.pipeline import Pipeline
from ..generate.progress import LOADING, sampled
from ..generate.request import FilledRequest
from ..measure.clock import clean_up
from ..measure.fidelity import psnr
from ..measure.results import ResultsFile, aligned, markdown
from ..nano.adherence import LESSON_JUDGE, Judge, batch_of, generate_batch, judge_of, measure
from ..nano.lesson import write_lesson
from ..optimize.requirement import Inputs
from ..optimize.sparse.choose import in_use
from ..sampling.sampler import Step
from .console import Progress, note, notes_from_warnings
from .generate import print_notes
from .models import device_of, paths_of
from .versus import Side, by_model, load, sides_of, switch, without_effect_in


def score(args: argparse.Namespace) -> int:
    """`longcat score-nano`: everything is checked before a model is loaded."""
    if args.prompts < 2:
        raise LongCatError(f"{args.prompts} prompts cannot be shuffled for the control; ask for at least 2")
    if args.avatar:
        return score_avatar(args)
    paths = paths_of(args)
    paths.check()
    world = paths.world
    if world is None:
        raise LongCatError(
            f"{paths.model} knows no procedural world, so its videos cannot be scored; give a folder that longcat "
            "train-nano wrote, or leave out --model"
        )
    if args.lesson and not paths.is_nano:
        raise LongCatError("--lesson has prompts for the bundled model; leave out --lesson or --model")
    judge = LESSON_JUDGE if args.lesson else judge_of(world.world)
    sides = sides_of(args, judge.prompts(1)[0][0])
    if args.output is not None:
        check_suffix(args.output, (".json",))
        check_place(args.output, 1 << 16)
        args.outputs.hold(args.output)
    requests = [side.request for side in sides]
    of_requests = (sentence for request in requests for sentence in request.notes())
    print_notes(dict.fromkeys([*args.outputs.notes, *without_effect_in(sides), *of_requests]))
    results = None
    if args.output is not None:
        first, batch = requests[0], batch_of(requests)
        inputs = {"world": world.world, "model": str(args.model or ""), "lesson": args.lesson, "prompts": args.prompts}
        inputs |= {"size": f"{first.height}x{first.width}", "frames": first.frames, "batch": batch}
        results = ResultsFile("adherence", args.output.parent, sides[0].device, inputs, name=args.output.stem)
    with notes_from_warnings(), args.bar as bar:
        table = _Scoring(sides, judge, args.prompts, results, bar).run()
    if len(sides) > 1:
        print(f"\n{table}")
    return 0


class _Scoring:
    """Scores all settings, those that share a loaded model one after the other."""

    def __init__(
        self, sides: Sequence[Side], judge: Judge, count: int, results: ResultsFile | None, bar: Progress
    ) -> None:
        self.sides, self.judge, self.count, self.results, self.bar = sides, judge, count, results, bar
        self.batch = min(batch_of([side.request for side in sides]), count)
        # Videos of the first setting, with which those of the others are compared.
        self.videos: dict[int, np.ndarray] = {}
        self.table: dict[str, list[str]] = {}

    def run(self) -> str:
        """A table with a row for each setting."""
        groups, batches = by_model(self.sides), math.ceil(self.count / self.batch)
        order = [side for group in groups for side in group for _ in range(batches)]
        parts = [sampled(side.request.schedule, side.request.steps, side.name) for side in order]
        self.bar.plan(parts, what="video" if self.batch == 1 else "round")
        for group in groups:
            self.bar.task.phase(LOADING)
            pipeline = load(group, self.batch)
            for side in group:
                switch(pipeline, side)
                self._score(pipeline, side)
            del pipeline
            clean_up(group[0].device)
        header = ["setting", *self.judge.attributes, "all", "control", "PSNR", "steps", "seconds"]
        return aligned(markdown(header, [self.table[side.name] for side in self.sides]))

    def _stepped(self, step: Step) -> None:
        self.bar(step)
        if step.index == step.total - 1:
            self.bar.task.finish()

    def _score(self, pipeline: Pipeline, side: Side) -> None:
        request, network = side.request, pipeline.model
        if request.sparse_settings is not None:
            inputs = Inputs(side.device, network.compute_dtype, network.config.head_dim, False)
            note(f"sparse attention: {in_use(request.sparse_settings, inputs)}")
        if side.device.type == "cuda":
            self._warm_up(pipeline, request)
        decibels: dict[int, float] = {}

        def each(number: int, video: np.ndarray) -> None:
            if side is not self.sides[0]:
                error = video.astype(np.float32) - self.videos[number]
                decibels[number] = psnr(float(np.square(error).mean(dtype=np.float64)))
            elif len(self.sides) > 1:
                self.videos[number] = video

        found = measure(pipeline, self.count, request, self.judge, self.batch, each, self._stepped)
        title = f"{side.name}: {side.options}" if side.options else side.name
        first = f"{title}: " if len(self.sides) > 1 else ""
        self.bar.say(
            f"{first}{self.count} fresh prompts, {request.steps} steps of which {found.computed:.1f} are computed, "
            f"guidance {request.guidance_scale:g}, {found.seconds:.0f} s"
        )
        for kind in self.judge.attributes:
            right, total = found.right[kind], found.total[kind]
            self.bar.say(f"{kind:12} {right:4d} of {total:4d}  {right / total:6.1%}")
        self.bar.say(f"{'all':12} {found.right.total():4d} of {found.total.total():4d}  {found.fraction:6.1%}")
        self.bar.say(f"captions shuffled (control)  {found.control:6.1%}")
        middle = statistics.median(decibels.values()) if decibels else None
        shares = [found.right[kind] / found.total[kind] for kind in self.judge.attributes]
        cells = [f"{share:.1%}" for share in (*shares, found.fraction, found.control)]
        same = "-" if middle is None else "the same" if math.isinf(middle) else f"{middle:.1f} dB"
        self.table[side.name] = [title, *cells, same, f"{found.computed:.1f}", f"{found.seconds:.0f}"]
        if self.results is not None:
            self.results.add(
                {
                    "setting": side.name,
                    "options": side.options,
                    "right": {kind: found.right[kind] for kind in self.judge.attributes},
                    "total": {kind: found.total[kind] for kind in self.judge.attributes},
                    "adherence": found.fraction,
                    "control": found.control,
                    "psnr_db": middle,
                    "each_psnr_db": [decibels[number] for number in sorted(decibels)],
                    "steps": request.steps,
                    "computed": found.computed,
                    "guidance": request.guidance_scale,
                    "seconds": found.seconds,
                }
            )

    def _warm_up(self, pipeline: Pipeline, request: FilledRequest) -> None:
        """Let kernels be compiled and chosen before the clock runs: two steps, since the first ones are dense."""
        few = replace(request, steps=2)
        prompts = [caption for caption, _ in self.judge.prompts(self.batch)]
        generate_batch(pipeline, prompts, list(range(self.batch)), few)


def score_avatar(args: argparse.Namespace) -> int:
    """`longcat score-nano --avatar`."""
    from ..nano.avatar.measure import Scores, load_avatar, measure

    if args.lesson or args.versus:
        raise LongCatError("--avatar scores one model at its own settings; leave out --lesson and --versus")
    device, folder = device_of(args.device), None if args.model is None else Path(args.model)
    if args.output is not None:
        check_suffix(args.output, (".json",))
        check_place(args.output, 1 << 16)
        args.outputs.hold(args.output)
    with notes_from_warnings(), args.bar as bar:
        engine, encoder = load_avatar(folder, device)
        done = itertools.count(1)
        scores: Scores = measure(
            engine,
            encoder,
            args.prompts,
            args.steps,
            lambda spoken: bar.count(next(done), 2 * args.prompts, "", "video"),
        )
    print(f"{args.prompts} videos of one face and as many of two, {args.steps} steps, without guidance")
    print(f"mouth with its sound         {scores.correlation:6.3f}, at least {min(scores.correlations):.3f}")
    print(f"sounds shuffled (control)    {scores.shuffled:6.3f}")
    rows = {"face kept": scores.kept, "face as in the prompt": scores.named, "right mouth of two": scores.pairs}
    for name, (right, total) in rows.items():
        print(f"{name:22} {right:4d} of {total:4d}  {right / total:6.1%}")
    if args.output is not None:
        inputs = {"world": "avatar", "model": str(folder or ""), "prompts": args.prompts, "steps": args.steps}
        ResultsFile("avatar", args.output.parent, device, inputs, name=args.output.stem).add(asdict(scores))
    return 0


def lesson(args: argparse.Namespace) -> int:
    """`longcat lesson-nano`."""
    write_lesson(args.folder, args.clips)
    print(f"{args.folder}: {args.clips} clips with captions")
    return 0


def train(args: argparse.Namespace) -> int:
    """`longcat train-nano`."""
    from ..nano import train as nano

    if args.size == "nano":
        return nano.run(args) or 0
    device = nano.training_device(args.device)
    if args.output == NANO_WEIGHTS:
        raise LongCatError(f"--size {args.size} needs a folder of its own; give one with --output")
    if not args.minutes > 0:
        raise LongCatError(f"--minutes {args.minutes:g} must be above 0")
    options = {name: getattr(args, name) for name in ("size", "minutes", "stop_after", "seed")}
    if args.size.startswith("avatar"):
        from ..nano.avatar.recipe import train_avatar

        train_avatar(args.output, device=device, **options)
    else:
        from ..nano.mini.recipe import train_mini

        train_mini(args.output, device=device, start_from=args.start_from, **options)
    return 0
