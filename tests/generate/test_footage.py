"""Videos that are refined: read by their time, part by part, and brought to a size that the network takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from longcat_core.errors import LongCatError
from longcat_core.files.media.timing import even_picks
from longcat_core.generate.footage import Footage
from longcat_core.generate.refine import RefineRequest, target_size
from longcat_core.generate.request import NANO, RELEASED

from ..support.clips import numbered, numbers, write_clip


def evenly(*steps: tuple[int, float]) -> list[float]:
    """The times of frames: so many of each duration, in seconds."""
    durations = [duration for count, duration in steps for _ in range(count)]
    return [0.0, *np.cumsum(durations)[:-1]]


@pytest.mark.parametrize("fps", [7.5, 12, 15, 24, 25, 29.97, 30, 50, 60])
def test_a_clip_of_an_even_rate_is_read_frame_for_frame(tmp_path: Path, fps: float) -> None:
    footage = Footage.of_file(write_clip(tmp_path / "a.mkv", numbered(20), fps))
    assert footage.fps == pytest.approx(fps, rel=1e-4) and footage.note == ""
    assert numbers(list(footage.read())) == list(range(20)) and footage.frames == 20


@pytest.mark.parametrize(
    ("times", "fps", "wanted"),
    [
        (evenly((6, 1 / 30), (6, 1 / 6)), 30, [*range(6), *(n for n in range(6, 11) for _ in range(5)), 11, 11]),
        (evenly((4, 0.1), (1, 0.5), (3, 0.1)), 10, [0, 1, 2, 3, 4, 4, 4, 4, 4, 5, 6, 7]),
        (evenly((9, 1 / 24), (1, 4 / 24), (2, 1 / 24)), 24, [*range(10), 9, 9, 9, 10, 11, 11]),
        (evenly((3, 1 / 30), (2, 1)), 30, [0, 1, 2, *[3] * 30, 4, 4]),
    ],
)
def test_frames_of_any_duration_happen_when_they_did(
    tmp_path: Path, times: list[float], fps: float, wanted: list[int]
) -> None:
    footage = Footage.of_file(write_clip(tmp_path / "a.mkv", numbered(len(times)), times=times))
    assert footage.fps == pytest.approx(fps, rel=0.01) and "by their time" in footage.note
    assert numbers(list(footage.read())) == wanted and footage.frames == len(wanted)


def test_a_recording_that_misses_its_rate_keeps_it(tmp_path: Path) -> None:
    shaken = 0.004 * np.random.default_rng(0).standard_normal(40)
    times = np.arange(40) / 30 + shaken.clip(-0.008, 0.008) + 0.01
    footage = Footage.of_file(write_clip(tmp_path / "a.mkv", numbered(40), times=list(times)))
    assert footage.fps == pytest.approx(30, rel=0.02) and abs(footage.frames - 40) <= 1


@pytest.mark.parametrize(("fps", "taken"), [(0.5, 1), (240, 120)])
def test_rates_that_no_output_has_are_brought_into_range(tmp_path: Path, fps: float, taken: float) -> None:
    footage = Footage.of_file(write_clip(tmp_path / "a.mkv", numbered(8), fps))
    assert footage.fps == taken and f"at {taken:g}" in footage.note
    assert footage.frames == pytest.approx(8 * taken / fps, abs=1)


def test_no_more_than_a_part_is_read_ahead() -> None:
    video, read = numbered(20), []

    def frames():
        for number, frame in enumerate(video):
            read.append(number)
            yield frame

    parts = Footage(20, 32, 48, frames).parts([(0, 8), (5, 13), (12, 20)])
    for start, stop in ((0, 8), (5, 13), (12, 20)):
        assert np.array_equal(np.stack(next(parts)), video[start:stop]) and len(read) == stop


def test_a_video_that_becomes_shorter() -> None:
    video = numbered(8)
    parts = Footage(10, 32, 48, lambda: video, source=Path("a.mp4")).parts([(0, 5), (3, 10)])
    next(parts)
    with pytest.raises(LongCatError, match=r"a\.mp4 became shorter"):
        next(parts)


@pytest.mark.parametrize(
    ("given", "refined"),
    [
        ((64, 96), (128, 192)),
        ((63, 95), (128, 192)),
        ((60, 92), (128, 192)),
        ((1, 1), (16, 16)),
        ((2160, 3840), (2304, 4096)),
        ((4000, 10), (4096, 16)),
        ((101, 173), (208, 352)),
    ],
)
def test_any_size_is_refined_to_one_that_the_network_takes(given: tuple[int, int], refined: tuple[int, int]) -> None:
    assert target_size(*given, bucketed=False) == refined
    footage = Footage.of(np.zeros((1, *given, 3), np.uint8), "the video")
    [said] = RefineRequest().notes(footage, NANO) or [""]
    assert bool(said) == (refined != (2 * given[0], 2 * given[1]))
    assert not said or said.startswith(f"the video of {given[0]}x{given[1]} is scaled to {refined[0]}x{refined[1]}, ")


@pytest.mark.parametrize(("height", "width", "said"), [(480, 832, False), (1080, 1920, False), (100, 1000, True)])
def test_a_shape_that_changes_visibly_is_said(height: int, width: int, said: bool) -> None:
    footage = Footage.of(np.zeros((1, height, width, 3), np.uint8), "the video")
    assert ["changes its shape by 119 %" in note for note in RefineRequest().notes(footage, RELEASED)] == [True] * said


@pytest.mark.parametrize(
    ("fps", "rate", "wanted"),
    [
        (15, 15, list(range(12))),
        (30, 15, [1, 3, 5, 7, 9, 11]),
        (60, 15, [0, 3, 7, 11]),
        (7.5, 15, [*sorted(2 * list(range(11))), 11]),
        (24, 15, [0, 1, 3, 5, 6, 8, 9, 11]),
    ],
)
def test_frames_of_a_batch_lead_up_to_its_last_one(fps: float, rate: float, wanted: list[int]) -> None:
    assert even_picks(12, fps, rate) == wanted
