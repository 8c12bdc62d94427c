"""Long video: segments that each start from the end of the previous one, with one prompt for all or one for each.

The released model was trained to continue clips: 13 conditioning frames and 80 new ones, for minutes without drifting.
Every finished segment is saved in a folder (`segments`) before the next one starts, so an interrupted run resumes with
the segment that was cut off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from ..errors import LongCatError, check_choice, check_path, check_type, plain_fields
from ..files.media import read_video
from ..sampling.conditioning import TEMPORAL_FACTOR, latent_frames
from ..sampling.sampler import Step
from .engine import Engine
from .inputs import check_callback, check_json, check_whole
from .options import HAND_OFFS, LOSSY_CHANGES, MAX_SEED, MAX_SEGMENTS
from .request import Defaults, FilledRequest, GenerateRequest, check_text, require_filled
from .segment_folder import Make, SegmentFolder, in_words
from .segments import FRAMES, Record, Segment, check_there, checksum, seed_settings
from .takes import LOSSY, Settings, lossy_settings

HandOff = Literal["frames", "latents"]
# BT.709 luma of R, G and B.
LUMA = np.array([0.2126, 0.7152, 0.0722])


@dataclass(frozen=True)
class LongVideoRequest:
    """A long video.

    first: the first segment; the others copy everything except its prompt and its image or clip, and count up from its
    seed. prompts: one for each segment. overlap: frames, 4k+1, that a segment shares with the previous one. schedule:
    of the segments after the first; None: the model's schedule for clips, or distilled if the first segment is.
    hand_off: what the next segment starts from. `frames` decodes the last frames and encodes them again, as the public
    pipeline does; `latents` passes the latents on, except the first, which must stand for a single frame.
    model: JSON values about the model that decide the result too. lossy: settings of how it runs that change the result
    a little, by their names, in words; nothing that is exact.
    """

    first: GenerateRequest
    prompts: tuple[str, ...]
    overlap: int = 13
    schedule: str | None = None
    hand_off: HandOff = "frames"
    model: Settings = field(default_factory=dict)
    lossy: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        plain_fields(self)

    def filled(self, defaults: Defaults) -> LongVideoRequest:
        """The request with the model's defaults filled in. Raises LongCatError for values that do not fit."""
        check_type("the first segment", self.first, GenerateRequest, "a GenerateRequest")
        check_type("prompts", self.prompts, (tuple, list), "a tuple with one prompt a segment")
        check_whole("the overlap", self.overlap)
        if not 1 <= len(self.prompts) <= MAX_SEGMENTS:
            raise LongCatError(f"{len(self.prompts)} segments are out of range; ask for 1 to {MAX_SEGMENTS}")
        check_choice("the hand-off", self.hand_off, HAND_OFFS)
        check_json("the description of the model", self.model)
        check_json("the lossy settings", self.lossy)
        for number, prompt in enumerate(self.prompts, 1):
            check_text(f"prompt of segment {number}", prompt)
        latent_frames(self.overlap, "overlap")
        first = replace(self.first, prompt=self.prompts[0]).filled(defaults)
        if first.frames <= self.overlap:
            raise LongCatError(
                f"segments of {first.frames} frames that share {self.overlap} leave nothing new; ask for at least "
                f"{self.overlap + TEMPORAL_FACTOR} frames or a smaller overlap"
            )
        schedule = self.schedule or ("distilled" if first.schedule == "distilled" else defaults.clip_schedule)
        request = replace(self, first=first, schedule=schedule)
        for number in range(len(self.prompts)):
            request.segment(number, np.zeros((self.overlap, first.height, first.width, 3), np.uint8)).filled(defaults)
        return request

    def segment(self, number: int, given: np.ndarray | None = None) -> GenerateRequest:
        """The request of one segment, which starts from the frames `given` unless it is the first."""
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
        """Everything that decides a segment's frames, except the previous segment."""
        request = self.segment(number)
        names = ("prompt", "negative_prompt", "height", "width", "frames", "steps", "guidance_scale", "schedule")
        settings = {name: getattr(request, name) for name in names}
        if request.kv_cache == "official":
            settings["kv_cache"] = request.kv_cache
        settings |= seed_settings(request.seed) | {"overlap": self.overlap, "hand_off": self.hand_off}
        if number == 0 and request.given is not None:
            settings["given frames"] = checksum(request.given[-request.cond_frames :])
        until = 1.0 if request.guidance_scale == 1 else request.guidance_until
        lossy = lossy_settings(
            step_cache=request.step_cache or 0.0,
            guidance_until=1.0 if until is None else until,
            sparse=request.sparse_settings,
        )
        lossy |= self.lossy
        return settings | self.model | ({LOSSY: lossy} if lossy else {})

    @property
    def total_frames(self) -> int:
        frames = require_filled(self.first).frames
        return frames + (len(self.prompts) - 1) * (frames - self.overlap)


