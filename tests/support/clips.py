"""Clips of other programs: any codec, times of frames, and sound."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

# Samples per second of the sound.
SOUND_RATE = 48000


def numbered(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    """uint8 [count, height, width, 3]: the brightness of a frame is six times its number."""
    return np.broadcast_to(
        (6 * np.arange(count, dtype=np.uint8))[:, None, None, None], (count, height, width, 3)
    ).copy()


def numbers(frames: np.ndarray) -> list[int]:
    """Which frames of `numbered` these are."""
    return [round(float(frame.mean()) / 6) for frame in frames]


def write_clip(
    path: Path,
    frames: np.ndarray,
    fps: float = 15,
    *,
    codec: str = "ffv1",
    times: Sequence[float] | None = None,
    sound: str = "",
    form: str | None = None,
) -> Path:
    """Write frames as another program does. times: of each, in seconds. sound: a codec, for a beep in every second."""
    with av.open(str(path), "w", format=form) as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "bgr0" if codec == "ffv1" else "yuv420p"
        stream.bit_rate = 4_000_000
        base = Fraction(1, 1000) if times is not None else 1 / stream.average_rate
        stream.codec_context.time_base = base
        shown = range(len(frames)) if times is None else [round(1000 * time) for time in times]
        heard = container.add_stream(sound, rate=SOUND_RATE) if sound else None
        if heard is not None:
            heard.layout = "stereo"
        for moment, picture in zip(shown, frames, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = moment, base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if heard is not None:
            seconds = float((shown[-1] + 1) * base)
            for packet in _beeps(heard, seconds, float(shown[0] * base)):
                container.mux(packet)
    return path


def _beeps(stream: object, seconds: float, start: float) -> Sequence[object]:
    resampler = av.AudioResampler(stream.format.name, "stereo", SOUND_RATE)
    packets = []
    for first in range(round(start * SOUND_RATE), round(seconds * SOUND_RATE), 1024):
        moments = np.arange(first, first + 1024) / SOUND_RATE
        tone = 0.3 * np.sin(2 * np.pi * 440 * moments) * ((moments - start) % 1 < 0.1)
        frame = av.AudioFrame.from_ndarray(np.stack([tone, tone]).astype(np.float32), "fltp", "stereo")
        frame.sample_rate, frame.pts, frame.time_base = SOUND_RATE, first, Fraction(1, SOUND_RATE)
        for part in resampler.resample(frame):
            packets += stream.encode(part)
    return [*packets, *stream.encode(None)]


def beeps(path: Path) -> list[tuple[str, list[float]]]:
    """Of every sound track the codec and when its beeps start, in seconds from the first picture."""
    with av.open(str(path)) as container:
        begin = next(container.decode(video=0)).time
        tracks = len(container.streams.audio)
    return [_heard(path, number, begin) for number in range(tracks)]


def _heard(path: Path, number: int, begin: float) -> tuple[str, list[float]]:
    with av.open(str(path)) as container:
        stream = container.streams.audio[number]
        codec, resampler = stream.codec_context.codec.canonical_name, av.AudioResampler("flt", "mono", SOUND_RATE)
        parts = [part for frame in container.decode(stream) for part in resampler.resample(frame)]
    moments = np.concatenate([part.time + np.arange(part.samples) / SOUND_RATE for part in parts]) - begin
    loud = moments[np.abs(np.concatenate([part.to_ndarray()[0] for part in parts])) > 0.1]
    starts = loud[np.insert(np.diff(loud) > 0.5, 0, True)] if len(loud) else []
    return codec, [round(float(moment), 1) for moment in starts]
