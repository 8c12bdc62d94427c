"""Several people in one sound, and the windows of segments."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from longcat_core.errors import LongCatError
from longcat_core.files.media import Sound
from longcat_core.generate.audio import (
    AudioEncoder,
    combine,
    embed_voices,
    frames_for,
    load_audio_encoder,
    seconds_of,
    segments_for,
)
from longcat_core.generate.audio.encoder import open_audio_encoder
from longcat_core.generate.audio.speech import RATE
from longcat_core.sampling.avatar import audio_windows

DATA = Path(__file__).parents[2] / "data" / "golden-avatar"
ENCODERS = {"1.0": DATA / "v1_0" / "wav2vec2.safetensors", "1.5": DATA / "v1_5" / "whisper.safetensors"}


def encoder(version: str) -> AudioEncoder:
    file = ENCODERS[version]
    return load_audio_encoder(file, opened=open_audio_encoder(file, file.with_name(f"{file.stem}_config.json")))


def noise(seconds: float, seed: int = 0, rate: int = RATE, channels: int = 1) -> Sound:
    generator = torch.Generator().manual_seed(seed)
    return Sound(0.1 * torch.randn(channels, round(seconds * rate), generator=generator), rate)


def test_two_at_once() -> None:
    one, two = noise(1.0, 0), noise(1.5, 1)
    voices = combine([one, two], "para")
    assert voices.seconds == 1.5 and voices.notes == ("the shorter sounds are silent behind their ends until 1.50 s",)
    assert torch.equal(voices.speakers[0][:16000].float(), one.samples[0]) and not voices.speakers[0][16000:].any()
    assert torch.equal(voices.speakers[1].float(), two.samples[0])
    assert torch.equal(voices.track.samples, one.cut(1.5).samples + two.samples)


def test_one_after_the_other() -> None:
    one, two = noise(1.0, 0), noise(1.5, 1)
    voices = combine([one, two], "add")
    assert voices.seconds == 2.5 and not voices.notes
    assert torch.equal(voices.speakers[0][:16000].float(), one.samples[0]) and not voices.speakers[0][16000:].any()
    assert torch.equal(voices.speakers[1][16000:].float(), two.samples[0]) and not voices.speakers[1][:16000].any()
    assert torch.equal(voices.track.samples, torch.cat([one.samples, two.samples], 1))


@pytest.mark.parametrize("mode", ["para", "add"])
@pytest.mark.parametrize("place", [0, 1])
def test_who_has_no_sound_is_silent(mode, place: int) -> None:
    sounds: list[Sound | None] = [noise(1.0)]
    sounds.insert(place, None)
    voices = combine(sounds, mode)
    assert voices.seconds == 1.0 and not voices.speakers[place].any() and not voices.notes
    assert torch.equal(voices.track.samples, noise(1.0).samples)


def test_the_track_keeps_the_best_rate_and_all_channels() -> None:
    mono, stereo = noise(1.0, 0, 16000), noise(1.0, 1, 48000, channels=2)
    track = combine([mono, stereo]).track
    assert track.rate == 48000
    assert torch.allclose(track.samples, mono.resampled(48000).samples + stereo.samples, atol=1e-6)


def test_sounds_that_exceed_full_scale_together_are_turned_down() -> None:
    loud = Sound(noise(1.0).samples.clamp(-0.2, 0.2) * 4, RATE)
    voices = combine([loud, loud])
    assert torch.allclose(voices.track.samples, loud.samples / 0.8)
    assert voices.notes == ("the video's sound is turned down by 4.1 dB, down to full scale",)


def test_silence_and_scraps_are_refused() -> None:
    quiet, wave = Sound(torch.zeros(1, RATE), RATE), noise(1.0).samples
    for sounds, sentence in (
        ([Sound(torch.cat((wave, -wave)), RATE)], "the channels of the sound cancel each other out in their mean"),
        ([], "no sound is given"),
        ([None, None], "no sound is given"),
        ([quiet], "the sound is silent, below -70 LUFS throughout"),
        ([quiet, None], "the sound is silent"),
        ([noise(0.3)], "the sound lasts 300 ms; give at least 400 ms"),
        ([noise(1.0), noise(0.3)], "the sound of person 2 lasts 300 ms"),
    ):
        with pytest.raises(LongCatError, match=sentence):
            combine(sounds)
    assert combine([noise(1.0), quiet]).notes == ("the sound of person 2 is silent, below -70 LUFS throughout",)


@pytest.mark.parametrize("version", ENCODERS)
def test_windows_of_segments_and_of_those_who_do_not_speak(version: str) -> None:
    encodes = encoder(version)
    voices = combine([noise(1.0, 0), noise(1.0, 1)])
    found = embed_voices(encodes, voices, 1.4, others=True, seed=3)
    assert found.values.shape == (3, int(1.4 * encodes.rate), encodes.groups, encodes.channels)
    assert torch.equal(embed_voices(encodes, voices, 1.4, others=True, seed=3).values, found.values)
    assert torch.equal(found.values[2], encodes.embed(torch.zeros(22400, dtype=torch.float64), seed=5))
    windows = found.windows(5, 9)
    assert windows.shape == (3, 9, 5, encodes.groups, encodes.channels)
    for person in range(3):
        wanted = audio_windows(found.values[person], 5 * encodes.stride, 9, encodes.stride)
        assert torch.equal(windows[person : person + 1], wanted)


@pytest.mark.parametrize(
    ("fps", "segments", "seconds"), [(16, 1, 5.8125), (16, 3, 15.8125), (25, 1, 3.72), (25, 2, 6.92)]
)
def test_segments_last_as_long_as_the_sound(fps: int, segments: int, seconds: float) -> None:
    assert seconds_of(segments, fps) == pytest.approx(seconds)
    assert segments_for(seconds, fps) == segments_for(seconds - 0.01, fps) == segments
    assert segments_for(seconds + 0.01, fps) == segments + 1 and segments_for(0.5, fps) == 1
    # As an .mp4 of that many frames says it.
    assert segments_for(math.ceil(1000 * seconds) / 1000, fps) == segments
    assert frames_for(seconds, fps) == 93 + 80 * (segments - 1) and frames_for(0.01, fps) == 1
