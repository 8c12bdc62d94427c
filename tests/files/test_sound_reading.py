"""The sound of files as samples: in time, whole, and refused in a sentence where it is not."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

from longcat_core.errors import LongCatError
from longcat_core.files.media import Sound, read_sound, write_video

from ..support.clips import SOUND_RATE as RATE
from ..support.clips import numbered, write_clip
from ..support.sounds import sweep, write_sound

# Name, codec, and whether nothing is lost.
FILES = {
    "a.wav": ("pcm_s16le", True), "b.wav": ("pcm_f32le", True), "a.w64": ("pcm_s16le", True), "a.flac": ("flac", True),
    "a.aiff": ("pcm_s16be", True), "a.au": ("pcm_s16be", True), "a.caf": ("pcm_s16le", True), "a.mka": ("flac", True),
    "a.mp3": ("libmp3lame", False), "a.ogg": ("libopus", False), "a.m4a": ("aac", False), "a.webm": ("libopus", False),
    "a.aac": ("aac", False), "a.ts": ("aac", False),
}  # fmt: skip


def distance(found: Sound, wanted: Sound) -> float:
    count = min(found.samples.shape[1], wanted.samples.shape[1])
    error = found.samples[:, :count] - wanted.samples[:, :count]
    return float(error.square().mean().sqrt() / wanted.samples.std())


@pytest.mark.parametrize("name", FILES)
def test_files_of_every_kind(tmp_path: Path, name: str) -> None:
    codec, exact = FILES[name]
    sound = sweep()
    found = read_sound(write_sound(tmp_path / name, sound, codec))
    assert found.rate == RATE and len(found.samples) == 2
    if exact:
        assert found.samples.shape == sound.samples.shape
    # A stream without a container begins with the encoder's own silence of 1,024 samples.
    shift = 1024 if name in ("a.aac", "a.ts") else 0
    found = Sound(found.samples[:, shift:], RATE)
    assert abs(found.seconds - 1.5) < 0.1 and distance(found, sound) < (1e-4 if exact else 0.1)


@pytest.mark.parametrize("share", [0.1, 0.6, 0.95])
@pytest.mark.parametrize("name", sorted(FILES))
def test_a_file_that_is_cut_short(tmp_path: Path, name: str, share: float) -> None:
    # Long, because a raw stream may end between two of its frames.
    path = write_sound(tmp_path / name, sweep(4), FILES[name][0])
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(LongCatError, match=r"is cut short|is not a readable sound|holds no sound"):
        read_sound(path)


@pytest.mark.parametrize("late", [0.0, 0.5])
def test_the_sound_of_a_video_begins_with_its_first_picture(tmp_path: Path, late: float) -> None:
    """Sound that begins at 2 s, beside pictures that begin earlier or later."""
    sound, path, first = sweep(), tmp_path / "a.mkv", 2 + late
    with av.open(str(path), "w") as container:
        pictures = container.add_stream("ffv1", rate=15)
        pictures.height, pictures.width, pictures.pix_fmt = 32, 48, "bgr0"
        pictures.codec_context.time_base = Fraction(1, 1000)
        heard = container.add_stream("pcm_f32le", rate=RATE, layout="stereo")
        for number, picture in enumerate(numbered(8)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round(1000 * (first + number / 8)), Fraction(1, 1000)
            container.mux(pictures.encode(frame))
        for start in range(0, 72000, 4800):
            # The sound of the first half second of a later video is before its first picture.
            piece = np.ascontiguousarray(sound.samples[:, start : start + 4800].T.reshape(1, -1).numpy())
            frame = av.AudioFrame.from_ndarray(piece, format="flt", layout="stereo")
            frame.sample_rate, frame.pts, frame.time_base = RATE, 2 * RATE + start, Fraction(1, RATE)
            container.mux(heard.encode(frame))
        container.mux([*pictures.encode(), *heard.encode()])
    wanted = sound.samples[:, round(late * RATE) :]
    found = read_sound(path).samples
    # Matroska counts in milliseconds.
    assert abs(found.shape[1] - wanted.shape[1]) <= RATE // 1000
    assert distance(Sound(found, RATE), Sound(wanted, RATE)) < 1e-3


def test_silence_stands_where_sound_begins_late_or_has_a_gap(tmp_path: Path) -> None:
    sound, path = sweep(channels=1), tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        heard = container.add_stream("pcm_f32le", rate=RATE, layout="mono")
        for at, start in ((0, 0), (1, 24000)):
            piece = np.ascontiguousarray(sound.samples[:, start : start + 24000].numpy())
            frame = av.AudioFrame.from_ndarray(piece, format="flt", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = RATE, at * RATE, Fraction(1, RATE)
            container.mux(heard.encode(frame))
        container.mux(heard.encode())
    found = read_sound(path).samples
    assert torch.equal(found[:, :24000], sound.samples[:, :24000]) and not found[:, 24000:48000].any()
    assert torch.equal(found[:, 48000:], sound.samples[:, 24000:48000])


def test_files_without_sound_are_refused(tmp_path: Path) -> None:
    silent = write_clip(tmp_path / "a.mkv", numbered(8))
    (tmp_path / "b.wav").write_bytes(b"not a sound")
    (tmp_path / "c.wav").write_bytes(b"")
    empty = write_sound(tmp_path / "d.wav", Sound(torch.zeros(1, 1), RATE), "pcm_s16le")
    header = bytearray(empty.read_bytes()[:-2])
    header[4:8], header[-4:] = (len(header) - 8).to_bytes(4, "little"), bytes(4)
    empty.write_bytes(header)
    broken = write_sound(tmp_path / "e.wav", sweep(0.1), "pcm_f32le")
    broken.write_bytes(broken.read_bytes()[:-4] + np.float32(np.nan).tobytes())
    joined = write_sound(tmp_path / "f.aac", sweep(0.5), "aac")
    joined.write_bytes(joined.read_bytes() + write_sound(tmp_path / "g.aac", sweep(0.5, 1, 16000), "aac").read_bytes())
    for path, sentence in (
        (joined, "changes its rate or its channels; cut it there"),
        (silent, "has no sound track; give a .wav"),
        (tmp_path / "b.wav", "is not a readable sound"),
        (tmp_path / "c.wav", "is not a readable sound"),
        (empty, "holds no sound that can be decoded"),
        (broken, "e.wav has samples that are not finite"),
        (tmp_path / "none.wav", "does not exist"),
    ):
        with pytest.raises(LongCatError, match=sentence):
            read_sound(path)


def test_sound_that_does_not_fit_into_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_sound(tmp_path / "a.wav", sweep(1), "pcm_s16le")
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10**5))
    with pytest.raises(LongCatError, match=r"a\.wav takes .* GB of memory or more and 0\.0 GB are free; cut it"):
        read_sound(path)


def test_samples_are_checked() -> None:
    for samples, rate, sentence in (
        (torch.zeros(5), 16000, r"are float32 \[5\]; give floats"),
        (torch.zeros(1, 5, dtype=torch.int16), 16000, "are int16"),
        (torch.zeros(1, 0), 16000, "has no samples"),
        (torch.full((1, 5), torch.inf), 16000, "not finite"),
        (torch.zeros(1, 5), 0, "samples per second"),
        (np.zeros((1, 5)), 16000, "give a tensor"),
    ):
        with pytest.raises(LongCatError, match=sentence):
            Sound(samples, rate)  # type: ignore[arg-type]


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 96000])
def test_another_rate_is_the_same_sound(rate: int) -> None:
    found, wanted = sweep(1.2345, 1, rate).resampled(16000), sweep(1.3, 1, 16000)
    count = math.ceil(round(1.2345 * rate) * 16000 / rate)
    assert found.rate == 16000 and found.samples.shape[1] == count
    # Not the ends, where a tone that begins is more than a tone.
    assert (found.samples - wanted.samples[:, :count])[:, 800:-800].abs().max() < 1e-5


def test_a_sound_is_cut_or_followed_by_silence() -> None:
    sound = sweep(1)
    assert torch.equal(sound.cut(0.25).samples, sound.samples[:, :12000])
    longer = sound.cut(1.5).samples
    assert torch.equal(longer[:, :RATE], sound.samples) and longer.shape[1] == 72000 and not longer[:, RATE:].any()


@pytest.mark.parametrize(("suffix", "error"), [(".mkv", 1e-6), (".mp4", 0.05)])
def test_samples_go_into_a_video(tmp_path: Path, suffix: str, error: float) -> None:
    sound = sweep(2)
    for name in ("a", "b"):
        write_video(tmp_path / f"{name}{suffix}", numbered(30), 15, sound)
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()
    found = read_sound(tmp_path / f"a{suffix}")
    assert found.samples.shape == sound.samples.shape and distance(found, sound) < error