def spread_prompts(prompts: Sequence[str], segments: int | None) -> tuple[str, ...]:
    """One prompt for each segment; the last one serves all segments beyond it. segments: None for one a prompt."""
    check_type("prompts", prompts, (tuple, list), "a list of prompts")
    if segments is not None:
        check_whole("the number of segments", segments)
    if not prompts:
        raise LongCatError('the prompt is empty; say what the video shows, such as "a red circle moves right"')
    count = len(prompts) if segments is None else segments
    if not 1 <= count <= MAX_SEGMENTS:
        raise LongCatError(f"{count} segments are out of range; ask for 1 to {MAX_SEGMENTS}")
    if len(prompts) > count:
        raise LongCatError(f"{len(prompts)} prompts are more than the {count} segments; give at most one for each")
    return tuple(prompts) + (prompts[-1],) * (count - len(prompts))


def segment_folder(
    path: Any, lossy_change: str = LOSSY_CHANGES[0], say: Callable[[str], None] | None = None
) -> SegmentFolder:
    """The folder of long videos. Other settings of the first segment begin a new take in it; see `SegmentFolder`."""
    check_path("the folder of segments", path)
    return SegmentFolder(path, Notes, lossy_change, say)


@dataclass(frozen=True)
class Join:
    """The change from a segment's last frame to the first new frame of the next segment, in levels of 0..255.

    color: of the means of R, G and B. brightness: of the mean luma (BT.709). usual: of neighboring frames within the
    two segments, the largest of R, G and B, averaged over frames.
    """

    color: tuple[float, float, float]
    brightness: float
    usual: float

    @property
    def step(self) -> float:
        """The largest of the three color changes."""
        return max(abs(change) for change in self.color)


@dataclass(frozen=True)
class Notes:
    """What a segment's record says beside what decides it. join: with the previous segment."""

    join: Join | None = None


def measure_join(before: np.ndarray, after: np.ndarray, overlap: int) -> Join:
    """before, after: uint8 [F, H, W, 3]; the first `overlap` frames of `after` repeat the last of `before`."""
    means = [frames.mean(axis=(1, 2), dtype=np.float64) for frames in (before, after)]
    change = means[1][overlap] - means[0][-1]
    inside = np.concatenate([np.abs(np.diff(mean, axis=0)).max(axis=1) for mean in means])
    usual = float(inside.mean()) if inside.size else 0.0
    red, green, blue = (round(float(value), 4) for value in change)
    return Join((red, green, blue), round(float(change @ LUMA), 4), round(usual, 4))


