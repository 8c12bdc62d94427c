"""Read a video by its time, as players show it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from types import TracebackType

import numpy as np

from ...errors import LongCatError, check_path, is_number, is_whole
from .animations import MAX_REPEATS, Animation, is_animation
from .opening import package
from .streams import Stream
from .timing import SAME_RATE, Grid

# Seconds for which a clip may show one frame, and times that each frame may be repeated on average in a long clip.
MAX_STILL, MAX_SHARE = 600, 200


class VideoReader:
    """A video's frames one after another, uint8 [H, W, 3] RGB, of which a few are in memory at a time.

    path: any container or codec of the lists in `opening`. fps: frames per second to yield, by their time; None yields
    the stored frames as they are (a GIF or WebP at its own rate). from_end: lay the moments of the frames back from
    the last stored frame rather than forth from the first. partial: read a clip that is cut short as far as it goes,
    and say so in `note`. Raises LongCatError for a file that cannot be read, is cut short, or shows one frame for more
    than ten minutes.

    height, width: of a frame as it is shown, in pixels. fps: of the frames that are yielded. source_fps: of the stored
    ones, on average. even_fps: at which frames that are taken by their time show all of the stored ones. frames: how
    many are yielded, as far as known before decoding. has_sound: whether there is a sound track. note: what was done to
    the clip in one sentence for users, or "".
    """

    def __init__(
        self, path: str | Path, fps: float | None = None, *, from_end: bool = False, partial: bool = False
    ) -> None:
        check_path("the path of the video", path)
        _check_rate(path, fps)
        self.path = Path(path)
        self._source = Animation(self.path) if is_animation(self.path) else Stream(self.path, partial)
        self.height, self.width, self.has_sound = self._source.height, self._source.width, self._source.has_sound
        timeline = self._source.timeline
        self.source_fps, self.even_fps = timeline.rate, timeline.even_rate
        self._grid: Grid | None = None
        self.fps, self.frames = self._source.own_fps, self._source.own_count
        self.note = self._note()
        if fps is not None:
            try:
                self.take_at(fps, from_end=from_end)
            except LongCatError:
                self.close()
                raise

    def take_at(self, fps: float, *, from_end: bool = False) -> None:
        """Yield frames at this rate from now on, as if it had been given at first; only before any was read."""
        _check_rate(self.path, fps)
        timeline = self._source.timeline
        last = float(timeline.times[-1])
        if isinstance(self._source, Animation):
            # Its last frame may stand for several equal ones.
            last += max(0, round((timeline.end - last) / timeline.step(fps)) - 1) * timeline.step(fps)
        grid = timeline.grid(fps, to_last=last if from_end else None)
        if timeline.longest > min(MAX_STILL, MAX_REPEATS * grid.step):
            raise LongCatError(f"{self.path} shows one frame for {timeline.longest:,.0f} s; cut it")
        if grid.count > MAX_REPEATS + MAX_SHARE * len(timeline.times):
            raise LongCatError(f"{self.path} shows {len(timeline.times):,} frames for {timeline.end:,.0f} s; cut it")
        self._grid, self.fps, self.frames = grid, float(fps), grid.count
        self.note = self._note()

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._source.close()

    def __iter__(self) -> Iterator[np.ndarray]:
        last, picture = None, None
        for shown in self.shown():
            # A frame that is repeated is converted once.
            if shown is not last or picture is None:
                last, picture = shown, shown()
            yield picture

    def shown(self) -> Iterator[Callable[[], np.ndarray]]:
        """For each frame what makes it uint8 [H, W, 3]; converting only the frames that are needed saves time."""
        if self._grid is None:
            return self._source.own_frames()
        return self._grid.pick(self._source.frames())

    def last(self, count: int) -> np.ndarray:
        """The last `count` frames, or all if they are fewer. Raises LongCatError if they do not fit into memory."""
        _check_memory(self, min(self.frames, count))
        return _converted(deque(self.shown(), maxlen=count))

    def _note(self) -> str:
        done = list(self._source.done)
        if self._grid is not None:
            done = [*self._rate_note(), *done]
        if self._source.assumed:
            done = [self._source.assumed, *done]
        return f"{self.path.name}: {'; '.join(done)}" if done else ""

    def _rate_note(self) -> list[str]:
        timeline, said = self._source.timeline, f"{self.fps:.5g}"
        assert self._grid is not None
        own, step = timeline.interval, self._grid.step
        if len(timeline.times) < 2:
            return []
        if timeline.varies:
            return [f"its frames have different durations; they are taken by their time, at {said} per second"]
        if abs(own - step) <= SAME_RATE * step:
            return []
        has = "" if self._source.assumed else f"it has {self.source_fps:.5g} frames per second; "
        whole = round(step / own)
        if whole > 1 and abs(whole * own - step) <= SAME_RATE * step:
            which = "every second one" if whole == 2 else f"one of {whole}"
            return [f"{has}{which} is used, at {said}"]
        return [f"{has}they are taken by their time, at {said}"]


def open_video(path: str | Path, fps: float | None = None) -> VideoReader:
    """A `VideoReader`, to be used in a with statement."""
    return VideoReader(path, fps)


def read_video(
    path: str | Path, last: int | None = None, first: int | None = None, fps: float | None = None
) -> tuple[np.ndarray, float]:
    """A video's frames, uint8 [F, H, W, 3] RGB, or its last `last`, or its first `first`, and their rate.

    fps: frames per second, by their time; None: the stored frames as they are. With `last` they lead up to the last
    stored frame, from which a continuation goes on. Raises LongCatError as VideoReader does, and for frames that do
    not fit into memory.
    """
    for name, count in (("last", last), ("first", first)):
        if count is not None and not (is_whole(count) and count > 0):
            raise LongCatError(f"{name} cannot be {count!r}; give a number of frames, or None for all")
    with VideoReader(path, fps, from_end=last is not None) as video:
        count = min(count for count in (video.frames, last, first) if count is not None)
        _check_memory(video, count)
        if last is None:
            return np.stack(list(islice(video, first))), video.fps
        return _converted(deque(islice(video.shown(), first), maxlen=last)), video.fps


def _converted(kept: Iterable[Callable[[], np.ndarray]]) -> np.ndarray:
    """The frames of what `VideoReader.shown` yielded, each converted once: uint8 [F, H, W, 3]."""
    kept = list(kept)
    pictures = {shown: shown() for shown in dict.fromkeys(kept)}
    return np.stack([pictures[shown] for shown in kept])


def _check_rate(path: str | Path, fps: float | None) -> None:
    if fps is not None and not (is_number(fps) and 0 < fps < math.inf):
        raise LongCatError(f"{fps!r} frames per second cannot be read from {path}; give a number above 0")


def _check_memory(video: VideoReader, frames: int) -> None:
    needed, there = 2 * frames * video.height * video.width * 3, package("psutil").virtual_memory().available
    if needed > there:
        raise LongCatError(
            f"{frames:,} frames of {video.path} take {needed / 1e9:,.1f} GB of memory and {there / 1e9:,.1f} GB are "
            "free; cut the video or make it smaller"
        )
