"""Write videos, whole or not at all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from fractions import Fraction
from itertools import chain, pairwise
from pathlib import Path

import numpy as np

from ...errors import LongCatError, check_path, check_type, is_number
from ..atomic import atomic_path
from ..places import check_place, check_suffix
from .opening import package
from .samples import Sound
from .sound import sound_of

Frames = np.ndarray

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webp", ".gif")
CRF = 16  # of H.264: visually lossless
# With its macroblock tree x264 encodes equal frames differently from run to run, at any number of threads.
X264_PARAMS = "mbtree=0"

# Parts of a lossless picture that threads encode and decode side by side, if its sides have as many pixels as given.
# FFmpeg itself makes 4; 16 take 1 % more space.
SLICES, SLICED_SIDE = 16, 128

# BT.709, limited range: written into the stream, so that players do not guess by the size.
_BT709, _LIMITED_RANGE = 1, 1

WANTED = "uint8 [F, H, W, 3]"


def write_video(
    path: str | Path, frames: Frames | Iterable[Frames], fps: float, sound: str | Path | Sound | None = None
) -> None:
    """Write frames as .mp4 (H.264, yuv420p, BT.709), .mkv (FFV1, lossless), .webp (animated, lossless) or .gif (256
    colors per frame).

    The suffix selects the format. frames: uint8 [F, H, W, 3], or an iterable of such clips, of which .mp4 and .mkv hold
    one at a time in memory. fps: frames per second; .gif and .webp round the end of each frame to 10 ms and 1 ms.
    sound: what an .mp4 or .mkv has too, that of a video from its first frame on (see `check_sound`), or samples. Raises
    LongCatError for an unknown suffix, frames of another shape or dtype, or odd sides in an .mp4.
    """
    check_path("the path of the video", path)
    check_type("frames", frames, (np.ndarray, Iterable), WANTED)
    path = Path(path)
    check_output_name(path)
    if not is_number(fps) or not 0 < fps < math.inf:
        raise LongCatError(f"{path.name} cannot have {fps!r} frames per second; give a number above 0")
    # Numbers of NumPy make no fraction.
    fps = float(fps)
    suffix = path.suffix.lower()
    clips = iter([frames] if isinstance(frames, np.ndarray) else frames)
    first = next(clips, np.empty((0, 0, 0, 3), np.uint8))
    check_type("a clip of the frames", first, np.ndarray, WANTED)
    if not first.size:
        raise LongCatError(f"a video without frames cannot be written to {path.name}; give at least one frame")
    if suffix == ".mp4" and first.ndim == 4 and (first.shape[1] % 2 or first.shape[2] % 2):
        raise LongCatError(f"{path.name}: H.264 needs even sides, not {first.shape[1]}x{first.shape[2]}; use .webp")
    pictures = _pictures(chain([first], clips), first.shape[1:])
    with atomic_path(path) as temporary:
        if suffix in (".mp4", ".mkv"):
            _write_stream(temporary, pictures, first.shape[1:3], fps, sound, lossless=suffix == ".mkv")
        else:
            _write_animation(temporary, pictures, fps, suffix)


def _pictures(clips: Iterable[Frames], shape: tuple[int, ...]) -> Iterator[Frames]:
    for clip in clips:
        check_type("a clip of the frames", clip, np.ndarray, WANTED)
        if clip.ndim != 4 or clip.shape[3] != 3 or clip.dtype != np.uint8 or clip.shape[1:] != shape:
            raise LongCatError(f"frames are {clip.dtype} {list(clip.shape)}; give {WANTED}, all of one size")
        yield from clip


def _write_stream(
    path: Path,
    pictures: Iterable[Frames],
    size: tuple[int, int],
    fps: float,
    sound: str | Path | Sound | None,
    *,
    lossless: bool,
) -> None:
    av = package("av")
    form, codec = ("matroska", "ffv1") if lossless else ("mp4", "libx264")
    # Neither a date nor the writer's version, so that equal frames give equal files.
    options = {"fflags": "+bitexact"} if lossless else {"movflags": "+faststart"}
    # FFmpeg takes what stands before a colon for a protocol, unless the path begins with a slash.
    with av.open(str(path.absolute()), "w", format=form, options=options) as container:
        try:
            stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        except ValueError as error:
            raise LongCatError(f"this build of av has no encoder {codec} ({error}); write a .webp instead") from error
        stream.height, stream.width = size
        stream.pix_fmt = "bgr0" if lossless else "yuv420p"
        if lossless and min(size) >= SLICED_SIDE:
            stream.options = {"slices": str(SLICES)}
        elif not lossless:
            stream.options = {"crf": str(CRF), "x264-params": X264_PARAMS}
            context = stream.codec_context
            # Frames side by side: PyAV's default, slices of one frame, takes half as long again on many cores.
            context.thread_type = "FRAME"
            context.colorspace = context.color_primaries = context.color_trc = _BT709
            context.color_range = _LIMITED_RANGE
        heard = (
            nullcontext() if sound is None else sound_of(sound if isinstance(sound, Sound) else Path(sound), container)
        )
        with heard as tracks:
            for number, picture in enumerate(pictures):
                if tracks is not None:
                    # Little by little, because the container keeps what is ahead of the pictures in memory.
                    tracks.write(number / fps)
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                if not lossless:
                    frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
            if tracks is not None:
                tracks.write()


def _write_animation(path: Path, frames: Iterable[Frames], fps: float, suffix: str) -> None:
    image = package("PIL.Image")
    pictures = [image.fromarray(frame) for frame in frames]
    # Round the ends rather than the durations, so that errors do not add up.
    unit = 10 if suffix == ".gif" else 1
    ends = [unit * round(1000 * i / fps / unit) for i in range(len(pictures) + 1)]
    durations = [max(unit, b - a) for a, b in pairwise(ends)]
    form: dict[str, object] = (
        {"lossless": True, "quality": 50, "method": 4} if unit == 1 else {"disposal": 1, "optimize": False}
    )
    # Given by name, because a link may lead to a file with another ending.
    form |= {"format": suffix[1:].upper()}
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0, **form)


def check_output_name(path: Path, *, sheet: bool = False) -> None:
    """Raise LongCatError unless the name of `path` ends as that of a video (or contact sheet)."""
    if sheet:
        check_suffix(path, (".png",), "contact sheet")
    else:
        check_suffix(path, VIDEO_SUFFIXES, why="; the ending selects the format")


def check_output(path: str | Path, estimated_bytes: int, *, sheet: bool = False) -> None:
    """Raise LongCatError unless a video (or contact sheet) of about `estimated_bytes` can be written to `path`."""
    path = Path(path)
    check_output_name(path, sheet=sheet)
    check_place(path, estimated_bytes)


def estimate_bytes(path: str | Path, frames: int, height: int, width: int) -> int:
    """A generous estimate of a video's size on disk: lossless formats take their pixels' size, H.264 a fifth of it."""
    pixels = frames * height * width * 3
    return (pixels // 5 if Path(path).suffix.lower() == ".mp4" else pixels) + (1 << 20)
