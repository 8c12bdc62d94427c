"""Long video: segments, each begun with the end of the one before; a prompt for all, or one for each (interactive).

The released model was trained to go on: with 13 frames given, 80 new ones, for minutes and without drifting. Every
finished segment is kept in a folder before the next is begun (`segments`), so that a run that ended early, by whatever,
goes on with the segment it was in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from ..errors import LongCatError
from ..sampling.conditioning import TEMPORAL_FACTOR, latent_frames
from ..sampling.sampler import Step
from .inputs import check_path, check_type, check_whole
from .options import HAND_OFFS, MAX_SEED, MAX_SEGMENTS
from .pipeline import Engine
from .request import Defaults, GenerateRequest, check_text, require_filled
from .segments import Record, Segment, SegmentFolder, Settings, checksum

HandOff = Literal["frames", "latents"]
# BT.709 luma of R, G and B.
LUMA = np.array([0.2126, 0.7152, 0.0722])


@dataclass(frozen=True)
class LongVideoRequest:
    """What is generated. first: the first segment, whose prompt and seed are `prompts[0]` and its own; the others take
    everything from it but the image or clip that it begins with, and count its seed on.

    prompts: one a segment. overlap: frames of a segment's end that the next begins with, 4k+1. schedule: of the
    segments after the first; None: as the model continues clips, or distilled where the first is. hand_off: what the
    next segment is given. `frames`: the last frames, decoded and encoded anew, as the public pipeline does; `latents`:
    the latents themselves, but for the first, which must stand for a single frame and is encoded from it.
    """

    first: GenerateRequest
    prompts: tuple[str, ...]
    overlap: int = 13
    schedule: str | None = None
    hand_off: HandOff = "frames"
    # What else decides the result: the model and how it is run. Plain JSON values.
    model: Settings = field(default_factory=dict)

    def filled(self, defaults: Defaults) -> LongVideoRequest:
        """A checked request without anything left to the model's defaults. Raises LongCatError."""
        check_type("the first segment", self.first, GenerateRequest, "a GenerateRequest")
        check_type("prompts", self.prompts, (tuple, list), "a tuple with one prompt a segment")
        check_whole("the overlap", self.overlap)
        if not 1 <= len(self.prompts) <= MAX_SEGMENTS:
            raise LongCatError(f"{len(self.prompts)} segments are out of range; ask for 1 to {MAX_SEGMENTS}")
        if self.hand_off not in HAND_OFFS:
            raise LongCatError(f"unknown hand-off {self.hand_off!r}; choose one of {', '.join(HAND_OFFS)}")
        for number, prompt in enumerate(self.prompts, 1):
            check_text(f"prompt of segment {number}", prompt)
        latent_frames(self.overlap, "overlap")
        first = replace(self.first, prompt=self.prompts[0]).filled(defaults)
        if first.frames <= self.overlap:
            raise LongCatError(
                f"segments of {first.frames} frames with {self.overlap} in common leave nothing new; ask for at least "
                f"{self.overlap + TEMPORAL_FACTOR} frames or a smaller overlap"
            )
        schedule = self.schedule or ("distilled" if first.schedule == "distilled" else defaults.clip_schedule)
        request = replace(self, first=first, schedule=schedule)
        for number in range(len(self.prompts)):
            request.segment(number, np.zeros((self.overlap, first.height, first.width, 3), np.uint8)).filled(defaults)
        return request

    def segment(self, number: int, given: np.ndarray | None = None) -> GenerateRequest:
        """The request of one segment, begun with the frames `given` unless it is the first."""
        if number == 0:
            return self.first
        return replace(
            self.first,
            prompt=self.prompts[number],
            seed=(self.first.seed + number) % (MAX_SEED + 1),
            schedule=self.schedule,
            image=None,
            video=None,
            num_cond_frames=self.overlap,
            given=given,
        )

    def settings(self, number: int) -> Settings:
        """Everything that decides what a segment looks like but the segment before."""
        request = self.segment(number)
        names = ("prompt", "negative_prompt", "height", "width", "frames", "steps", "guidance_scale", "seed",
                 "schedule", "kv_cache", "step_cache")  # fmt: skip
        settings = {name: getattr(request, name) for name in names}
        settings |= {"overlap": self.overlap, "hand_off": self.hand_off}
        if number == 0 and request.given is not None:
            settings["given frames"] = checksum(request.given[-request.cond_frames :])
        return settings | self.model

    @property
    def total_frames(self) -> int:
        frames = require_filled(self.first).frames
        return frames + (len(self.prompts) - 1) * (frames - self.overlap)


