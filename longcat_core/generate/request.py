"""The request of one video: its defaults are filled in and its values are checked before any model is loaded."""

from __future__ import annotations

import html
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ..errors import LongCatError, check_choice, check_path, check_type, is_number, is_whole, plain_fields
from ..files.media import count_pictures, open_video, read_image, resize_and_crop
from ..files.regular import says_something
from ..model.config import AudioConfig
from ..model.kv_cache import KVMode, check_mode
from ..optimize.plan import Work
from ..optimize.sparse.settings import SPARSE_KERNELS, Sparse, SparseKernel
from ..sampling.buckets import nearest_bucket
from ..sampling.conditioning import TEMPORAL_FACTOR, latent_frames, latent_shape, nearest_frame_counts
from ..sampling.guidance import DEFAULT_NEGATIVE_PROMPT, NEGATIVE_PROMPTS, guided_steps
from ..sampling.schedules import DISTILLED_GRID
from . import calibration
from .calibration import Calibration
from .inputs import check_whole
from .options import (
    FPS,
    MAX_FPS,
    MAX_FRAMES,
    MAX_GUIDANCE,
    MAX_SEED,
    MAX_SIDE,
    MAX_STEP_CACHE,
    MAX_STEPS,
    SCHEDULES,
    SIDE_MULTIPLE,
    USEFUL_STEP_CACHE,
)
from .speed_fit import EXACT_VALUES, Chosen, Loaded, check_speed, fit_request
from .speeds import EXACT, Speed


@dataclass(frozen=True)
class Defaults:
    """What a model was trained for, and how it is loaded.

    height, width: pixels. bucketed: the size follows the shape of a given picture. clip_schedule: for continuing clips.
    speed: of requests that name none. loaded: what decides which options of a speed can run; None: all can. audio: what
    an avatar's network hears. avatar_guidance: its scale by text and by sound where it is not distilled.
    """

    height: int
    width: int
    frames: int
    bucketed: bool
    clip_schedule: str
    speed: Speed = EXACT
    loaded: Loaded | None = None
    audio: AudioConfig | None = None
    avatar_guidance: float = 4.0


RELEASED = Defaults(480, 832, 93, bucketed=True, clip_schedule="enhance_hf")
NANO = Defaults(64, 96, 33, bucketed=False, clip_schedule="base", avatar_guidance=1.0)


