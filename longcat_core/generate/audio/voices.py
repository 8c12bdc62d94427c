"""The sounds of one or several people, put together in time, and their embeddings for the segments of a video."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import LongCatError, check_choice, check_type, is_whole
from ...files.media import Sound
from ...sampling.avatar import audio_windows
from .encoder import AudioEncoder
from .speech import BLOCK, RATE, leveled, loudness, mono, padded

# para: everybody at once; add: one after another.
Mode = Literal["para", "add"]
# Video frames of a segment, and of those that it has in common with the one before.
FRAMES, OVERLAP = 93, 13
# Frames by which a sound may be longer than a video: containers round its length to a millisecond.
ROUNDED = 0.05


@dataclass(frozen=True)
class Voices:
    """What each person says, and what is heard of all.

    speakers: [N] fp64 at 16 kHz for each person, as loud as recorded; zeros while silent. track: the sum of the sounds,
    for the video, turned down where it exceeds full scale. notes: what was done, a sentence each.
    """

    speakers: tuple[Tensor, ...]
    track: Sound
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        return len(self.speakers[0]) / RATE


@dataclass(frozen=True)
class Embeddings:
    """What a network hears of people. values: [P, N, groups, channels] fp32 on the CPU; fps: frames per second of the
    video; stride: embeddings for each of its frames."""

    values: Tensor
    fps: int
    stride: int

    def windows(self, first: int, frames: int) -> Tensor:
        """Of these video frames, from number `first` of the whole video on: [P, frames, 5, groups, channels]."""
        windows = [audio_windows(speaker, first * self.stride, frames, self.stride) for speaker in self.values]
        return torch.cat(windows)


def seconds_of(segments: int, fps: int, frames: int = FRAMES, overlap: int = OVERLAP) -> float:
    """How many seconds a video of this many segments lasts."""
    # In the order of the public code, which pads the sound to it.
    return frames / fps + (segments - 1) * (frames - overlap) / fps


def frames_for(seconds: float, fps: float) -> int:
    """How many frames a video needs to last as long as a sound."""
    return max(1, math.ceil(seconds * fps - ROUNDED))


def segments_for(seconds: float, fps: int, frames: int = FRAMES, overlap: int = OVERLAP) -> int:
    """How many segments a video needs to last as long as a sound."""
    return 1 + max(0, math.ceil((frames_for(seconds, fps) - frames) / (frames - overlap)))


def combine(sounds: Sequence[Sound | None], mode: Mode = "para") -> Voices:
    """The sounds of one or several people, in their order; None for one who is silent throughout.

    mode: "para" has all sounds begin at once, with silence behind the shorter ones; "add" has one after another, with
    silence of each person while the others speak. Raises LongCatError if nobody is heard, and for a sound that is
    shorter than 0.4 s.
    """
    check_choice("the mode of several sounds", mode, get_args(Mode))
    check_type("sounds", sounds, (list, tuple), "a list with a Sound, or None, for each person")
    for sound in sounds:
        check_type("a sound", sound, (Sound, type(None)), "a Sound, or None for silence")
    given = [sound for sound in sounds if sound is not None]
    if not given:
        raise LongCatError("no sound is given; give one for at least one person")
    for number, sound in enumerate(sounds, 1):
        if sound is not None and sound.seconds < BLOCK:
            lasts = math.floor(1000 * sound.seconds)
            raise LongCatError(f"{_which(number, sounds)} lasts {lasts} ms; give at least {1000 * BLOCK:.0f} ms")
    waves = [None if sound is None else mono(sound) for sound in sounds]
    silent = [wave is None or loudness(wave) == -math.inf for wave in waves]
    for number, (sound, quiet) in enumerate(zip(sounds, silent, strict=True), 1):
        if quiet and sound is not None and sound.samples.mean(0).abs().max() < 0.01 * sound.samples.abs().max():
            raise LongCatError(
                f"the channels of {_which(number, sounds)} cancel each other out in their mean, which the model hears; "
                "give one of them"
            )
    if all(silent):
        raise LongCatError("the sound is silent, below -70 LUFS throughout; give one in which somebody speaks")
    notes = [
        f"{_which(number, sounds)} is silent, below -70 LUFS throughout"
        for number, (wave, quiet) in enumerate(zip(waves, silent, strict=True), 1)
        if quiet and wave is not None
    ]
    lengths = [0 if wave is None else len(wave) for wave in waves]
    if mode == "para":
        if len(set(filter(None, lengths))) > 1:
            notes.append(f"the shorter sounds are silent behind their ends until {max(lengths) / RATE:.2f} s")
        starts, total = [0] * len(waves), max(lengths)
    else:
        starts, total = [sum(lengths[:i]) for i in range(len(waves))], sum(lengths)
    speakers = [
        torch.zeros(total, dtype=torch.float64) if wave is None else F.pad(wave, (start, total - start - len(wave)))
        for wave, start in zip(waves, starts, strict=True)
    ]
    begins = [start / RATE for start, sound in zip(starts, sounds, strict=True) if sound is not None]
    track, peak = _mixed(given, begins)
    if peak > 1:
        notes.append(f"the video's sound is turned down by {20 * math.log10(peak):.1f} dB, down to full scale")
    return Voices(tuple(speakers), track, tuple(notes))


def _which(number: int, sounds: Sequence[Sound | None]) -> str:
    return "the sound" if len(sounds) == 1 else f"the sound of person {number}"


def _mixed(sounds: Sequence[Sound], begins: Sequence[float]) -> tuple[Sound, float]:
    """The sum of sounds that begin at these seconds, at the highest of their rates, at most at full scale; its peak
    before it was turned down to that."""
    rate, channels = max(sound.rate for sound in sounds), max(len(sound.samples) for sound in sounds)
    parts = [(round(begin * rate), sound.resampled(rate).samples) for begin, sound in zip(begins, sounds, strict=True)]
    total = torch.zeros(channels, max(at + samples.shape[1] for at, samples in parts))
    for at, samples in parts:
        # What has fewer channels is heard in all of them.
        samples = samples if len(samples) == channels else samples.mean(0, keepdim=True)
        total[:, at : at + samples.shape[1]] += samples
    peak = float(total.abs().max())
    return Sound(total / max(1.0, peak), rate), peak


def embed_voices(
    encoder: AudioEncoder, voices: Voices, seconds: float, *, others: bool = False, seed: int = 0
) -> Embeddings:
    """Embeddings of all speakers, at one loudness each, with silence behind them until `seconds`.

    others: add the embedding of silence as that of the people who are not among them. seed: of the noise floor of
    version 1.0, which differs from speaker to speaker. Raises LongCatError as `AudioEncoder.embed`.
    """
    if not is_whole(seed):
        raise LongCatError(f"the seed cannot be {seed!r}; give a whole number")
    waves = [leveled(padded(wave, seconds)) for wave in voices.speakers]
    waves += [torch.zeros_like(waves[0])] * others
    found = [encoder.embed(wave, seed=seed + number) for number, wave in enumerate(waves)]
    return Embeddings(torch.stack(found), encoder.fps, encoder.stride)