@dataclass(frozen=True)
class Finished:
    """A finished segment.

    number: from 0. skip: leading frames that the previous segment has too. reused: it was in the folder already.
    join: with the previous segment, None for the first. place: where it lies in the folder.
    """

    number: int
    of: int
    record: Record
    skip: int
    reused: bool
    join: Join | None
    place: str

    def summary(self, folder: str | Path) -> str:
        """A sentence about the segment. folder: as the user named it."""
        place = in_words(folder, self.place, self.number)
        state = f"already in {place}" if self.reused else f"finished and saved in {place}"
        sentence = f"segment {self.number + 1} of {self.of}: {state}"
        if self.join is None:
            return sentence
        return (
            f"{sentence}; at its join the mean color changes by {self.join.step:.2f} of 255 and the brightness by "
            f"{self.join.brightness:+.2f}; between neighboring frames the color changes by {self.join.usual:.2f}"
        )


def long_video(
    load: Callable[[], Engine],
    request: LongVideoRequest,
    folder: SegmentFolder,
    callback: Callable[[int, int, Step], None] | None = None,
) -> Iterator[Finished]:
    """Generate the missing segments of a filled request; each is in the folder when it is yielded.

    load: called before the first missing segment; if none is missing, no model is loaded. callback: called after each
    step with the segment's number, the number of segments, and the step; what it raises ends the run, and finished
    segments stay. On one machine with one number of threads the same request gives the same frames bit for bit, however
    often it was interrupted.
    Raises LongCatError for a take in use, and for a full disk.
    """
    check_type("the request", request, LongVideoRequest, "a LongVideoRequest")
    check_type("the folder", folder, SegmentFolder, "what segment_folder returns")
    check_callback(load, "what loads the model")
    check_callback(callback)
    count, first = len(request.prompts), require_filled(request.first)
    engine = cache(load)

    def make(number: int, before: Segment | None) -> tuple[np.ndarray, Tensor, Settings]:
        given = None if before is None else before.frames[-request.overlap :]

        def after(step: Step) -> None:
            # What cannot be kept is not computed to its end.
            folder.take.check_there()
            if callback is not None:
                callback(number, count, step)

        result = engine().generate(request.segment(number, given), after, _handed(request, before))
        return result.frames, result.latents, join_notes(before, result.frames, request.overlap)

    settings = [request.settings(number) for number in range(count)]
    yield from finished_segments(folder, settings, make, first, request.overlap)


def join_notes(before: Segment | None, frames: np.ndarray, overlap: int) -> Settings:
    """What the record of a segment with these frames, uint8 [F, H, W, 3], says about its join."""
    return {} if before is None else {"join": asdict(measure_join(before.frames, frames, overlap))}


def finished_segments(
    folder: SegmentFolder, settings: Sequence[Settings], make: Make, first: FilledRequest, overlap: int
) -> Iterator[Finished]:
    """Make the missing segments; each is in the folder when it is yielded. settings: of every segment. make: see
    `SegmentFolder.fill`; its notes are `join_notes`. first: the request of the first segment."""
    # As if frames could not be compressed; latents take less than a tenth of that.
    room = [4 * first.frames * first.height * first.width] * len(settings)
    for number, record, reused in folder.fill(settings, make, fps=first.fps, room=room):
        join = record.notes.get("join")
        join = None if join is None else Join(tuple(join["color"]), join["brightness"], join["usual"])
        skip = overlap if number else 0
        yield Finished(number, len(settings), record, skip, reused, join, folder.place(number))


def _handed(request: LongVideoRequest, before: Segment | None) -> Tensor | None:
    handed = latent_frames(request.overlap) - 1
    if before is None or request.hand_off == "frames" or not handed:
        return None
    return before.latents[:, :, -handed:]


def new_frames(folder: SegmentFolder, finished: Sequence[Finished]) -> Iterator[np.ndarray]:
    """The frames of the whole video, segment by segment: uint8 [F, H, W, 3], none twice."""
    check_type("the folder", folder, SegmentFolder, "what segment_folder returns")
    check_type("the finished segments", finished, (list, tuple), "the list of what long_video yielded")
    for segment in finished:
        file = folder.path / segment.place / FRAMES
        check_there(file)
        yield read_video(file)[0][segment.skip :]
