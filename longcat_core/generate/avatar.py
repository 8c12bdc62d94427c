"""A person who speaks: segments that follow a sound, each from the end of the previous one, kept as in long video.

The first segment starts from a text, or from an image; all later ones also see its first latent frame, which keeps the
person the same. The public code decides the details: how a segment begins differs between versions 1.0 and 1.5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ..errors import LongCatError, check_type, plain_fields
from ..files.media import Sound, cover
from ..model.config import AudioConfig
from ..model.kv_cache import Reference
from ..optimize.plan import Work
from ..optimize.sparse.settings import Sparse
from ..sampling.avatar import Audio, ReferenceFrame
from ..sampling.conditioning import TEMPORAL_FACTOR, latent_frames, latent_shape, seeded_noise, to_pixels
from ..sampling.guidance import AVATAR_NEGATIVE_PROMPT, audio_parts, is_guided
from ..sampling.sampler import Callback, Step, check_finite
from ..sampling.schedules import DMD_STEPS, Schedule, is_newer, schedule_of
from .audio import AudioEncoder, Embeddings, Voices, embed_voices, frames_for, seconds_of, segments_for
from .engine import Engine
from .inputs import check_callback, check_json, check_whole
from .long_video import Finished, finished_segments, join_notes, new_frames, spread_prompts
from .options import MAX_FRAMES, MAX_GUIDANCE, MAX_SEED
from .people import Person, classes_of, masks_of, people_notes
from .request import Defaults, FilledRequest, GenerateRequest, check_number, check_text, require_filled
from .segment_folder import SegmentFolder
from .segments import Segment, checksum, seed_settings
from .takes import LOSSY, Settings, lossy_settings

FPS = {"1.0": 16, "1.5": 25}


@dataclass(frozen=True, eq=False)
class AvatarRequest:
    """A video of one person who speaks, or of two.

    first: the first segment. Its image is the first frame, cropped to the video's size; its guidance_scale is that of
    the text. The others copy everything except prompt and image, and count up from its seed. The rate is the model's.
    voices: what is said, from `combine`, one of each person. prompts: one for each segment, or fewer; the last one
    serves the rest. people: where each person of several is in the image, in the order of the voices: a box (top, left,
    bottom, right) in shares of the image, or a mask [h, w] of its pixels; further ones are of people who stay silent.
    (): the two halves of the image, left before right. segments: how many to make, if not as many as the sound needs.
    audio_guidance: from silence to the sound; 1: none. overlap: frames, 4k+1, that a segment shares with the previous
    one. schedule: of the segments after the first; None: the model's for continuing clips, or distilled if the first
    segment is. reference, skip: of the reference frame in later segments; see `Reference`. model, lossy: see
    `LongVideoRequest`.

    `filled` makes everything that is None or derived: audio is what the model hears, classes [S, K] says which tokens
    belong to whom.
    """

    first: GenerateRequest
    voices: Voices
    prompts: tuple[str, ...]
    people: tuple[Person, ...] = ()
    segments: int | None = None
    audio_guidance: float | None = None
    overlap: int = 13
    schedule: str | None = None
    reference: int = 10
    skip: int = 3
    model: Settings = field(default_factory=dict)
    lossy: dict[str, str] = field(default_factory=dict)
    audio: AudioConfig | None = field(default=None, repr=False)
    masks: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        plain_fields(self)

    def filled(self, defaults: Defaults) -> AvatarRequest:
        """The request with the model's defaults filled in. Raises LongCatError for values that do not fit."""
        check_type("the first segment", self.first, GenerateRequest, "a GenerateRequest")
        check_type("the voices", self.voices, Voices, "what combine returns")
        check_type("prompts", self.prompts, (tuple, list), "a tuple of texts")
        audio = defaults.audio
        if audio is None:
            raise LongCatError("the model does not hear audio; give LongCat-Video-Avatar")
        prompts = self.prompts
        # A filled request repeats its last prompt, which a changed number of segments is not held against.
        while self.audio is not None and len(prompts) > 1 and prompts[-1] == prompts[-2]:
            prompts = prompts[:-1]
        for number, prompt in enumerate(prompts, 1):
            check_text(f"prompt of segment {number}", prompt)
        for name, value in (("overlap", self.overlap), ("reference", self.reference), ("skip range", self.skip)):
            check_whole(f"the {name}", value)
        latent_frames(self.overlap, "overlap")
        check_number("reference frame", self.reference, -MAX_FRAMES, MAX_FRAMES)
        check_number("skip range", self.skip, 0, MAX_FRAMES)
        check_json("the description of the model", self.model)
        check_json("the lossy settings", self.lossy)
        first = self._first(audio, defaults.avatar_guidance).filled(defaults)
        if first.frames <= self.overlap:
            raise LongCatError(
                f"segments of {first.frames} frames that share {self.overlap} leave nothing new; ask for at least "
                f"{self.overlap + TEMPORAL_FACTOR} frames or a smaller overlap"
            )
        if first.given is not None and len(first.given) > 1:
            raise LongCatError("an avatar starts from one image, not from a clip; give an image or only a prompt")
        needed = segments_for(self.voices.seconds, int(first.fps), first.frames, self.overlap)
        if self.segments is not None:
            check_whole("the number of segments", self.segments)
            if self.segments > needed:
                raise LongCatError(f"the sound fills {needed} segments, not {self.segments}; ask for at most {needed}")
        distilled = first.schedule == "distilled"
        schedule = self.schedule or ("distilled" if distilled else defaults.clip_schedule)
        usual = 1.0 if distilled else defaults.avatar_guidance
        guidance = usual if self.audio_guidance is None else self.audio_guidance
        check_number("audio guidance", guidance, 0.0, MAX_GUIDANCE)
        request = replace(
            self,
            first=first,
            prompts=spread_prompts(prompts, needed if self.segments is None else self.segments),
            schedule=schedule,
            audio_guidance=guidance,
            audio=audio,
            masks=masks_of(self.people, len(self.voices.speakers), first.given),
        )
        for number in range(min(2, request.count)):
            request.schedule_of(number)
        request.classes()
        return request

    def _first(self, audio: AudioConfig, guidance: float) -> GenerateRequest:
        """The first segment with what an avatar has otherwise than LongCat-Video. guidance: where not distilled."""
        first, newer = self.first, is_newer(audio)
        if first.video is not None:
            raise LongCatError("an avatar starts from one image, not from a clip; give an image or only a prompt")
        distilled = first.schedule == "distilled"
        steps = DMD_STEPS if newer and distilled else None
        scale = 1.0 if distilled else guidance
        return replace(
            first,
            prompt=self.prompts[0] if self.prompts else first.prompt,
            negative_prompt=AVATAR_NEGATIVE_PROMPT if first.negative_prompt is None else first.negative_prompt,
            steps=steps if first.steps is None else first.steps,
            guidance_scale=scale if first.guidance_scale is None else first.guidance_scale,
            fps=float(FPS["1.5" if newer else "1.0"]),
        )

    # --- of a filled request -----------------------------------------------------------------------------------------

    @property
    def filled_first(self) -> FilledRequest:
        """The first segment. Raises LongCatError for a request that is not filled."""
        if self.audio is None:
            raise LongCatError("the request is not filled; give request.filled(pipeline.defaults)")
        return require_filled(self.first)

    @property
    def count(self) -> int:
        """How many segments are made."""
        return len(self.prompts)

    @property
    def fps(self) -> float:
        return self.filled_first.fps

    @property
    def total_frames(self) -> int:
        """Frames of the whole video, which ends with the sound."""
        frames = self.filled_first.frames
        made = frames + (self.count - 1) * (frames - self.overlap)
        return min(made, frames_for(self.voices.seconds, self.fps))

    @property
    def track(self) -> Sound:
        """The sound of the whole video."""
        return self.voices.track.cut(self.total_frames / self.fps)

    @property
    def guided(self) -> bool:
        """Whether sampling reads the negative prompt."""
        return is_guided(self.filled_first.guidance_scale, self.audio_guidance or 0.0)

    @property
    def seconds(self) -> float:
        """How long the sound is for the audio encoder: as long as all segments that it needs."""
        first = self.filled_first
        needed = segments_for(self.voices.seconds, int(first.fps), first.frames, self.overlap)
        return seconds_of(needed, int(first.fps), first.frames, self.overlap)

    @property
    def others(self) -> bool:
        """Whether there are people who stay silent."""
        return len(self.people) > len(self.voices.speakers)

    def classes(self) -> Tensor | None:
        """Which of a frame's tokens belong to whom, [S, K] bool, as `Audio` has them; None for one person."""
        return None if self.masks is None else classes_of(self.masks, self.filled_first.height, self.filled_first.width)

    def schedule_of(self, number: int) -> Schedule:
        """The noise schedule of a segment."""
        mode = self.schedule if number else self.filled_first.schedule
        assert mode is not None, "filled in"
        return schedule_of(self.audio, mode, self.filled_first.steps)

    def embed(self, encoder: AudioEncoder) -> Embeddings:
        """What the network hears, of the whole sound. Raises LongCatError for the audio encoder of another version."""
        seed = self.filled_first.seed
        encoder.check(self.audio)
        return embed_voices(encoder, self.voices, self.seconds, others=self.others, seed=seed)

    def work(self) -> Work:
        """The memory-relevant sizes of sampling the largest segment."""
        first = self.filled_first
        channels, frames, height, width = latent_shape(first.frames, first.height, first.width)
        later = self.count > 1
        cond = 1 + latent_frames(self.overlap) if later else first.cond_frames
        return Work(
            (1, channels, frames + later, height, width),
            self.guided,
            cond if first.kv_cache != "off" else 0,
            speakers=len(self.voices.speakers) + self.others,
            parts=1 + sum(audio_parts(first.guidance_scale, self.audio_guidance or 0.0)[0]),
        )

    def reads(self) -> list[str]:
        """All prompts that the text encoder reads."""
        return [*self.prompts, *([self.filled_first.negative_prompt] if self.guided else [])]

    def notes(self) -> list[str]:
        """Warnings about a request that runs, though perhaps not as the user meant it."""
        first, audio, density = self.filled_first, self.audio_guidance or 1.0, []
        if isinstance(first.sparse, Sparse):
            density = [f"the density of sparse attention, {first.sparse.density:g}, was not measured on an avatar"]
            first = replace(first, sparse=None)
        # The negative prompt has an effect where one of the two has.
        first = replace(first, guidance_scale=max(1.0, first.guidance_scale, audio))
        notes = [*first.notes(), *density, *self.voices.notes]
        return notes if self.masks is None else notes + people_notes(self.masks)

    def settings(self, number: int) -> Settings:
        """Everything that decides a segment's frames, except the previous segment."""
        first = self.filled_first
        names = ("height", "width", "frames", "steps", "guidance_scale")
        settings = {name: getattr(first, name) for name in names}
        settings |= {
            "prompt": self.prompts[number],
            "schedule": self.schedule_of(number).mode,
            "audio guidance": self.audio_guidance,
            "sound": checksum(*(wave.numpy() for wave in self.voices.speakers), f"{self.seconds:.6f}"),
        }
        if self.guided:
            settings["negative"] = first.negative_prompt
        if self.masks is not None:
            settings["people"] = checksum(self.masks.numpy())
        if number:
            settings |= {"overlap": self.overlap, "reference": self.reference, "skip range": self.skip}
        elif first.given is not None:
            settings["given frames"] = checksum(first.given)
        lossy = lossy_settings(
            step_cache=first.step_cache,
            guidance_until=first.guidance_until if self.guided else 1.0,
            sparse=first.sparse_settings,
        )
        lossy |= self.lossy
        return settings | seed_settings(self.seed(number)) | self.model | ({LOSSY: lossy} if lossy else {})

    def seed(self, number: int) -> int:
        """The seed of a segment's noise."""
        return (self.filled_first.seed + number) % (MAX_SEED + 1)


