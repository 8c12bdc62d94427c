"""Sound as the audio encoders hear it: one channel, 16 kHz, at one loudness."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import LongCatError
from ...files.media import Sound
from .filters import filtered, high_pass, high_shelf

RATE = 16000
LOUDNESS = -23.0  # LUFS
# What a sound must last, in seconds: a block of the loudness meter.
BLOCK = 0.4
# Of the blocks of the meter that follow each other.
STEP = 0.25
# Blocks that are quieter do not count: LUFS, and LU below the mean of those that are louder than that.
SILENCE, GATE = -70.0, -10.0
# The K-weighting of ITU-R BS.1770, at any rate.
WEIGHTING = (high_shelf(1500.0, 4.0, 1 / math.sqrt(2), RATE), high_pass(38.0, 0.5, RATE))


def mono(sound: Sound) -> Tensor:
    """The mean of a sound's channels at 16 kHz, [N] fp64."""
    mixed = Sound(sound.samples.double().mean(0, keepdim=True).float(), sound.rate)
    return mixed.resampled(RATE).samples[0].double()


def padded(wave: Tensor, seconds: float) -> Tensor:
    """A sound [N] at 16 kHz with zeros behind it until it lasts `seconds`; a longer one stays as it is."""
    return F.pad(wave, (0, max(0, math.ceil((seconds - len(wave) / RATE) * RATE))))


def loudness(wave: Tensor) -> float:
    """The integrated loudness of a sound [N] fp64 at 16 kHz in LUFS (ITU-R BS.1770-4); -inf for silence.

    Raises LongCatError for a sound that is shorter than one block of 0.4 s.
    """
    seconds = len(wave) / RATE
    if seconds < BLOCK:
        raise LongCatError(f"the sound lasts {math.floor(1000 * seconds)} ms; give at least {1000 * BLOCK:.0f} ms")
    squares = filtered(wave, WEIGHTING).square_()
    # Rounded and cut as in pyloudnorm, so that the blocks are the same.
    count = round((seconds - BLOCK) / (BLOCK * STEP)) + 1
    cuts = [(int(BLOCK * (i * STEP) * RATE), int(BLOCK * (i * STEP + 1) * RATE)) for i in range(count)]
    powers = torch.stack([squares[start:stop].sum() for start, stop in cuts]) / (BLOCK * RATE)
    levels = -0.691 + 10 * powers.log10()
    heard = levels >= SILENCE
    if not heard.any():
        return -math.inf
    gate = _level(powers[heard]) + GATE
    return _level(powers[(levels > gate) & (levels > SILENCE)])


def _level(powers: Tensor) -> float:
    return float(-0.691 + 10 * powers.mean().log10()) if len(powers) else -math.inf


def leveled(wave: Tensor) -> Tensor:
    """A sound [N] fp64 at 16 kHz at a loudness of -23 LUFS; silence stays as it is. Raises as `loudness`."""
    found = loudness(wave)
    return wave if found == -math.inf else wave * 10 ** ((LOUDNESS - found) / 20)


def speech(sound: Sound, seconds: float = 0.0) -> Tensor:
    """What an encoder hears of a sound, [N] fp64 at 16 kHz: mono, padded to `seconds`, at -23 LUFS.

    Raises LongCatError for a sound that is shorter than 0.4 s.
    """
    return leveled(padded(mono(sound), seconds))