def spread_prompts(prompts: Sequence[str], segments: int | None) -> tuple[str, ...]:
    """One prompt a segment: the last is repeated for segments beyond it; by default there are as many as prompts."""
    check_type("prompts", prompts, (tuple, list), "a list of prompts")
    if segments is not None:
        check_whole("the number of segments", segments)
    if not prompts:
        raise LongCatError('the prompt is empty; say what the video shows, such as "a red circle moves right"')
    count = len(prompts) if segments is None else segments
    if not 1 <= count <= MAX_SEGMENTS:
        raise LongCatError(f"{count} segments are out of range; ask for 1 to {MAX_SEGMENTS}")
    if len(prompts) > count:
        raise LongCatError(f"{len(prompts)} prompts are given for {count} segments; give at most one a segment")
    return tuple(prompts) + (prompts[-1],) * (count - len(prompts))


def segment_folder(path: Any) -> SegmentFolder:
    """The folder of a long video: another prompt makes segments anew, any other change wants another folder."""
    check_path("the folder of segments", path)
    return SegmentFolder(path, changing=("prompt",))


@dataclass(frozen=True)
class Join:
    """How the picture changes from the last frame of a segment to the first new one of the next, in levels of 0..255.

    color: change of the mean of R, G and B. brightness: of the mean luma (BT.709). usual: the same for neighboring
    frames within both segments, the largest of the three colors, mean over frames.
    """

    color: tuple[float, float, float]
    brightness: float
    usual: float

    @property
    def step(self) -> float:
        """The largest change of the three colors."""
        return max(abs(change) for change in self.color)


def measure_join(before: np.ndarray, after: np.ndarray, overlap: int) -> Join:
    """before, after: uint8 [F, H, W, 3]; the first `overlap` frames of `after` stand for the last of `before`."""
    means = [frames.mean(axis=(1, 2), dtype=np.float64) for frames in (before, after)]
    change = means[1][overlap] - means[0][-1]
    inside = np.concatenate([np.abs(np.diff(mean, axis=0)).max(axis=1) for mean in means])
    usual = float(inside.mean()) if inside.size else 0.0
    red, green, blue = (round(float(value), 4) for value in change)
    return Join((red, green, blue), round(float(change @ LUMA), 4), round(usual, 4))


@dataclass(frozen=True)
class Finished:
    """A segment that is there. number counts from 0, skip: frames at its front that the one before has too.

    reused: it was in the folder already. join: with the segment before, None for the first.
    """

    number: int
    of: int
    record: Record
    skip: int
    reused: bool
    join: Join | None

    def told(self, folder: str | Path) -> str:
        """A sentence for people; folder: by the name that they gave it."""
        state = f"is in {folder} already" if self.reused else f"finished, kept in {folder}"
        sentence = f"segment {self.number + 1} of {self.of}: {state}"
        if self.join is None:
            return sentence
        return (
            f"{sentence}; at its join the mean color changes by {self.join.step:.2f} of 255 and the brightness by "
            f"{self.join.brightness:+.2f}, where neighboring frames do by {self.join.usual:.2f}"
        )


def long_video(
    load: Callable[[], Engine],
    request: LongVideoRequest,
    folder: SegmentFolder,
    callback: Callable[[int, int, Step], None] | None = None,
) -> Iterator[Finished]:
    """Make what is missing of a filled request, segment by segment; each is in the folder when it is yielded.

    load: called when the first segment has to be made: where all are there, no model is loaded. callback: called after
    each step with the segment's number, how many there are, and the step; what it raises ends the run, and the finished
    segments stay. The same request gives the same frames on one machine, bit for bit, however often it was cut off.
    Raises LongCatError for a folder of other settings or in use, and for a full disk.
    """
    count, first = len(request.prompts), require_filled(request.first)
    engine = cache(load)

    def make(number: int, before: Segment | None) -> tuple[np.ndarray, Tensor, Settings]:
        given = None if before is None else before.frames[-request.overlap :]
        result = engine().generate(
            request.segment(number, given),
            None if callback is None else lambda step: callback(number, count, step),
            _handed(request, before),
        )
        if before is None:
            return result.frames, result.latents, {}
        join = measure_join(before.frames, result.frames, request.overlap)
        return result.frames, result.latents, {"join": asdict(join)}

    settings = [request.settings(number) for number in range(count)]
    # Frames as if nothing could be compressed; latents are less than a tenth of that.
    room = [4 * first.frames * first.height * first.width] * count
    for number, record, reused in folder.fill(settings, make, fps=first.fps, room=room):
        join = record.notes.get("join")
        join = None if join is None else Join(tuple(join["color"]), join["brightness"], join["usual"])
        yield Finished(number, count, record, request.overlap if number else 0, reused, join)


def _handed(request: LongVideoRequest, before: Segment | None) -> Tensor | None:
    handed = latent_frames(request.overlap) - 1
    if before is None or request.hand_off == "frames" or not handed:
        return None
    return before.latents[:, :, -handed:]


def new_frames(folder: SegmentFolder, finished: Sequence[Finished]) -> Iterator[np.ndarray]:
    """The frames of the whole video, segment by segment: uint8 [F, H, W, 3], none twice."""
    for segment in finished:
        yield folder.frames(segment.number, segment.skip)