@dataclass(frozen=True, eq=False)
class Source:
    """Where a filled request's given frames come from.

    files: image, video, number of conditioning frames, and frames per second. notes: sentences on what reading did.
    """

    files: tuple[Path | None, Path | None, int, float]
    frames: np.ndarray | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class GenerateRequest:
    """One video to generate. `filled` replaces None by what suits the model and the other values.

    height, width: pixels, multiples of 16. frames: 4k+1, including conditioning frames. guidance_scale: 1 turns
    guidance off. image: the first frame. video: a clip of which the last `num_cond_frames` frames (4k+1) are continued.
    given: the frames of the image or the clip, uint8 [F, H, W, 3]; `filled` reads them from the file, or they are given
    instead of a file: one frame is an image, more are a clip. kv_cache: how conditioning frames are computed.
    step_cache: the threshold for skipping steps, 0 for none; guidance_until: the share of the steps that have
    guidance; see `sample` for both. fps: of the output file; the frames of a
    clip are taken by their time at this rate, and given frames have it. source: set by `filled`, which reads again
    where a filled request names another file. sparse: sparse attention of one density, or of what a calibration found,
    which must be of this model. sparse_kernel: what computes it. speed: what decides of sparse, step_cache
    and guidance_until those that are None: `exact`, or a set of lossy options of `generate.speeds`;
    None: the speed that the pipeline was loaded with, or exact. A density of 1 is full attention under any speed, and
    step_cache 0 skips nothing. chosen: set by `filled`, which decides again where a filled request names another speed.
    """

    prompt: str
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0
    schedule: str | None = None
    image: Path | None = None
    video: Path | None = None
    num_cond_frames: int = 13
    kv_cache: KVMode = "exact"
    step_cache: float | None = None
    fps: float = FPS
    given: np.ndarray | None = field(default=None, repr=False, compare=False)
    source: Source | None = field(default=None, repr=False, compare=False)
    guidance_until: float | None = None
    sparse: Sparse | Calibration | None = None
    sparse_kernel: SparseKernel = "auto"
    speed: Speed | None = None
    chosen: Chosen | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        plain_fields(self)

    def filled(self, defaults: Defaults) -> FilledRequest:
        """The request with files read and every None replaced. Raises LongCatError for values that do not fit."""
        check_type("what the model was trained for", defaults, Defaults, "the defaults of a pipeline")
        check_text("prompt", self.prompt)
        if self.negative_prompt is not None:
            check_text("negative prompt", self.negative_prompt)
        if not says_something(html.unescape(html.unescape(self.prompt))):
            raise LongCatError('the prompt is empty; say what the video shows, such as "a red circle moves right"')
        if self.image is not None and self.video is not None:
            raise LongCatError("an image and a video are both given; give only one of them")
        for name, path in (("image", self.image), ("video", self.video)):
            if path is not None:
                check_path(f"the path of the {name}", path)
        if self.schedule is not None:
            check_type("the schedule", self.schedule, str, f"one of {', '.join(SCHEDULES)}")
        check_whole("the number of conditioning frames", self.num_cond_frames)
        latent_frames(self.num_cond_frames, noun="conditioning frames")
        check_number("fps", self.fps, 1.0, MAX_FPS)
        given, own, notes = self._frames()
        _check_given(given)
        is_clip = given is not None and len(given) > 1
        schedule = self.schedule or (defaults.clip_schedule if is_clip else "base")
        distilled = schedule == "distilled"
        height, width = self._size(defaults, given)
        request = replace(
            FilledRequest(**vars(self)),
            negative_prompt=DEFAULT_NEGATIVE_PROMPT if self.negative_prompt is None else self.negative_prompt,
            height=height,
            width=width,
            frames=defaults.frames if self.frames is None else self.frames,
            steps=(16 if distilled else 50) if self.steps is None else self.steps,
            guidance_scale=(1.0 if distilled else 4.0) if self.guidance_scale is None else self.guidance_scale,
            schedule=schedule,
            given=given,
            # Frames given in place of a file that a filled request names take its place.
            image=None if own else self.image,
            video=None if own else self.video,
        )
        request = replace(request, source=None if given is None else Source(request._files, given, notes))
        # Sizes first, by which a speed chooses.
        request._check_sizes()
        request = request._with_speed(defaults)
        request._check()
        return request

    @property
    def cond_frames(self) -> int:
        """Number of conditioning frames: 0, 1 for an image, `num_cond_frames` for a clip."""
        if self.given is None:
            return 0
        return 1 if len(self.given) == 1 else self.num_cond_frames

    @property
    def sparse_settings(self) -> Sparse | None:
        """Settings of sparse attention, or None."""
        if isinstance(self.sparse, Calibration):
            return self.sparse.sparse(kernel=self.sparse_kernel)
        if self.sparse is None or self.sparse_kernel == "auto":
            return self.sparse
        return replace(self.sparse, kernel=self.sparse_kernel)

    def notes(self) -> list[str]:
        """Warnings about a filled request that runs, though perhaps not as the user meant it."""
        notes = [] if self.source is None else list(self.source.notes)
        own = f"; {self.sparse.price()}" if isinstance(self.sparse, Calibration) else ""
        notes += [] if self.chosen is None else [note + own for note in self.chosen.notes()]
        if self.schedule == "distilled" and self.guidance_scale != 1:
            notes.append(f"the distilled schedule is made for guidance 1, not {self.guidance_scale:g}")
        if self.guidance_scale == 1 and self.negative_prompt not in ("", *NEGATIVE_PROMPTS):
            notes.append("the negative prompt has no effect at guidance 1")
        until, steps = self.guidance_until, self.steps
        if self.guidance_scale != 1 and until is not None and steps is not None and not guided_steps(until, steps):
            notes.append(f"guidance until {until:g} leaves guidance out of every step, as guidance 1 does")
        if self.step_cache is not None and self.step_cache > USEFUL_STEP_CACHE:
            notes.append(
                f"a step cache of {self.step_cache:g} skips nearly all steps that it may; thresholds "
                f"from 0.03 to {USEFUL_STEP_CACHE:g} are useful"
            )
        by_word = self.chosen is not None and "sparse" in self.chosen.values
        if isinstance(self.sparse, Sparse) and self.sparse.densities is None and not by_word:
            notes.append(
                f"the density of sparse attention, {self.sparse.density:g}, is not calibrated for this model; longcat "
                "calibrate finds densities that keep a budget of error"
            )
        if isinstance(self.sparse, Calibration):
            guidance = 1.0 if self.guidance_scale is None else self.guidance_scale
            notes += calibration.notes(
                self.sparse, "the calibration", schedule=self.schedule or "base", guidance=guidance
            )
        return notes

    @property
    def _files(self) -> tuple[Path | None, Path | None, int, float]:
        return self.image, self.video, self.num_cond_frames, self.fps

    def _frames(self) -> tuple[np.ndarray | None, bool, tuple[str, ...]]:
        """The conditioning frames, whether they were given rather than read from a file, and what reading did.

        Whoever changes the file of a filled request means the new file, and whoever changes its frames the new frames.
        """
        if self.given is None:
            return self._read()
        before = self.source or Source((None, None, self.num_cond_frames, self.fps), None)
        renamed = self._files[:2] != before.files[:2]
        if self.given is before.frames:
            # More conditioning frames, or at another rate, are read from the file again.
            from_file = self._files[:2] != (None, None) and self._files != before.files
            own = self._files[:2] == (None, None)
            return self._read() if renamed or from_file else (self.given, own, before.notes)
        if renamed and self._files[:2] != (None, None):
            raise LongCatError("frames and the file of an image or a video are both given; give only one of them")
        return self.given, True, ()

    def _read(self) -> tuple[np.ndarray | None, bool, tuple[str, ...]]:
        if self.image is not None:
            count = count_pictures(self.image)
            several = f"{self.image} holds {count} pictures; the first one is used"
            return read_image(self.image)[None], False, (several,) if count > 1 else ()
        if self.video is None:
            return None, False, ()
        with open_video(self.video, self.fps) as reader:
            sound = f"the sound of {self.video} is left out" if reader.has_sound else ""
            notes, frames = tuple(filter(None, (reader.note, sound))), reader.frames
            reader.take_at(self.fps, from_end=True)
            clip = reader.last(self.num_cond_frames)
        if len(clip) < self.num_cond_frames:
            most = nearest_frame_counts(len(clip))[0]
            raise LongCatError(
                f"video {self.video} lasts {frames / self.fps:.2f} s and has {len(clip)} frames at {self.fps:g} per "
                f"second, fewer than the {self.num_cond_frames} conditioning frames, which last "
                f"{self.num_cond_frames / self.fps:.2f} s; give a longer clip or at most {most} conditioning frames"
            )
        # A clip of one frame is an image to the model.
        return clip, False, notes

    def _size(self, defaults: Defaults, given: np.ndarray | None) -> tuple[int, int]:
        if self.height is None and self.width is None and given is not None and defaults.bucketed:
            return nearest_bucket(*given.shape[1:3])
        height = defaults.height if self.height is None else self.height
        width = defaults.width if self.width is None else self.width
        return height, width


