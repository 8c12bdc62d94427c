"""Animations that Pillow reads: GIF, WebP, and AVIF that is transparent, which FFmpeg reads as two streams."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ...errors import LongCatError
from .opening import decoding, opened, opened_picture, package
from .pictures import to_rgb
from .timing import Timeline
from .wholeness import LAST_BYTES, is_cut_short

REMEDY = "an .mp4 or .webm"
# Milliseconds for which players show a frame that declares none.
DEFAULT_DURATION = 100
# Times that one frame is repeated to be shown as long as it declares: ten minutes at 15 frames per second.
MAX_REPEATS = 9000


def is_animation(path: Path) -> bool:
    """Whether a file is a GIF, a WebP or an AVIF sequence that is transparent."""
    with opened(path, "video") as file:
        head = file.read(12)
        if head[4:] == b"ftypavis":
            file.seek(0)
            return _is_transparent(path, file)
    return head[:4] == b"GIF8" or (head[:4] == b"RIFF" and head[8:] == b"WEBP")


def _is_transparent(path: Path, file: BinaryIO) -> bool:
    try:
        with opened_picture(path, file) as picture:
            return bool(picture.mode == "RGBA")
    except (OSError, ValueError, SyntaxError):
        # FFmpeg says what is wrong with it, or reads it where Pillow was built without AVIF.
        return False


class Animation:
    """An animation of which `is_animation` is true; see `streams.Stream`, whose attributes it has too."""

    has_sound, assumed = False, ""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stack = ExitStack()
        with self._stack:
            file = self._stack.enter_context(opened(path, "video"))
            with decoding(path, "animation", REMEDY):
                if is_cut_short(file):
                    raise LongCatError(f"{path} is cut short, {LAST_BYTES}; get the whole file")
                self._picture = self._stack.enter_context(opened_picture(path, file))
                unit = 10 if self._picture.format == "GIF" else 1
                self.width, self.height = self._picture.size
            durations = self._durations()
            if not len(durations):
                raise LongCatError(f"{path} holds no video frames; give {REMEDY}, .gif or .webp")
            # Writers of GIF and WebP merge equal frames into one that lasts longer, so the shortest duration is that of
            # one frame.
            one = durations if self._picture.format == "AVIF" else durations.min()
            self._repeats = np.maximum(1, np.round(durations / one)).astype(int)
            if self._repeats.max() > MAX_REPEATS:
                raise LongCatError(
                    f"{path} shows one frame for {durations.max() / 1000:,.0f} s; cut it, or give its frames other "
                    "durations"
                )
            self.own_count = int(self._repeats.sum())
            times = np.cumsum(durations) - durations
            self.timeline = Timeline(times / 1000, durations.sum() / 1000, unit / 1000, durations[0] / 1000)
            self.own_fps = float(1000 * self.own_count / durations.sum())
            self.done: list[str] = []
            self._stack = self._stack.pop_all()

    def _durations(self) -> np.ndarray:
        """Milliseconds of each stored frame, float64."""
        stored = [(duration, frame.info.get("timestamp")) for duration, frame in self._stored()]
        durations = np.array([duration for duration, _ in stored], dtype=np.float64)
        if self._picture.format == "AVIF" and len(stored) > 1:
            # Its durations are rounded one by one, so that their sum drifts.
            durations[:-1] = np.diff([float(start) for _, start in stored])
        return durations

    def close(self) -> None:
        self._stack.close()

    def _stored(self) -> Iterator[tuple[float, Any]]:
        """The milliseconds that each frame is shown, and the frame, which the next one overwrites."""
        sequence = package("PIL.ImageSequence")
        with decoding(self.path, "animation", REMEDY):
            for frame in sequence.Iterator(self._picture):
                frame.load()
                yield float(frame.info.get("duration") or DEFAULT_DURATION), frame

    def frames(self) -> Iterator[tuple[float, Callable[[], np.ndarray]]]:
        """Every stored frame: its time in seconds, and what makes it uint8 [H, W, 3] RGB."""
        for time, (_, frame) in zip(self.timeline.times, self._stored(), strict=False):
            with decoding(self.path, "animation", REMEDY):
                shown = to_rgb(frame)
            yield float(time), partial(_same, shown)

    def own_frames(self) -> Iterator[Callable[[], np.ndarray]]:
        """The frames at the animation's own rate: a longer one is repeated."""
        for repeats, (_, shown) in zip(self._repeats, self.frames(), strict=False):
            for _ in range(repeats):
                yield shown


def _same(picture: np.ndarray) -> np.ndarray:
    return picture
