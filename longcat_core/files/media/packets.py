"""What the packets of a video say about it, without decoding them: when frames are shown, and whether it is whole."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ...errors import LongCatError
from .opening import opened_container
from .timing import Timeline
from .wholeness import LAST_BYTES, has_nut_index

REMEDY = "an .mp4 or .webm"
# Of a stream that declares no rate.
DEFAULT_RATE = 15.0
# Timestamps that jump back this far, in seconds, start again: recordings that were joined.
RESET = 1.0
# Frames that may be missing at the end of what a container declares, because writers round.
ROUNDED = 2
# Streams without a container. They have no times, and demuxers invent some of 25 frames per second. Many say their
# rate, but MPEG-4 of a variable one says the unit of its times instead.
BARE_RATE, MOST_RATE = 25.0, 480
_BARE = ("h264", "hevc", "m4v", "obu", "mpegvideo")
# Containers that declare their duration for the whole file, not for each stream.
_DECLARES_WHOLE = ("matroska", "flv")


class Packets:
    """All packets of the first video stream of `file` that is not a still picture.

    index: of that stream. has_sound: whether there is another one, of sound. declared_rate: frames per second, or None.
    bare: whether it is a stream without a container, which has no times. assumes_rate: whether it says no rate either,
    and declared_rate is BARE_RATE. damaged: packets that the demuxer marks as such. Raises LongCatError for a file
    without a video stream.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.damaged = path, 0
        self._cut = False
        self._ends: dict[int, float] = {}
        self._pieces: list[list[float]] = [[]]
        self._untimed = 0
        self._last_dts: float | None = None
        self._last_duration = 0.0
        with opened_container(file) as container:
            streams = [stream for stream in container.streams.video if not is_cover(stream)]
            if not streams:
                raise LongCatError(f"{path} holds no video frames; give {REMEDY}, .gif or .webp")
            # A file of an image sequence begins with a still picture of it.
            stream = next((stream for stream in streams if stream.frames > 1), streams[0])
            form = container.format.name
            self.index, self.unit = stream.index, float(stream.time_base)
            self.has_sound = bool(container.streams.audio)
            self.bare = form in _BARE
            rate = stream.codec_context.framerate if self.bare else stream.average_rate or stream.guessed_rate
            self.declared_rate = float(rate) if rate else None
            self.assumes_rate = self.bare and not (rate and rate <= MOST_RATE)
            if self.assumes_rate:
                self.declared_rate = BARE_RATE
            self._declared_end = None if self.bare else _declared_end(container, stream)
            latest: deque[Any] = deque(maxlen=4)
            for packet in container.demux():
                if packet.size:
                    latest.append(_kept(packet))
                    self._note(packet)
            self.damaged -= sum(corrupt for corrupt, _ in latest)
            self._cut |= any(corrupt for corrupt, _ in latest)
            # This container has no mark of its end, and its demuxer drops half a frame.
            self._cut |= form == "yuv4mpegpipe" and bool(latest) and latest[-1][1] != file.seek(0, 2)
            if form == "nut" and not has_nut_index(file):
                self._cut |= _runs_on(file, latest)
            # The demuxer believes no duration if the size of the file is another than the header says.
            self._cut |= form == "asf" and stream.duration is None

    def _note(self, packet: Any) -> None:
        index, base = packet.stream.index, packet.time_base
        self.damaged += packet.is_corrupt
        if packet.pts is None or self.bare:
            self._untimed += index == self.index
            return
        start, duration = float(packet.pts * base), float((packet.duration or 0) * base)
        shown = duration or (1 / (self.declared_rate or DEFAULT_RATE) if index == self.index else 0.0)
        self._ends[index] = max(self._ends.get(index, 0.0), start + shown)
        if index != self.index or packet.is_discard:
            return
        dts = start if packet.dts is None else float(packet.dts * base)
        if self._last_dts is not None and dts < self._last_dts - RESET:
            self._pieces.append([])
        self._pieces[-1].append(start)
        self._last_dts, self._last_duration = dts, duration

    @property
    def missing(self) -> str:
        """What is missing at the end of the clip, in words, or ""."""
        missing = 0.0
        if self._declared_end is not None and len(self._pieces) == 1:
            end, stream_alone = self._declared_end
            missing = end - (self._ends.get(self.index, 0.0) if stream_alone else max(self._ends.values(), default=0.0))
        if missing > ROUNDED / (self.declared_rate or DEFAULT_RATE):
            return f"{missing:.2f} s are missing"
        return LAST_BYTES if self._cut else ""

    def timeline(self, origin: float) -> Timeline:
        """The times of the frames from `origin`, the time of the first one that decodes, on."""
        interval = 1 / (self.declared_rate or DEFAULT_RATE)
        times: np.ndarray = np.empty(0)
        if self._untimed > sum(map(len, self._pieces)):
            times = np.arange(self._untimed + sum(map(len, self._pieces))) * interval
            return Timeline(times, float(times[-1]) + interval, self.unit, interval)
        for piece in self._pieces:
            seconds = np.unique(np.array(piece))
            seconds = seconds[seconds >= origin - 1e-6] if not len(times) else seconds
            if len(seconds):
                times = np.append(times, seconds - seconds[0] + (times[-1] + interval if len(times) else 0.0))
        if not len(times):
            times = np.zeros(1)
        last = self._last_duration or Timeline(times, 0.0, self.unit, interval).interval
        return Timeline(times, float(times[-1]) + last, self.unit, interval)


def _runs_on(file: BinaryIO, latest: Sequence[Any]) -> bool:
    """Whether a NUT file ends in a packet: whether its `latest` packets are others if more bytes follow.

    No packet begins with N, by the specification of NUT.
    """
    file.seek(0)
    again: deque[Any] = deque(maxlen=4)
    with opened_container(file, after=b"N" * 64) as container:
        again.extend(_kept(packet) for packet in container.demux() if packet.size)
    return again != latest


def _kept(packet: Any) -> tuple[bool, int]:
    """Whether it is damaged, and where it ends."""
    return packet.is_corrupt, (packet.pos or 0) + packet.size


def _declared_end(container: Any, stream: Any) -> tuple[float, bool] | None:
    """The second at which the container says that a clip ends, and whether that is the end of `stream` alone."""
    if stream.duration is not None:
        return float(((stream.start_time or 0) + stream.duration) * stream.time_base), True
    if container.duration is not None and container.format.name.startswith(_DECLARES_WHOLE):
        # These count from zero, wherever the first frame is.
        return container.duration / 1e6, False
    return None


def is_cover(stream: Any) -> bool:
    """Whether a stream is the cover picture of a piece of music."""
    disposition = getattr(stream, "disposition", None)
    return disposition is not None and bool(disposition & type(disposition).attached_pic)
