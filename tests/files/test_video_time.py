"""Videos are read by their time."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from longcat_core.errors import LongCatError
from longcat_core.files.media import open_video, read_video

from .clips import counted, numbers, write_clip

MS = Fraction(1, 1000)


@pytest.mark.parametrize(
    ("fps", "wanted", "expected"),
    [
        (30, 15, range(0, 30, 2)),
        (60, 15, range(0, 30, 4)),
        (Fraction(30000, 1001), 15, range(0, 30, 2)),
        (Fraction(30000, 1001), 30, range(30)),
        (Fraction(60000, 1001), 30, range(0, 30, 2)),
        (15, 30, [i // 2 for i in range(60)]),
        (24, 15, [0, 2, 3, 5, 6, 8, 10, 11, 13, 14, 16, 18, 19, 21, 22, 24, 26, 27, 29]),
        (10, 15, [0, 1, 1, 2, 3, 3, 4, 5, 5]),
    ],
)
def test_frames_are_taken_at_the_wanted_rate(tmp_path: Path, fps: float, wanted: float, expected: range) -> None:
    count = 6 if fps == 10 else 30
    read, rate = read_video(write_clip(tmp_path / "a.mkv", counted(count), fps), fps=wanted)
    assert numbers(read) == list(expected) and rate == wanted


@pytest.mark.parametrize("fps", [15, Fraction(15000, 1001)])
def test_a_clip_of_the_rate_is_read_frame_for_frame(tmp_path: Path, fps: float) -> None:
    """A second of drift, of rounded rates or milliseconds, would drop a frame."""
    path = write_clip(tmp_path / "a.mkv", counted(250, 16, 16), fps)
    with open_video(path, 15) as video:
        assert numbers(np.stack(list(video))) == list(range(250)) and video.note == "" and video.frames == 250
    assert numbers(read_video(path, last=13, fps=15)[0]) == list(range(237, 250))


@pytest.mark.parametrize("duration", [66, 67, 70, [70, 60, 70, 70, 60, 70]])
@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_rounded_durations_of_animations(tmp_path: Path, suffix: str, duration: int | list[int]) -> None:
    pictures = [Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)) for i in range(6)]
    path = tmp_path / f"a{suffix}"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=duration, lossless=True)
    read = [number // 40 for number in numbers(read_video(path, fps=15)[0])]
    # WebP has milliseconds, so 70 ms is exact there: the last frame is shown long enough for two.
    assert read == [0, 1, 2, 3, 4, 5] + [5] * (suffix == ".webp" and duration == 70)


def test_variable_rates_and_held_frames(tmp_path: Path) -> None:
    times = [0, 67, 133, 500, 567, 1000]
    path = write_clip(tmp_path / "a.mkv", counted(6), times=times, base=MS)
    read, _ = read_video(path, fps=15)
    assert numbers(read) == [0, 1, 2, 2, 2, 2, 2, 3, 3, 4, 4, 4, 4, 4, 4, 5]
    with open_video(path, 15) as video:
        assert "different durations" in video.note and video.source_fps == pytest.approx(5)
    assert numbers(read_video(path)[0]) == list(range(6)), "without a rate, the stored frames"


def test_the_last_frames_lead_up_to_the_end(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mkv", counted(30), 30)
    assert numbers(read_video(path, last=5, fps=15)[0]) == [21, 23, 25, 27, 29]
    assert numbers(read_video(path, last=99, fps=15)[0]) == list(range(1, 30, 2))


def test_what_is_known_before_reading(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mkv", counted(31), 30, sound=True)
    with open_video(path, 15) as video:
        assert (video.height, video.width, video.frames, video.fps, video.has_sound) == (32, 48, 16, 15, True)
        assert video.source_fps == pytest.approx(30)
        assert video.note == "a.mkv: it has 30 frames per second; every second one is used, at 15"
        assert len(list(video)) == 16


@pytest.mark.parametrize("start", [-200, 0, 9000])
def test_time_counts_from_the_first_frame(tmp_path: Path, start: int) -> None:
    times = [start + round(1000 * i / 30) for i in range(10)]
    path = write_clip(tmp_path / "a.nut", counted(10), 30, times=times, base=MS)
    assert numbers(read_video(path, fps=15)[0]) == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("fps", [24, 60])
@pytest.mark.parametrize(
    ("form", "codec", "options"),
    [("h264", "libx264", {}), ("hevc", "libx265", {"x265-params": "log-level=none"}), ("m4v", "mpeg4", {}),
     ("mpeg2video", "mpeg2video", {})],
)  # fmt: skip
def test_streams_without_a_container_have_the_rate_that_they_say(
    tmp_path: Path, form: str, codec: str, options: dict[str, str], fps: int
) -> None:
    path = write_clip(tmp_path / "a.raw", counted(30, 64, 64), fps, codec, "yuv420p", form=form, coded=options)
    with open_video(path, 15) as video:
        assert video.source_fps == fps and video.frames == len(list(video)) == round(30 / fps * 15)
        assert video.note.startswith(f"a.raw: it has {fps} frames per second; ")
    assert read_video(path)[1] == fps


def test_streams_without_a_rate_say_what_is_assumed(tmp_path: Path) -> None:
    options = {"x265-params": "log-level=none:vui-timing-info=0"}
    path = write_clip(tmp_path / "a.hevc", counted(30, 64, 64), 60, "libx265", "yuv420p", form="hevc", coded=options)
    for fps in (None, 15, 25):
        with open_video(path, fps) as video:
            assert video.note.startswith("a.hevc: it says no rate, and 25 frames per second are assumed; put it into ")
            assert "it has" not in video.note


@pytest.mark.parametrize("duration", [33, 67, [30, 60] * 5])
@pytest.mark.parametrize("opacity", [255, 128])
def test_the_sequence_of_an_avif_is_read(tmp_path: Path, opacity: int, duration: int | list[int]) -> None:
    """Such a file begins with a still picture, and has transparency in streams of its own."""
    if "AVIF" not in Image.SAVE_ALL:
        pytest.skip("this Pillow writes no AVIF")
    pictures = [Image.fromarray(np.full((64, 64, 4), (20 * i, 20 * i, 20 * i, opacity), np.uint8)) for i in range(10)]
    pictures = [picture.convert("RGB") for picture in pictures] if opacity == 255 else pictures
    pictures[0].save(tmp_path / "a.avif", save_all=True, append_images=pictures[1:], duration=duration)
    read, fps = read_video(tmp_path / "a.avif")
    shown = np.array(numbers(read)) * 255 / opacity
    assert np.abs(shown - 20 * np.arange(10)).max() < 4 and fps == pytest.approx(1000 / np.mean(duration))
    with open_video(tmp_path / "a.avif", 30) as video:
        # A frame lasts one interval, two, or one and two in turns.
        assert len(list(video)) == {33: 10, 67: 20}.get(duration if isinstance(duration, int) else 0, 14)


def test_frames_out_of_order(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", 8 * counted(30), 30, "libx264", "yuv420p")
    read = np.array(numbers(read_video(path, fps=15)[0]))
    assert np.abs(read - 8.0 * np.arange(0, 30, 2)).max() < 5


@pytest.mark.parametrize("durations", [[1, 16_777_215], [100, 700_000, 100]])
@pytest.mark.parametrize("fps", [None, 15])
def test_a_frame_of_hours_is_refused(tmp_path: Path, durations: list[int], fps: float | None) -> None:
    pictures = [Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)) for i in range(len(durations))]
    pictures[0].save(tmp_path / "a.webp", save_all=True, append_images=pictures[1:], duration=durations)
    if fps is None and max(durations) / min(durations) < 9000:
        assert len(read_video(tmp_path / "a.webp")[0]) == sum(durations) / 100
        return
    with pytest.raises(LongCatError, match=r"a\.webp shows one frame for [\d,]+ s; cut it"):
        read_video(tmp_path / "a.webp", fps=fps)


def test_frames_that_all_are_held_for_minutes(tmp_path: Path) -> None:
    """150 frames of four minutes are ten hours, half a million frames."""
    times = [240_000 * i for i in range(150)]
    path = write_clip(tmp_path / "a.mkv", counted(150, 16, 16), times=times, base=MS)
    with pytest.raises(LongCatError, match=r"a\.mkv shows 150 frames for 3[\d,]+ s; cut it"):
        open_video(path, 15)
    with open_video(path) as video:
        assert video.frames == 150


def test_more_frames_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    path = write_clip(tmp_path / "a.mkv", counted(9))
    there = psutil.virtual_memory()._replace(available=6 * 9 * 32 * 48 - 1)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: there)
    with pytest.raises(LongCatError, match=r"9 frames of .*a\.mkv take .* free; cut the video"):
        read_video(path)
    assert len(read_video(path, last=8)[0]) == 8
