"""Measure how well the nano avatar speaks: fresh sounds, fixed seeds, plain image analysis."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ...checkpoints.load import load_transformer
from ...errors import CheckpointError
from ...files.media import Sound
from ...generate.audio import AudioEncoder, combine, load_audio_encoder
from ...generate.audio.speech import RATE, leveled
from ...generate.avatar import AvatarRequest, make_segment
from ...generate.engine import Engine
from ...generate.paths import NANO_AUDIO_ENCODER, NANO_AVATAR_MODEL, NANO_AVATAR_VAE, NANO_TEXT_ENCODER
from ...generate.pipeline import Pipeline
from ...generate.request import NANO, Defaults, GenerateRequest
from ...generate.segments import Segment
from ...generate.text_cache import CachedTextEncoder
from ...generate.vae import load_vae
from ..world import to_bytes
from .recipe import EAR_FILE, MODEL_FILE, TEXT_FILE, VAE_FILE
from .scorer import Seen, correlation, look, shuffled
from .sounds import FPS, opening, voice
from .world import FRAMES, Scene, caption, place, render, sample_scene

# Transformer, VAE, text encoder and audio encoder that come with the pack.
BUNDLED = NANO_AVATAR_MODEL, NANO_AVATAR_VAE, NANO_TEXT_ENCODER, NANO_AUDIO_ENCODER
OVERLAP = 13
SEGMENTS, PAIR_SEGMENTS = 5, 2
# Seeds of voices that training does not draw.
FRESH = 7_000_000
# The least correlation of a mouth with its own voice in a pair that is right.
HEARD = 0.5
# Called after every step.
Stepped = Callable[[object], None]


@dataclass(frozen=True)
class Spoken:
    """A video, what it should show, and what each face said. loudness: [F] of each face, as `opening` has it."""

    scene: Scene
    frames: np.ndarray
    loudness: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Scores:
    """Of one face: correlation of mouths with their own sounds, and shuffled with those of others; kept: segments whose
    face and background are those of the first one; named: videos whose face and background are those of the prompt. Of
    two faces: pairs in which each mouth follows its own voice. Counts are (right, all)."""

    correlations: tuple[float, ...]
    shuffled: float
    kept: tuple[int, int]
    named: tuple[int, int]
    pairs: tuple[int, int]

    @property
    def correlation(self) -> float:
        return float(np.mean(self.correlations))


def frames_of(segments: int) -> int:
    """How many video frames these segments have."""
    return FRAMES + (segments - 1) * (FRAMES - OVERLAP)


def picture(scene: Scene, seed: int) -> np.ndarray:
    """The scene with closed mouths, uint8 [1, H, W, 3]."""
    return to_bytes(render(place([scene], seed), torch.zeros(1, 2, 1))[0])


def request_of(scene: Scene, number: int, segments: int, steps: int, image: bool) -> AvatarRequest:
    """A request, not filled, whose voices and seed depend on the number alone."""
    seconds, people = frames_of(segments) / FPS, len(scene.faces)
    # Half of the pairs speak at once, half one after the other.
    turns = people == 2 and number % 2 == 1
    waves = [voice(FRESH + 2 * number + i, seconds / 2 if turns else seconds) for i in range(people)]
    sounds = [Sound(torch.from_numpy(wave).float()[None], RATE) for wave in waves]
    given = picture(scene, number) if image else None
    first = GenerateRequest(caption(scene), seed=number, steps=steps, guidance_scale=1.0, given=given)
    voices = combine(sounds, "add" if turns else "para")
    return AvatarRequest(first, voices, (caption(scene),), segments=segments, audio_guidance=1.0, schedule="base")


def speak(
    engine: Engine, encoder: AudioEncoder, defaults: Defaults, asked: AvatarRequest, scene: Scene, stepped: Stepped
) -> Spoken:
    """All segments of a request."""
    request = asked.filled(defaults)
    heard = request.embed(encoder)
    before: Segment | None = None
    reference, shown = None, []
    for number in range(request.count):
        frames, latents = make_segment(engine, request, number, heard, before, reference, stepped)
        if before is None:
            reference = latents[:, :, :1].clone()
        shown.append(frames if before is None else frames[OVERLAP:])
        before = Segment(frames, latents, "")
    video = np.concatenate(shown)[: request.total_frames]
    loudness = tuple(opening(leveled(wave), len(video)).numpy() for wave in request.voices.speakers)
    return Spoken(scene, video, loudness)


def judge(alone: Sequence[Spoken], pairs: Sequence[Spoken]) -> Scores:
    """Scores of videos of one face and of two."""
    openings, found, kept, named = [], [], [], []
    for spoken in alone:
        ends = [FRAMES + i * (FRAMES - OVERLAP) for i in range(SEGMENTS)]
        starts = [0, *ends[:-1]]
        looks = [_identity(spoken.frames[a:b]) for a, b in zip(starts, ends, strict=True) if a < len(spoken.frames)]
        kept += [one == looks[0] for one in looks[1:]]
        face = spoken.scene.faces[0]
        named.append(looks[0] == (spoken.scene.background, face.head, face.color))
        seen = look(spoken.frames, 1)[1][0]
        openings.append(np.zeros(len(spoken.frames)) if seen is None else seen.opening)
        found.append(correlation(openings[-1], spoken.loudness[0]))
    right = [pair_is_right(look(spoken.frames, 2)[1], spoken.loudness) for spoken in pairs]
    control = shuffled(openings, [spoken.loudness[0] for spoken in alone])
    return Scores(tuple(found), control, *((sum(part), len(part)) for part in (kept, named, right)))


def _identity(frames: np.ndarray) -> tuple[str, ...]:
    background, (seen,) = look(frames, 1)
    return (background,) if seen is None else (background, seen.head, seen.color)


def pair_is_right(faces: Sequence[Seen | None], loudness: Sequence[np.ndarray]) -> bool:
    """Whether each of two mouths follows its own voice, and follows it more than the other one's."""
    for face, own, other in zip(faces, loudness, reversed(loudness), strict=True):
        if face is None:
            return False
        follows = correlation(face.opening, own)
        if follows < HEARD or follows <= correlation(face.opening, other):
            return False
    return True


