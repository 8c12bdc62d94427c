"""Videos that FFmpeg reads, through PyAV."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import LongCatError
from .display import Display
from .opening import DECODERS, MAX_PIXELS, check_pixels, decoding, opened, opened_container, package
from .packets import BARE_RATE, DEFAULT_RATE, REMEDY, RESET, Packets
from .wholeness import LAST_BYTES, is_cut_short

Shown = Callable[[], np.ndarray]


class Stream:
    """The first video stream of a file, with all that its packets say about time; `frames` decodes it.

    partial: read a file that is cut short as far as it goes. Raises LongCatError for any other that cannot be read.
    """

    def __init__(self, path: Path, partial: bool = False) -> None:
        self.path, self._partial = path, partial
        self._stack = ExitStack()
        with self._stack:
            file = self._stack.enter_context(opened(path, "video"))
            with decoding(path, "video", REMEDY):
                cut = is_cut_short(file)
                if cut and not partial:
                    raise LongCatError(f"{path} is cut short, {LAST_BYTES}; get the whole file")
                packets = Packets(path, file)
                self.missing = packets.missing or (LAST_BYTES if cut else "")
                if self.missing and not partial:
                    raise LongCatError(f"{path} is cut short, {self.missing}; get the whole file")
                file.seek(0)
                self._container = self._stack.enter_context(opened_container(file))
            self.has_sound, self._packets = packets.has_sound, packets
            self._decoded = self._decode()
            first = next(self._decoded, None)
            if first is None:
                most = f"{MAX_PIXELS / 1e6:.0f} million pixels a frame"
                raise LongCatError(f"{path} holds no video frames that can be decoded; give {REMEDY} of at most {most}")
            self._decoded = chain([first], self._decoded)
            self._origin = first[0]
            self.timeline = packets.timeline(self._origin)
            self.own_count = len(self.timeline.times)
            self.own_fps = packets.declared_rate or self.timeline.rate
            with decoding(path, "video", REMEDY):
                self._display = Display.of(path, first[1], self._stream.sample_aspect_ratio)
            self._stack = self._stack.pop_all()
        self.height, self.width = self._display.size
        self.done, self.assumed = self._display.done, ""
        if packets.assumes_rate:
            self.assumed = (
                f"it says no rate, and {BARE_RATE:g} frames per second are assumed; put it into an .mp4 of its own"
            )
        if self.missing:
            self.done.append(f"it is cut short, {self.missing}")
        if packets.damaged:
            self.done.append(f"{packets.damaged} of its packets are damaged")

    def close(self) -> None:
        self._stack.close()

    @property
    def _stream(self) -> Any:
        return self._container.streams[self._packets.index]

    def _decode(self) -> Iterator[tuple[float, Any]]:
        """Times in seconds, increasing, and PyAV frames."""
        last, shift, interval = None, 0.0, 1 / (self._packets.declared_rate or DEFAULT_RATE)
        for frame in self._decoded_as_stored():
            if frame.pts is None or self._packets.bare:
                time = 0.0 if last is None else last + interval
            else:
                time = float(frame.pts * frame.time_base) + shift
                if last is not None and time < last - RESET:
                    shift, time = shift + last + interval - time, last + interval
            if last is not None and time <= last:
                time = last + 1e-6
            yield time, frame
            last = time
        if self._partial or last is None:
            return
        if frame.is_corrupt or last < self._origin + self.timeline.times[-1] - 2 * interval:
            raise LongCatError(f"{self.path} is cut short or damaged, it cannot be decoded to its end; get it again")

    def _decoded_as_stored(self) -> Iterator[Any]:
        with decoding(self.path, "video", REMEDY):
            stream, started, error = self._stream, False, package("av").error
            context = stream.codec_context
            if context.name not in DECODERS:
                raise LongCatError(f"{self.path} is coded as {context.name}, which is not read; give H.264 video")
            check_pixels(self.path, context.width, context.height)
            # A stream may grow on the way.
            context.options = {"max_pixels": str(MAX_PIXELS)}
            # The end of a bare stream is checked by what decodes; decoders of several frames at once miss damage there.
            stream.thread_type = "SLICE" if self._packets.bare else "AUTO"
            for packet in self._container.demux(stream):
                try:
                    frames = packet.decode()
                except (error.InvalidDataError, error.ArgumentError):
                    # A recording may start between two key frames.
                    if started and not self._partial:
                        raise
                    continue
                started = started or bool(frames)
                yield from frames

    def frames(self) -> Iterator[tuple[float, Shown]]:
        """Every stored frame: its time in seconds from the first one, and what makes it uint8 [H, W, 3] RGB."""
        kind = None
        for time, frame in self._decoded:
            kind = kind or (frame.height, frame.width)
            if (frame.height, frame.width) != kind:
                sizes = f"from {kind[0]}x{kind[1]} to {frame.height}x{frame.width}"
                raise LongCatError(f"{self.path} changes its size {sizes}; cut it there, or scale it to one size")
            yield time - self._origin, partial(self._show, frame)

    def _show(self, frame: Any) -> np.ndarray:
        with decoding(self.path, "video", REMEDY):
            return self._display.show(frame)

    def own_frames(self) -> Iterator[Shown]:
        """The stored frames as they are, regardless of their times."""
        return (shown for _, shown in self.frames())