def make_segment(
    engine: Engine,
    request: AvatarRequest,
    number: int,
    embeddings: Embeddings,
    before: Segment | None = None,
    reference: Tensor | None = None,
    callback: Callback | None = None,
) -> tuple[np.ndarray, Tensor]:
    """Frames, uint8 [F, H, W, 3], and latents [1, C, T, H/8, W/8] fp32 on the CPU of one segment of a filled request.

    before: the previous segment, None for the first. reference: the first latent frame of the first segment,
    [1, C, 1, H/8, W/8]; later segments need it.
    """
    first, audio = request.filled_first, request.audio
    assert audio is not None and request.audio_guidance is not None, "filled in"
    tail: Tensor | None = None
    clean: Tensor | None = None
    apart: ReferenceFrame | None = None
    with engine.turn():
        if before is not None:
            assert reference is not None, "later segments need the first one"
            tail = _encoded(engine, before.frames[-request.overlap :])
            clean = start_of(audio, before.latents, tail)
            apart = ReferenceFrame(reference, Reference(request.reference, request.skip))
        elif first.given is not None:
            clean = _encoded(engine, cover(first.given[0], first.height, first.width)[None])
        shape = latent_shape(first.frames, first.height, first.width, engine.channels)
        windows = embeddings.windows(number * (first.frames - request.overlap), first.frames)
        latents = engine.denoise(
            seeded_noise((1, *shape), request.seed(number)),
            request.schedule_of(number),
            request.prompts[number],
            negative_prompt=first.negative_prompt,
            guidance_scale=first.guidance_scale,
            cond_latents=clean,
            kv_cache=first.kv_cache,
            step_cache=first.step_cache,
            callback=callback,
            guidance_until=first.guidance_until,
            sparse=first.sparse_settings,
            audio=Audio(windows, request.classes(), request.audio_guidance),
            reference=apart,
        )
        check_finite(latents)
        latents = latents if tail is None else begun_with(tail, latents)
        # Cut, not rounded, as those that the public code encodes again.
        return np.concatenate(list(engine.decode_frames(latents, truncated=True))), latents.cpu()