def load_avatar(folder: Path | None, device: torch.device) -> tuple[Pipeline, AudioEncoder]:
    """The avatar that `recipe.train_avatar` wrote into a folder, in fp32, or the bundled one.

    Raises CheckpointError without one.
    """
    files = BUNDLED if folder is None else tuple(folder / file for file in (MODEL_FILE, VAE_FILE, TEXT_FILE, EAR_FILE))
    for file in files:
        if not file.exists():
            raise CheckpointError(f"{file} does not exist; train an avatar with longcat train-nano --size avatar")
    transformer, vae, text, ear = files
    model = load_transformer(transformer, device=device)
    parts = model, load_vae(vae, device=device), CachedTextEncoder(text, torch.float32, device)
    return Pipeline(*parts, replace(NANO, audio=model.config.audio)), load_audio_encoder(ear, device=device)


def measure(
    engine: Pipeline,
    encoder: AudioEncoder,
    count: int,
    steps: int,
    each: Callable[[Spoken], None] = lambda spoken: None,
    stepped: Stepped = lambda step: None,
) -> Scores:
    """Generate `count` videos of one face, every other one from a picture, and as many of two faces, and score them.

    each: called with every video. stepped: called after every step.
    """
    rng = random.Random("fresh avatars 0")
    alone: list[Spoken] = []
    pairs: list[Spoken] = []
    for number in range(count):
        for faces, into, segments in ((1, alone, SEGMENTS), (2, pairs, PAIR_SEGMENTS)):
            scene = sample_scene(rng, faces, faces)
            asked = request_of(scene, number, segments, steps, faces == 2 or number % 2 == 1)
            into.append(speak(engine, encoder, engine.defaults, asked, scene, stepped))
            each(into[-1])
    return judge(alone, pairs)
