"""Small videos as other programs write them."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np


def counted(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    """uint8 [count, height, width, 3], every pixel of a frame its number."""
    return np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, height, width, 3)).copy()


def numbers(frames: np.ndarray) -> list[int]:
    return [int(frame[0, 0, 0]) for frame in frames]


def write_clip(
    path: Path,
    frames: np.ndarray,
    fps: float | Fraction = 15,
    codec: str = "ffv1",
    pixels: str = "bgr0",
    times: Sequence[int] | None = None,
    base: Fraction | None = None,
    form: str | None = None,
    sound: bool = False,
    options: dict[str, str] | None = None,
    coded: dict[str, str] | None = None,
    **colors: Any,
) -> Path:
    """times: of each frame, in units of `base` seconds. options: of the container. coded: those of the codec. colors:
    attributes of the codec context."""
    import av

    with av.open(str(path.absolute()), "w", format=form, options=options or {}) as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(100000))
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        stream.options = coded or {}
        for name, value in colors.items():
            setattr(stream.codec_context, name, value)
        if base:
            stream.codec_context.time_base = base
        audio = container.add_stream("pcm_s16le", rate=8000, layout="mono") if sound else None
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if audio:
            tone = av.AudioFrame.from_ndarray(np.zeros((1, 4000), np.int16), format="s16", layout="mono")
            tone.sample_rate = 8000
            container.mux([*audio.encode(tone), *audio.encode()])
    return path


def set_matrix(path: Path, *matrix: float) -> None:
    """Write the display matrix a, b, c, d into an .mp4."""
    data = bytearray(path.read_bytes())
    at = data.find(b"tkhd") + 4 + 4 + 20 + 16
    a, b, c, d = (round(65536 * value) for value in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
