"""What a setting samples: a video of LongCat-Video, or of an avatar the first segment and the one that continues it."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from ..errors import LongCatError
from ..files.media import Sound, read_sound
from ..generate.audio import Embeddings, Voices, combine
from ..generate.avatar import AvatarRequest, make_segment
from ..generate.opened import OpenedModel
from ..generate.options import GUIDANCE, MORE
from ..generate.pipeline import Pipeline
from ..generate.progress import Part, sampled
from ..generate.request import Defaults, FilledRequest, work_of
from ..generate.segments import Segment
from ..measure.calibrate_avatar import shortened
from ..optimize.plan import Work
from ..sampling.conditioning import latent_shape
from ..sampling.sampler import Callback
from ..sampling.schedules import is_newer
from .avatar import embeddings_of, refuse_official_cache
from .console import Progress
from .generate import read_in, request_of, schedule_of, there_in

# What an avatar hears, by the seed of the video.
Heard = Mapping[int, Embeddings]


class Subject:
    """A checked video of LongCat-Video, which has one segment.

    first: the request of its first segment. frames: how many it has. joins: where later segments begin. overlap: how
    many of its frames a later segment is given. audio_guidance, track: an avatar's scale and sound.
    """

    joins: tuple[int, ...] = ()
    overlap = 0
    audio_guidance: float | None = None
    track: Sound | None = None

    def __init__(self, first: FilledRequest) -> None:
        self.first, self.frames = first, first.frames

    def filled(self, defaults: Defaults) -> Subject:
        """Checked and decided again. Raises LongCatError."""
        return Subject(self.first.filled(defaults))

    def at(self, prompt: str, seed: int) -> Subject:
        """The same of another prompt and seed."""
        return Subject(replace(self.first, prompt=prompt, seed=seed))

    def work(self) -> Work:
        """The memory-relevant sizes of sampling it."""
        return work_of(self.first)

    def reads(self) -> list[str]:
        """All prompts that the text encoder reads."""
        return read_in(self.first)

    def there(self) -> tuple[str, ...]:
        """What options work on; see `without_effect`."""
        return there_in(self.first)

    def notes(self) -> list[str]:
        """Warnings about what runs, though perhaps not as the user meant it."""
        return self.first.notes()

    def parts(self, kind: str) -> list[Part]:
        """Its segments, for a bar."""
        return [sampled(self.first.schedule, self.first.steps, kind)]

    def hear(self, seeds: Sequence[int], opened: OpenedModel, device: torch.device, bar: Progress) -> Heard:
        """What the network hears at each seed, encoded before it is loaded."""
        return {}

    def segment(
        self, pipeline: Pipeline, number: int, heard: Heard, before: Segment | None, callback: Callback
    ) -> Segment:
        """Sample a segment. before: the previous one; without it, a later segment continues a black video, which is
        enough to time its steps."""
        made = pipeline.generate(self.first, callback)
        return Segment(made.frames, made.latents, "")

    def new(self, number: int, frames: np.ndarray) -> np.ndarray:
        """The frames of a segment [F, H, W, 3] that the video has from it."""
        begun = sum(self.joins[:number])
        return frames[self.overlap if number else 0 :][: self.frames - begun]


class Speech(Subject):
    """A checked video of an avatar: its first segment and the one that continues it, where the sound lasts so long.

    A later segment has what a first one lacks: a reference frame, given frames and their cache.
    """

    def __init__(self, request: AvatarRequest) -> None:
        super().__init__(request.filled_first)
        self.request, self.frames, self.overlap = request, request.total_frames, request.overlap
        self.joins = (self.first.frames,) if request.count > 1 else ()
        self.audio_guidance, self.track = request.audio_guidance, request.track

    def filled(self, defaults: Defaults) -> Speech:
        return Speech(self.request.filled(defaults))

    def at(self, prompt: str, seed: int) -> Speech:
        first = replace(self.first, prompt=prompt, seed=seed)
        return Speech(replace(self.request, first=first, prompts=(prompt,) * self.request.count))

    def work(self) -> Work:
        return self.request.work()

    def reads(self) -> list[str]:
        return list(dict.fromkeys(self.request.reads()))

    def there(self) -> tuple[str, ...]:
        kept = [name for name in there_in(self.first) if name != GUIDANCE]
        return (*kept, *[GUIDANCE] * self.request.guided, *[MORE] * len(self.joins))

    def notes(self) -> list[str]:
        short = [] if self.joins else ["the sound fills one segment, so none that continues another one is compared"]
        return [*self.request.notes(), *short]

    def parts(self, kind: str) -> list[Part]:
        return [Part(len(self.request.schedule_of(number)), kind) for number in range(self.request.count)]

    def hear(self, seeds: Sequence[int], opened: OpenedModel, device: torch.device, bar: Progress) -> Heard:
        # The seed is that of the noise which version 1.0 hears.
        drawn = seeds[:1] if self.request.audio is not None and is_newer(self.request.audio) else seeds
        found = embeddings_of([self.at(self.first.prompt, seed).request for seed in drawn], opened, device, bar)
        return {seed: found[min(number, len(found) - 1)] for number, seed in enumerate(seeds)}

    def segment(
        self, pipeline: Pipeline, number: int, heard: Heard, before: Segment | None, callback: Callback
    ) -> Segment:
        first = self.first
        if number and before is None:
            shape = latent_shape(first.frames, first.height, first.width, pipeline.channels)
            black = np.zeros((first.frames, first.height, first.width, 3), np.uint8)
            before = Segment(black, torch.zeros(1, *shape), "")
        # There are two at most, so the previous one is the first.
        reference = None if before is None else before.latents[:, :, :1]
        made = make_segment(pipeline, self.request, number, heard[first.seed], before, reference, callback)
        return Segment(*made, "")


def voices_of(args: argparse.Namespace) -> Voices | None:
    """What an avatar says; None for a comparison of LongCat-Video."""
    sounds = getattr(args, "audio", None)
    if sounds is None:
        return None
    if len(sounds) > 1:
        raise LongCatError(f"{len(sounds)} sounds are given, and one person is compared; give one --audio")
    return combine([read_sound(sounds[0])])


def subject_of(
    args: argparse.Namespace, given: Collection[str], prompt: str, voices: Voices | None, defaults: Defaults
) -> Subject:
    """What the options describe, checked. given: the options that the user named."""
    first = request_of(args, prompt)
    if voices is None:
        return Subject(first.filled(defaults))
    refuse_official_cache(args)
    if "--fps" in given:
        raise LongCatError("--fps is not for avatars, whose rate is the model's; leave it out")
    made = AvatarRequest(first, voices, (prompt,), audio_guidance=args.audio_guidance, schedule=schedule_of(args))
    return Speech(shortened(made.filled(defaults)))
