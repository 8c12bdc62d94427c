"""A video is written beside the making of its frames: the file of `write_video`, whole or not at all."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from longcat_core.errors import LongCatError
from longcat_core.files.atomic import atomic_path
from longcat_core.files.media import VideoBeside, beside, read_video, write_video

CLIPS = [np.full((count, 16, 32, 3), 20 * count, np.uint8) for count in (1, 4, 2)]


def write(path, clips=CLIPS) -> None:
    with VideoBeside(path, 15.0) as video:
        for clip in clips:
            video.add(clip)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webp", ".gif"])
def test_the_file_is_the_same(tmp_path, suffix):
    write(tmp_path / f"beside{suffix}")
    write_video(tmp_path / f"after{suffix}", np.concatenate(CLIPS), 15.0)
    assert (tmp_path / f"beside{suffix}").read_bytes() == (tmp_path / f"after{suffix}").read_bytes()


def test_the_first_clip_is_written_before_the_last_is_made(tmp_path, monkeypatch):
    taken, plain = threading.Event(), VideoBeside._taken

    def noted(self):
        for clip in plain(self):
            yield clip
            # The writer came back for more.
            taken.set()

    monkeypatch.setattr(VideoBeside, "_taken", noted)
    with VideoBeside(tmp_path / "a.mkv", 15.0) as video:
        video.add(CLIPS[0])
        assert taken.wait(20)
        video.add(CLIPS[1])
    assert len(read_video(tmp_path / "a.mkv")[0]) == 5


def test_the_name_is_asked_for_with_the_first_clip(tmp_path):
    asked = []

    def name() -> Path:
        asked.append(True)
        return tmp_path / "a.mkv"

    with VideoBeside(name, 15.0) as video:
        assert not asked
        video.add(CLIPS[0])
        video.add(CLIPS[1])
    assert asked == [True] and (tmp_path / "a.mkv").exists()


@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_error_leaves_no_file(tmp_path, after):
    with pytest.raises(KeyboardInterrupt), VideoBeside(tmp_path / "a.mp4", 15.0) as video:
        for clip in CLIPS[:after]:
            video.add(clip)
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    assert not [thread for thread in threading.enumerate() if thread.name == "writing a video"]


def test_what_the_writer_raises_reaches_the_maker(tmp_path, monkeypatch):
    wrong = [CLIPS[0], CLIPS[1][:, :, :16]]
    with pytest.raises(LongCatError, match="all of one size"):
        write(tmp_path / "a.mkv", wrong)
    with pytest.raises(LongCatError, match="a video without frames"):
        write(tmp_path / "a.mkv", [])
    with pytest.raises(LongCatError, match="cannot have nan frames"), VideoBeside(tmp_path / "a.mkv", np.nan) as video:
        # It waits for a failed writer no longer than for one that works.
        for clip in CLIPS * beside.WAITING:
            video.add(clip)
    assert not list(tmp_path.iterdir())


def test_whoever_is_faster_waits(tmp_path, monkeypatch):
    """No more clips are held than may wait."""
    go, written = threading.Event(), []

    def slow(path, clips, fps, sound):
        go.wait(20)
        written.extend(clips)

    monkeypatch.setattr(beside, "write_video", slow)
    video, made = VideoBeside(tmp_path / "a.mkv", 15.0), []

    def make() -> None:
        with video:
            for number in range(3 * beside.WAITING):
                made.append(number)
                video.add(CLIPS[0])

    maker = threading.Thread(target=make)
    maker.start()
    maker.join(0.5)
    assert len(made) <= beside.WAITING + 1
    go.set()
    maker.join(20)
    assert len(written) == len(made) == 3 * beside.WAITING


def test_an_interrupted_encoder_leaves_nothing(tmp_path, monkeypatch):
    """Some encoders begin when all frames are there, and take minutes."""

    def slow(path, clips, *_) -> None:
        with atomic_path(path) as temporary:
            temporary.write_bytes(b"".join(clip.tobytes() for clip in clips))
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(6000):
                time.sleep(0.01)

    monkeypatch.setattr(beside, "write_video", slow)
    # A shell lets its background jobs ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "a.webp")
    finally:
        signal.signal(signal.SIGINT, before)
    assert os.listdir(tmp_path) == []