class FilledRequest(GenerateRequest):
    """A checked request in which nothing is left to the model; `GenerateRequest.filled` makes it."""

    negative_prompt: str
    height: int
    width: int
    frames: int
    steps: int
    guidance_scale: float
    schedule: str
    step_cache: float
    guidance_until: float
    speed: Speed

    def begun(self, frames: np.ndarray) -> np.ndarray:
        """The video's frames, uint8 [F, H, W, 3], of which those of a clip are its own, fitted to the size.

        The VAE, which reads four frames as one, may blur them or move what is fast in them.
        """
        if self.given is None or self.cond_frames < 2:
            return frames
        own = resize_and_crop(self.given[-self.cond_frames :], self.height, self.width)
        return np.concatenate((own, frames[self.cond_frames :]))

    def beginning(self, put: Callable[[np.ndarray], None]) -> Callable[[np.ndarray], None]:
        """What takes the decoded frames part by part and passes those of `begun` on to `put`."""
        if self.given is None or self.cond_frames < 2:
            return put
        done = 0

        def part(frames: np.ndarray) -> None:
            nonlocal done
            if not done:
                put(self.begun(frames[:0]))
            new = frames[max(0, self.cond_frames - done) :]
            done += len(frames)
            if len(new):
                put(new)

        return part

    def _with_speed(self, defaults: Defaults) -> FilledRequest:
        """With what the speed decides. What an earlier one filled in is decided again, unless it was changed since."""
        speed = defaults.speed if self.speed is None else self.speed
        check_speed(speed)
        before = {} if self.chosen is None else self.chosen.values
        given = [
            name
            for name in EXACT_VALUES
            if (value := getattr(self, name)) is not None and not (name in before and value == before[name])
        ]
        frames, height, width = latent_shape(self.frames, self.height, self.width)[1:]
        if self.cond_frames:
            frames -= latent_frames(self.cond_frames)
        chosen = fit_request(
            speed,
            given,
            schedule=self.schedule,
            guided=self.guidance_scale != 1,
            # A token is 2x2 latents.
            tokens=frames * height * width // 4,
            kernel=self.sparse_kernel,
            loaded=defaults.loaded,
            avatar=defaults.audio is not None,
        )
        return replace(self, speed=speed, chosen=chosen, **chosen.values)

    def _check_sizes(self) -> None:
        for name, side in (("height", self.height), ("width", self.width)):
            check_side(name, side)
        check_frames(self.frames)

    def _check(self) -> None:
        if self.schedule not in SCHEDULES:
            raise LongCatError(f"unknown schedule {self.schedule!r}; choose one of {', '.join(SCHEDULES)}")
        most = DISTILLED_GRID if self.schedule == "distilled" else MAX_STEPS
        if not is_whole(self.steps) or not 1 <= self.steps <= most:
            raise LongCatError(f"{self.steps} steps are out of range; the {self.schedule} schedule takes 1 to {most}")
        check_mode(self.kv_cache)
        check_number("step cache", self.step_cache, 0.0, MAX_STEP_CACHE)
        check_number("guidance", self.guidance_scale, 0.0, MAX_GUIDANCE)
        check_number("guidance until", self.guidance_until, 0.0, 1.0)
        kinds = (Sparse, Calibration, type(None))
        check_type("sparse attention", self.sparse, kinds, "a Sparse, a Calibration or None")
        check_choice("sparse kernel", self.sparse_kernel, SPARSE_KERNELS)
        # Raises for a kernel that does not take these densities.
        _ = self.sparse_settings
        check_seed(self.seed)
        if self.given is None:
            return
        if len(self.given) < self.cond_frames:
            raise LongCatError(
                f"{len(self.given)} given frames are fewer than the {self.cond_frames} conditioning frames; give more"
            )
        if self.frames <= self.cond_frames:
            raise LongCatError(
                f"{self.frames} frames leave nothing to generate after {self.cond_frames} conditioning frames; "
                f"ask for at least {self.cond_frames + TEMPORAL_FACTOR} frames"
            )