def start_of(audio: AudioConfig, before: Tensor, tail: Tensor) -> Tensor:
    """The clean latents that a later segment is sampled from.

    before: the latents of the previous segment; tail: its last frames, encoded again. 1.5 was trained on these, 1.0 on
    the latents themselves.
    """
    return tail if is_newer(audio) else before[:, :, -tail.shape[2] :]


def begun_with(tail: Tensor, latents: Tensor) -> Tensor:
    """The latents of a later segment, which begin with those encoded again in both versions, and are decoded so."""
    return torch.cat((tail.to(latents), latents[:, :, tail.shape[2] :]), dim=2)


def _encoded(engine: Engine, frames: np.ndarray) -> Tensor:
    return engine.encode(to_pixels(torch.from_numpy(frames.copy())))


def avatar_video(
    load: Callable[[], Engine],
    hear: Callable[[], Embeddings],
    request: AvatarRequest,
    folder: SegmentFolder,
    callback: Callable[[int, int, Step], None] | None = None,
) -> Iterator[Finished]:
    """Generate the missing segments of a filled request; each is in the folder when it is yielded.

    folder: what `segment_folder` returns. hear: what the network hears, from `AvatarRequest.embed`; called before the
    first missing segment, and then load; neither is called if no segment is missing. callback: called after each step
    with the segment's number, the number of segments, and the step; what it raises ends the run, and finished segments
    stay. The same request gives the same frames however often it was interrupted; see `long_video`. Raises LongCatError
    for a take in use, and for a full disk.
    """
    check_type("the request", request, AvatarRequest, "an AvatarRequest")
    check_type("the folder", folder, SegmentFolder, "what segment_folder returns")
    check_callback(load, "what loads the model")
    check_callback(hear, "what embeds the sound")
    check_callback(callback)
    first, count = request.filled_first, request.count
    engine, embeddings = cache(load), cache(hear)
    begun: list[Tensor] = []

    def make(number: int, before: Segment | None) -> tuple[np.ndarray, Tensor, Settings]:
        def after(step: Step) -> None:
            # What cannot be kept is not computed to its end.
            folder.take.check_there()
            if callback is not None:
                callback(number, count, step)

        check_type(
            "what embeds the sound returned", heard := embeddings(), Embeddings, "what AvatarRequest.embed returns"
        )
        if number and not begun:
            begun.append(folder.take.load(0).latents[:, :, :1])
        reference = begun[0] if number else None
        frames, latents = make_segment(engine(), request, number, heard, before, reference, after)
        if not number:
            begun.append(latents[:, :, :1].clone())
        return frames, latents, join_notes(before, frames, request.overlap)

    settings = [request.settings(number) for number in range(count)]
    yield from finished_segments(folder, settings, make, first, request.overlap)


def spoken_frames(folder: SegmentFolder, finished: Sequence[Finished], request: AvatarRequest) -> Iterator[np.ndarray]:
    """The frames of the whole video, segment by segment, until the sound ends: uint8 [F, H, W, 3], none twice."""
    left = request.total_frames
    for frames in new_frames(folder, finished):
        if left > 0:
            yield frames[:left]
        left -= len(frames)
