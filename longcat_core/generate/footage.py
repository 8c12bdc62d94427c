"""A video that is read part by part, as often as necessary, so that a long one is never held whole."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import LongCatError, check_type
from ..files.media import open_video
from .options import MAX_FPS


@dataclass(frozen=True)
class Footage:
    """`frames` frames of height x width pixels.

    read: reads from the first frame on; each is uint8 [H, W, 3]. fps: frames per second, None where only the frames
    are known. source: the file, None for an array. note: what reading does to them, as a sentence for users, or "".
    has_sound: whether the file has a sound track.
    """

    frames: int
    height: int
    width: int
    read: Callable[[], Iterable[np.ndarray]]
    fps: float | None = None
    source: Path | None = None
    note: str = ""
    has_sound: bool = False

    @classmethod
    def of(cls, video: Any, name: str) -> Footage:
        """The frames of an array or a file. name: of the video, for errors.

        Raises LongCatError for an array that is not uint8 [F, H, W, 3] and for a file that cannot be read.
        """
        if isinstance(video, Footage):
            return video
        if isinstance(video, str | os.PathLike):
            return cls.of_file(video)
        check_type(name, video, np.ndarray, "uint8 frames [F, H, W, 3]")
        if video.ndim != 4 or video.shape[3] != 3 or video.dtype != np.uint8 or not video.size:
            raise LongCatError(f"{name} is {video.dtype} {list(video.shape)}; give uint8 frames [F, H, W, 3]")
        frames, height, width, _ = video.shape
        return cls(frames, height, width, lambda: video)

    @classmethod
    def of_file(cls, path: str | os.PathLike[str]) -> Footage:
        """The frames of a file by their time, at its own rate, which is made even, and 1 to MAX_FPS per second."""
        path = Path(path)

        def read() -> Iterator[np.ndarray]:
            with open_video(path, fps) as reader:
                yield from reader

        with open_video(path) as reader:
            fps = min(max(reader.even_fps, 1.0), MAX_FPS)
            reader.take_at(fps)
            return cls(reader.frames, reader.height, reader.width, read, fps, path, reader.note, reader.has_sound)

    def check(self) -> None:
        """Decode a file once, so that one that is damaged is refused before any work. Raises LongCatError for it."""
        if self.source is not None:
            with open_video(self.source, self.fps) as reader:
                deque(reader.shown(), maxlen=0)

    def parts(self, bounds: Sequence[tuple[int, int]]) -> Iterator[list[np.ndarray]]:
        """The frames of each part; `bounds` has its first frame and its end (exclusive).

        Each part starts after the start of the one before, and at its end at the latest.
        Holds the frames of one part at a time: its list may be emptied, and is when the next is asked for. Raises
        LongCatError for a file that has become shorter.
        """
        shared: list[np.ndarray] = []
        coming = iter(self.read())
        for (start, stop), (later, _) in zip(bounds, [*bounds[1:], (bounds[-1][1], 0)], strict=True):
            part = [*shared, *islice(coming, stop - start - len(shared))]
            if len(part) < stop - start:
                raise LongCatError(f"{self.source} became shorter while it was read; run the command again")
            shared = part[later - start :]
            yield part
            part.clear()
