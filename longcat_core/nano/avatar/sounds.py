"""Sounds like speech, and how far a mouth that says them is open."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...generate.audio.speech import RATE

FPS = 25
PITCH = (90.0, 260.0)  # Hz
SYLLABLE, PAUSE = (0.16, 0.36), (0.15, 0.6)  # seconds
HARMONICS = 10
# The amplitude, after leveling to -23 LUFS, at which a mouth is wide open, and the seconds over which it is taken.
WIDE, SPAN = 0.13, 0.12


def voice(seed: int, seconds: float) -> np.ndarray:
    """Somebody who talks, [N] fp64 at 16 kHz: syllables of harmonics and breath, with pauses between phrases.

    The same seed gives the same sound.
    """
    rng = np.random.default_rng([seed, 25])
    count = round(seconds * RATE)
    loudness, pitch = np.zeros(count), np.full(count, 1.0)
    at = int(rng.uniform(0, 0.4) * RATE)
    while at < count:
        for _ in range(rng.integers(2, 8)):
            size = int(rng.uniform(*SYLLABLE) * RATE)
            rise = np.sin(np.pi * (np.arange(size) + 0.5) / size) ** 1.5
            part = slice(at, min(at + size, count))
            loudness[part] = rng.uniform(0.25, 1.0) * rise[: max(0, count - at)]
            pitch[part] = rng.uniform(0.85, 1.2)
            at += size
        at += int(rng.uniform(*PAUSE) * RATE)
    phase = 2 * np.pi * rng.uniform(*PITCH) * np.cumsum(pitch) / RATE
    timbre = rng.uniform(0.3, 1.0, HARMONICS) / np.arange(1, HARMONICS + 1) ** 0.7
    tone = sum(strength * np.sin(k * phase) for k, strength in enumerate(timbre, 1))
    breath = np.convolve(rng.standard_normal(count), np.ones(4) / 4, mode="same")
    sound = loudness * (tone / np.std(tone) + rng.uniform(0.1, 0.5) * breath)
    return 0.25 * sound / max(1e-9, np.abs(sound).max())


def opening(speech: Tensor, frames: int) -> Tensor:
    """How far a mouth is open, [frames] fp32 in 0..1, at 25 frames per second, from speech [N] fp64 at -23 LUFS.

    It grows with the amplitude around the middle of a frame. Behind the end of the speech the mouth is closed.
    """
    step, span = RATE // FPS, round(SPAN * RATE)
    window = torch.hann_window(span, dtype=torch.float64)
    window /= window.sum()
    before = span // 2 - step // 2
    padded = F.pad(speech.square(), (before, max(0, frames * step + span - len(speech))))
    power = padded.unfold(0, span, step)[:frames] @ window
    return (power.clamp(min=0).sqrt() / WIDE).clamp(max=1).float()
