"""One channel, 16 kHz, one loudness; the values of a whole sound are among the golden cases of `longcat verify`."""

from __future__ import annotations

import math

import pytest
import torch

from longcat_core.errors import LongCatError
from longcat_core.files.media import Sound
from longcat_core.generate.audio import speech
from longcat_core.generate.audio.speech import RATE, leveled, loudness, padded


def tone(hertz: float = 997.0, seconds: float = 2.0, rate: int = RATE) -> torch.Tensor:
    return torch.sin(2 * math.pi * hertz * torch.arange(round(seconds * rate), dtype=torch.float64) / rate)


def test_loudness_of_the_tone_that_calibrates_meters() -> None:
    """ITU-R BS.1770-4: a sine of 997 Hz at full scale in one channel has -3.01 LUFS. At 16 kHz it is 0.07 less."""
    assert loudness(tone()) == pytest.approx(-3.01, abs=0.1)
    assert loudness(tone() / 100) == pytest.approx(loudness(tone()) - 40)


def test_loudness_does_not_count_pauses_and_whispers() -> None:
    wave = torch.cat([tone(seconds=4), torch.zeros(8 * RATE), tone(seconds=8) / 1000])
    # Blocks across the border count as far as they are loud.
    assert loudness(wave) == pytest.approx(loudness(tone()), abs=0.25)


@pytest.mark.parametrize("factor", [1e-3, 0.2, 5.0])
def test_every_sound_becomes_equally_loud(factor: float) -> None:
    assert loudness(leveled(tone() * factor)) == pytest.approx(-23.0, abs=1e-9)


def test_silence_stays_silent() -> None:
    for wave in (torch.zeros(RATE, dtype=torch.float64), tone() * 1e-5):
        assert loudness(wave) == -math.inf and torch.equal(leveled(wave), wave)


def test_speech_is_the_mean_of_the_channels_at_16_khz_padded_at_the_end() -> None:
    left, right = tone(300, 1.0, 48000), 0.5 * tone(700, 1.0, 48000)
    found = speech(Sound(torch.stack([left, right]), 48000), 1.5)
    wanted = leveled(padded(tone(300, 1.0) + 0.5 * tone(700, 1.0), 1.5))
    assert found.shape == (24000,) and found.dtype == torch.float64 and not found[16000:].any()
    assert (found - wanted)[500:15500].abs().max() < 1e-4
    # A longer sound is not cut.
    assert len(speech(Sound(left[None], 48000), 0.5)) == 16000


def test_a_sound_of_less_than_a_block_is_refused() -> None:
    with pytest.raises(LongCatError, match=r"lasts 393 ms; give at least 400 ms"):
        speech(Sound(torch.ones(1, 6300), RATE))