def require_filled(request: GenerateRequest) -> FilledRequest:
    """The request itself. Raises LongCatError unless `filled` made it."""
    if not isinstance(request, FilledRequest):
        raise LongCatError("the request is not filled; give request.filled(pipeline.defaults)")
    return request


def work_of(request: GenerateRequest, overlap: int | None = None) -> Work:
    """The memory-relevant sizes of sampling a filled request. overlap: conditioning frames of later segments."""
    request = require_filled(request)
    if overlap is not None:
        check_whole("the overlap", overlap)
    given = max(request.cond_frames, overlap or 0)
    shape = latent_shape(request.frames, request.height, request.width)
    cond = latent_frames(given) if given and request.kv_cache != "off" else 0
    return Work((1, *shape), request.guidance_scale != 1, cond)


def check_side(name: str, pixels: int) -> None:
    """Raise LongCatError, with the nearest valid side, unless `pixels` is a multiple of 16 from 16 to 4096."""
    if not is_whole(pixels):
        raise LongCatError(f"{name} {pixels} must be a whole number of pixels, a multiple of {SIDE_MULTIPLE}")
    if not SIDE_MULTIPLE <= pixels <= MAX_SIDE:
        raise LongCatError(f"{name} {pixels} is out of range; give {SIDE_MULTIPLE} to {MAX_SIDE} pixels")
    if pixels % SIDE_MULTIPLE:
        nearest = min(MAX_SIDE, (pixels + SIDE_MULTIPLE // 2) // SIDE_MULTIPLE * SIDE_MULTIPLE)
        raise LongCatError(f"{name} {pixels} is not a multiple of {SIDE_MULTIPLE}; the nearest one is {nearest}")


def check_frames(frames: int, name: str = "") -> None:
    """Raise LongCatError with the nearest counts unless `frames` is 4k+1 from 1 to 2001. name: of the input."""
    prefix = f"{name}: " if name else ""
    if not is_whole(frames) or not 1 <= frames <= MAX_FRAMES:
        raise LongCatError(f"{prefix}{frames} frames are out of range; give 1 to {MAX_FRAMES}, of the form 4k+1")
    latent_frames(frames, name)


def check_number(name: str, value: float, least: float, most: float) -> None:
    """Raise LongCatError unless `value` is a finite number from `least` to `most`."""
    if not is_number(value) or not least <= value <= most or not math.isfinite(value):
        raise LongCatError(f"{name} {value} is out of range; give a number from {least:g} to {most:g}")


def check_seed(seed: int) -> None:
    """Raise LongCatError unless `seed` is a whole number from 0 to 2^63 - 1."""
    if not is_whole(seed) or not 0 <= seed <= MAX_SEED:
        raise LongCatError(f"seed {seed} is out of range; give a whole number from 0 to 2^63 - 1")


def _check_given(frames: np.ndarray | None) -> None:
    if frames is None:
        return
    check_type("what is given", frames, np.ndarray, "frames as a uint8 array [F, H, W, 3]")
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or not frames.size:
        raise LongCatError(f"given frames are {frames.dtype} {list(frames.shape)}; give uint8 [F, H, W, 3]")


def check_text(name: str, text: str) -> None:
    """Raise LongCatError unless `text` is text that can be encoded."""
    if not isinstance(text, str):
        raise LongCatError(f"the {name} is a {type(text).__name__}; give text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise LongCatError(f"the {name} is not valid UTF-8 at character {error.start}; type it again") from error
