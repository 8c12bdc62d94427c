"""The sound of a video goes with its pictures into another file, at the same moments."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from longcat_core.files.media import Sound, check_sound, read_sound, read_video, write_video

from ..support.clips import beeps, numbered, write_clip

PICTURES = numbered(32)
# File, codec of its pictures and sound.
SOURCES = {
    "a.mp4": ("libx264", "aac"),
    "a.ts": ("libx264", "aac"),
    "a.mkv": ("ffv1", "flac"),
    "a.webm": ("libvpx", "libopus"),
    "a.mov": ("libx264", "pcm_s16le"),
    "a.avi": ("mpeg4", "libmp3lame"),
    "b.avi": ("mpeg4", "pcm_alaw"),
    "a.mpg": ("mpeg2video", "mp2"),
}


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("name", SOURCES)
def test_sound_is_copied_or_coded_and_stays_in_time(tmp_path: Path, name: str, suffix: str) -> None:
    codec, sound = SOURCES[name]
    source = write_clip(tmp_path / name, PICTURES, 25 if name == "a.mpg" else 15, codec=codec, sound=sound)
    kept, said = check_sound(source, suffix)
    assert kept == source
    out = tmp_path / f"out{suffix}"
    write_video(out, np.repeat(PICTURES, 2, 0), 50 if name == "a.mpg" else 30, kept)
    [(before, wanted)], [(after, found)] = beeps(source), beeps(out)
    assert wanted and found == wanted
    if before == after:
        assert said == ""
    else:
        assert (
            after == "aac" and said == f"the sound of {source} is coded as AAC, because {suffix} does not hold {before}"
        )
    assert len(read_video(out)[0]) == 2 * len(PICTURES)


def test_sound_of_a_clip_that_starts_late(tmp_path: Path) -> None:
    source = write_clip(tmp_path / "a.mkv", PICTURES, times=[3 + i / 15 for i in range(32)], sound="aac")
    write_video(tmp_path / "out.mp4", PICTURES, 15, source)
    assert beeps(tmp_path / "out.mp4") == [("aac", [0.0, 1.0, 2.0])]


def test_equal_sound_makes_equal_files(tmp_path: Path) -> None:
    source = write_clip(tmp_path / "a.mov", PICTURES, codec="libx264", sound="pcm_s16le")
    for name in ("b.mp4", "c.mp4"):
        write_video(tmp_path / name, PICTURES, 15, source)
    assert (tmp_path / "b.mp4").read_bytes() == (tmp_path / "c.mp4").read_bytes()


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_files_without_sound_are_named(tmp_path: Path, suffix: str) -> None:
    source = write_clip(tmp_path / "a.mp4", PICTURES, codec="libx264", sound="aac")
    kept, said = check_sound(source, suffix)
    assert (
        kept is None and said == f"the sound of {source} is left out, because {suffix} holds none; write .mp4 or .mkv"
    )


def test_sound_that_cannot_be_read_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_clip(tmp_path / "a.mov", PICTURES, codec="libx264", sound="pcm_s16le")
    monkeypatch.setattr("longcat_core.files.media.sound.DECODERS", ("aac",))
    kept, said = check_sound(source, ".mp4")
    assert kept is None and said.startswith("the sound is left out: ") and "pcm_s16le" in said


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("channels", [1, 2, 6, 8])
def test_samples_keep_their_channels(tmp_path: Path, channels: int, suffix: str) -> None:
    # Of 5.1 and 7.1 the one in the middle speaks, which a mean of all would make six or eight times as quiet.
    loud = torch.zeros(channels, 1)
    loud[min(2, channels - 1)] = 0.3
    write_video(tmp_path / f"a{suffix}", PICTURES, 15, Sound(loud * torch.sin(torch.arange(48000) / 20), 48000))
    found = read_sound(tmp_path / f"a{suffix}").samples.std(1)
    assert torch.allclose(found, loud[:, 0] / 2**0.5, atol=0.02)
