"""`longcat avatar`: a person who speaks, segment by segment, each kept in a folder."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ..errors import LongCatError
from ..files.media import Clip, read_image, read_sound
from ..files.media.sound import LAYOUTS
from ..generate.audio import Embeddings, combine, load_audio_encoder
from ..generate.avatar import AvatarRequest, avatar_video, spoken_frames
from ..generate.long_video import Finished
from ..generate.opened import OpenedModel
from ..generate.options import GUIDANCE, MORE, TWO
from ..generate.people import LEFT, RIGHT, Person, box_of_pixels
from ..generate.pipeline import Pipeline
from ..generate.progress import ENCODING, LOADING_AUDIO, Part
from .console import Progress
from .generate import Task, in_segments, kept, prompts_of, reported, request_of, schedule_of, steps_of, there_in
from .models import avatar_of, check_sparse_fits

OUTPUT = "longcat-avatar.mp4"
# Videos that hold sound.
WITH_SOUND = (".mp4", ".mkv")
BOX = re.compile(r"(\d+),(\d+),(\d+),(\d+)")


def avatar(args: argparse.Namespace) -> int:
    """`longcat avatar`."""
    opened, request = requested(args)
    first = request.filled_first
    output, folder = kept(args, OUTPUT, (request.total_frames, first.height, first.width))
    heard = output.suffix.lower() in WITH_SOUND
    task = Task(
        args,
        opened,
        output,
        (args.image, *args.audio, *(args.mask or ())),
        (request.total_frames, first.height, first.width),
        first.fps,
        first.seed,
        request.track if heard else None,
    )
    check_sparse_fits(args, first, task.model)
    first = task.fitted(first)
    model, lossy = task.settings()
    request = replace(request, first=first, model=model, lossy=lossy)
    left_out = [] if heard else [f"the sound is left out, because {output.suffix} holds none; write .mp4 or .mkv"]
    channels = len(request.track.samples)
    if heard and channels not in LAYOUTS:
        left_out.append(f"the {channels} channels of the sound are mixed into one, as their places are unknown")
    there = [name for name in there_in(first) if name != GUIDANCE] + [GUIDANCE] * request.guided
    there += [MORE] * (request.count - 1) + [TWO] * (len(args.audio) - 1)
    task.note([*request.notes(), *left_out], *there)
    finished: list[Finished] = []

    def segments(bar: Progress) -> Iterator[Clip]:
        parts = [Part(len(request.schedule_of(i)), "later" if i else "") for i in range(request.count)]
        bar.plan(parts, what="segment")
        folder.say = bar.say

        def load() -> Pipeline:
            return task.load(request.work(), bar, request.reads(), first.sparse_settings)

        def hear() -> Embeddings:
            return embeddings_of([request], opened, task.device, bar)[0]

        done = reported(avatar_video(load, hear, request, folder, steps_of(bar)), folder, bar)
        return task.as_finished(folder, done, finished, spoken_frames(folder, finished, request))

    task.run_parts(segments)
    whole = request.voices.seconds
    spoken = min(whole, request.total_frames / first.fps)
    part = f"{spoken:.2f}" if spoken == whole else f"{spoken:.2f} of {whole:.2f}"
    return task.report(f"{part} s of sound, {in_segments(finished)}")


def requested(args: argparse.Namespace) -> tuple[OpenedModel, AvatarRequest]:
    """The model's files, opened, and the request, filled. Raises LongCatError for bad input."""
    people = people_of(args)
    prompts = tuple(prompts_of(args))
    first = request_of(args, prompts[0] if prompts else "")
    opened = avatar_of(args, max(len(args.audio), len(people)))
    sounds = [read_sound(path) for path in args.audio]
    # A person who is named and has no sound listens.
    voices = combine([*sounds, *([None] if len(sounds) == 1 and people else [])], args.mode)
    request = AvatarRequest(
        first,
        voices,
        prompts,
        people,
        args.segments,
        args.audio_guidance,
        args.overlap,
        schedule_of(args),
        args.reference,
        args.skip,
    )
    return opened, request.filled(opened.defaults)


def refuse_official_cache(args: argparse.Namespace) -> None:
    """Raise LongCatError for --kv-cache official, where a command also has it for LongCat-Video."""
    if args.kv_cache == "official":
        raise LongCatError("--kv-cache official is not for avatars; give exact or off")


def embeddings_of(
    requests: Sequence[AvatarRequest], opened: OpenedModel, device: torch.device, bar: Progress
) -> list[Embeddings]:
    """What the network hears of each filled request."""
    encoder = load_audio_encoder(
        "",
        opened=opened.audio_encoder,
        device=device,
        watch=lambda done, of: bar.task.load(LOADING_AUDIO, done, of),
    )
    bar.task.phase(ENCODING)
    embeddings = [request.embed(encoder) for request in requests]
    # The model is loaded next and needs the memory.
    del encoder
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return embeddings


def people_of(args: argparse.Namespace) -> tuple[Person, ...]:
    """Who is where in the image, as --who, --box or --mask say; () for one person, or for the two halves of the image.

    Raises LongCatError for options that exclude each other, and for what does not fit the image.
    """
    named = [f"--{name}" for name in ("who", "box", "mask") if getattr(args, name)]
    if not named:
        return ()
    if len(named) > 1:
        raise LongCatError(f"{' and '.join(named)} exclude each other; give one of them")
    if args.image is None:
        raise LongCatError(f"{named[0]} says who is where in an image, and none is given; give --image")
    if args.who:
        return (LEFT, RIGHT) if args.who == "left" else (RIGHT, LEFT)
    people: list[Person] = [_mask(path) for path in args.mask or ()]
    if args.box:
        height, width = read_image(args.image).shape[:2]
        people += [box_of_pixels(_box(text), height, width, "--box") for text in args.box]
    if len(people) < 2:
        raise LongCatError(
            f"{named[0]} is given once and tells people apart; give it for each of them, or leave it out for one person"
        )
    return tuple(people)


def _box(text: str) -> tuple[int, ...]:
    found = BOX.fullmatch(text.replace(" ", ""))
    if found is None:
        raise LongCatError(f"--box {text} is not a box; give y0,x0,y1,x1 in pixels, such as 48,40,430,370")
    return tuple(map(int, found.groups()))


def _mask(path: Path) -> np.ndarray:
    """A mask [h, w] of a picture, where it is rather white than black."""
    return (read_image(path).max(axis=2) > 127).astype(np.uint8)
