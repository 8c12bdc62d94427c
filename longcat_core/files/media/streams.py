"""Videos that FFmpeg reads, through PyAV."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from fractions import Fraction
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import LongCatError
from .display import Display
from .opening import DECODERS, check_pixels, decoding, opened, opened_container
from .timing import Timeline

REMEDY = "an .mp4 or .webm"
# Of a stream that declares no rate.
DEFAULT_RATE = 15.0
# Timestamps that jump back this far, in seconds, start again: recordings that were joined.
RESET = 1.0

Shown = Callable[[], np.ndarray]


class Stream:
    """The first video stream of a file, with all that its packets say about time; `frames` decodes it.

    Raises LongCatError for a file that cannot be read or is cut short.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stack = ExitStack()
        with self._stack:
            scan = self._read(lambda: _Scan(path))
            self.has_sound, self._stream_index = scan.has_sound, scan.index
            scan.check_whole()
            file = self._stack.enter_context(opened(path, "video"))
            self._container = self._read(lambda: self._stack.enter_context(opened_container(file)))
            self._decoded = self._decode()
            first = next(self._decoded, None)
            if first is None:
                raise LongCatError(f"{path} holds no video frames; give {REMEDY}, .gif or .webp")
            self._decoded = chain([first], self._decoded)
            self._origin = first[0]
            self.timeline = scan.timeline(self._origin)
            self.own_fps = float(scan.declared_rate or self.timeline.rate)
            with decoding(path, "video", REMEDY):
                self._display = Display.of(first[1], self._stream.sample_aspect_ratio)
            self._stack = self._stack.pop_all()
        self.height, self.width = self._display.size
        self.done = self._display.done

    def close(self) -> None:
        self._stack.close()

    def _read(self, call: Callable[[], Any]) -> Any:
        with decoding(self.path, "video", REMEDY):
            return call()

    @property
    def _stream(self) -> Any:
        return self._container.streams[self._stream_index]

    def _decode(self) -> Iterator[tuple[float, Any]]:
        """Times in seconds, increasing, and PyAV frames."""
        with decoding(self.path, "video", REMEDY):
            stream = self._stream
            if stream.codec_context.name not in DECODERS:
                raise LongCatError(f"{self.path} is coded as {stream.codec_context.name}; give H.264 or VP9 video")
            check_pixels(stream.codec_context.width, stream.codec_context.height)
            stream.thread_type = "AUTO"
            rate = float(stream.average_rate or stream.guessed_rate or DEFAULT_RATE)
            last, shift = None, 0.0
            for frame in self._container.decode(stream):
                if frame.pts is None:
                    time = 0.0 if last is None else last + 1 / rate
                else:
                    time = float(frame.pts * frame.time_base) + shift
                    if last is not None and time < last - RESET:
                        shift, time = shift + last + 1 / rate - time, last + 1 / rate
                if last is not None and time <= last:
                    time = last + 1e-6
                yield time, frame
                last = time

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


class _Scan:
    """What the packets of a file say, without decoding them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ends: dict[int, Fraction] = {}
        self._pieces: list[list[Fraction]] = [[]]
        self._last_dts: Fraction | None = None
        self._last_duration = Fraction(0)
        with opened(path, "video") as file, opened_container(file) as container:
            streams = [stream for stream in container.streams.video if not _is_cover(stream)]
            if not streams:
                raise LongCatError(f"{path} holds no video frames; give {REMEDY}, .gif or .webp")
            stream = streams[0]
            self.index, self.unit = stream.index, float(stream.time_base)
            self.has_sound = bool(container.streams.audio)
            self.declared_rate = stream.average_rate or stream.guessed_rate
            start, duration = stream.start_time or 0, stream.duration
            self.declared_end = None if duration is None else (start + duration) * stream.time_base
            for packet in container.demux():
                if packet.size and packet.pts is not None:
                    self._note(packet)

    def _note(self, packet: Any) -> None:
        index, base = packet.stream.index, packet.time_base
        duration = (packet.duration or 0) * base
        self.ends[index] = max(self.ends.get(index, Fraction(0)), packet.pts * base + duration)
        if index != self.index or packet.is_discard:
            return
        dts = (packet.pts if packet.dts is None else packet.dts) * base
        if self._last_dts is not None and dts < self._last_dts - RESET:
            self._pieces.append([])
        self._pieces[-1].append(packet.pts * base)
        self._last_dts, self._last_duration = dts, duration

    def check_whole(self) -> None:
        """Raise LongCatError if the file ends before what it declares."""
        # FFmpeg reads a truncated file without complaint; a continuation would start at the wrong frame.
        rate = self.declared_rate or DEFAULT_RATE
        if self.declared_end is not None and len(self._pieces) == 1:
            missing = self.declared_end - self.ends.get(self.index, Fraction(0))
            if missing > 2 / rate:
                raise LongCatError(f"{self.path} is cut short, {float(missing):.2f} s are missing; get the whole file")

    def timeline(self, origin: float) -> Timeline:
        """The times of the frames from `origin`, the time of the first one that decodes, on."""
        rate, times = float(self.declared_rate or DEFAULT_RATE), np.empty(0)
        for piece in self._pieces:
            seconds = np.unique(np.array(piece, dtype=np.float64))
            seconds = seconds[seconds >= origin - 1e-6] if not len(times) else seconds
            if len(seconds):
                times = np.append(times, seconds - seconds[0] + (times[-1] + 1 / rate if len(times) else 0.0))
        if not len(times):
            times = np.zeros(1)
        plain = Timeline(times, float(times[-1]) + 1 / rate, self.unit, 1 / rate)
        return Timeline(times, float(times[-1]) + (float(self._last_duration) or plain.interval), self.unit, 1 / rate)


def _is_cover(stream: Any) -> bool:
    """Whether a stream is the cover picture of a piece of music."""
    disposition = getattr(stream, "disposition", None)
    return disposition is not None and "attached_pic" in str(disposition)
