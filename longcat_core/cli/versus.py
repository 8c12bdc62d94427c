"""Settings side by side: A, which the options describe, and one for every --versus; they share a model if they can."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import LongCatError
from ..generate.audio import Voices
from ..generate.loading import OnLoad
from ..generate.opened import OpenedModel
from ..generate.options import A_GPU, MEMORY, MODEL, SAMPLING, WHAT, of_command
from ..generate.pipeline import Pipeline
from ..generate.request import FilledRequest
from ..measure.fidelity import REFERENCE, letters
from .models import (
    avatar_of,
    check_sparse_fits,
    compile_mode,
    load_models,
    lossy_switches_of,
    machine_of,
    paths_of,
    with_speed,
)
from .options import Parser, add_options, given_flags, without_effect
from .subjects import Subject, subject_of, voices_of

# Fields of `GenerateRequest` that make another video, and their names in error messages.
SAME = {
    "height": "height",
    "width": "width",
    "frames": "number of frames",
    "seed": "seed",
    "image": "image",
    "video": "clip",
    "num_cond_frames": "number of given frames",
}
# Model options that can change while the model stays loaded.
SWITCHED = ("attention", "compile", "exchange")


@dataclass(frozen=True)
class Side:
    """One checked setting. model: the options for which a model has to be loaded."""

    name: str
    options: str
    args: argparse.Namespace
    subject: Subject
    device: torch.device
    opened: OpenedModel
    model: dict[str, Any]

    @property
    def request(self) -> FilledRequest:
        """The request, or that of an avatar's first segment."""
        return self.subject.first


def _parsed(args: argparse.Namespace) -> Iterator[tuple[str, argparse.Namespace]]:
    """The text of every --versus, and its options on top of those outside --versus."""
    parser = Parser(prog=f"longcat {args.command}", add_help=False, allow_abbrev=False)
    add_options(parser, args.command, WHAT, SAMPLING, MODEL, MEMORY)
    for text in args.versus or []:
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise LongCatError(f"--versus {text!r} cannot be read ({error}); quote it as in a shell") from error
        try:
            yield text, parser.parse_args(words, argparse.Namespace(**vars(args)))
        except LongCatError as error:
            raise LongCatError(f"--versus {text!r}: {error}") from error


def _side(name: str, options: str, args: argparse.Namespace, prompt: str, voices: Voices | None) -> Side:
    device, opened = machine_of(args, paths_of(args) if voices is None else avatar_of(args, 1))
    given = given_flags([*args.argv, *shlex.split(options)])
    subject = subject_of(args, given, prompt, voices, opened.defaults)
    check_sparse_fits(args, subject.first, opened)
    args, loaded = with_speed(args, given, subject.first.schedule, device, opened)
    if loaded is not None:
        subject = subject.filled(replace(opened.defaults, loaded=loaded))
    names = [row.name for row in of_command(args.command, MODEL, MEMORY)]
    model = {name: getattr(args, name) for name in names if name not in SWITCHED}
    return Side(name, options, args, subject, device, opened, model)


def sides_of(args: argparse.Namespace, prompt: str) -> list[Side]:
    """A and the settings to compare with it. Raises LongCatError for settings that cannot be compared."""
    voices = voices_of(args)
    first = _side(REFERENCE, "", args, prompt, voices)
    sides = [first]
    for name, (text, parsed) in zip(letters(), list(_parsed(args)), strict=False):
        try:
            side = _side(name, text, parsed, prompt, voices)
        except LongCatError as error:
            raise LongCatError(f"--versus {text!r}: {error}") from error
        for field, what in SAME.items():
            ours, theirs = getattr(first.request, field), getattr(side.request, field)
            if ours != theirs:
                raise LongCatError(
                    f"--versus {text!r} asks for another {what} ({theirs}) than A ({ours}), and only settings of the "
                    "same video can be compared; give it outside --versus, for all"
                )
        if parsed.memory != args.memory:
            raise LongCatError(f"--versus {text!r} sets --memory, which holds for all; give it outside --versus")
        sides.append(side)
    return sides


def without_effect_in(sides: Sequence[Side]) -> Iterator[str]:
    """Notes about options of one setting, and about options for all that no setting makes use of."""

    def notes(side: Side, argv: Sequence[str]) -> list[str]:
        gpu = (A_GPU,) if side.device.type == "cuda" else ()
        return list(without_effect(side.args, (*gpu, *side.subject.there()), argv))

    for_all = [notes(side, side.args.argv) for side in sides]
    yield from (sentence for sentence in for_all[0] if all(sentence in others for others in for_all))
    for side in sides:
        yield from notes(side, shlex.split(side.options))


def by_model(sides: Sequence[Side]) -> list[list[Side]]:
    """Settings that can share a loaded model, in the order of their first ones."""
    groups: list[list[Side]] = []
    for side in sides:
        group = next((group for group in groups if group[0].model == side.model), None)
        groups.append([side]) if group is None else group.append(side)
    return groups


def load(group: Sequence[Side], batch: int = 1, prompts: Sequence[str] = (), on_load: OnLoad | None = None) -> Pipeline:
    """The model of settings that share it. batch: videos at a time. prompts: of all videos, if each is encoded by
    itself. on_load: see `Pipeline.load`."""
    side = group[0]
    work = max(
        (other.subject.work() for other in group),
        key=lambda work: (work.guided, work.parts or 0, work.cond_latents),
    )
    work = replace(work, latents=(batch, *work.latents[1:]))
    texts = [text for other in group for text in other.subject.reads() if text != other.request.prompt]
    reads = list(dict.fromkeys([*prompts, *texts])) if prompts else []
    return load_models(side.args, side.opened, side.device, work, reads, on_load)


def switch(pipeline: Pipeline, side: Side) -> None:
    """Set what a setting changes in a loaded model."""
    network = pipeline.model
    mode = compile_mode(side.args, side.device, side.opened.paths)
    chosen = lossy_switches_of(side.args)
    switches = replace(network.requested, attention=chosen.attention, exchange=chosen.exchange, compile=mode)
    if switches != network.requested:
        network.set_optimizations(switches)
