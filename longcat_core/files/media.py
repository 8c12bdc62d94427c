"""Read, resize and write pictures and videos. Frames are uint8 [F, H, W, 3], RGB."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from importlib import import_module
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import LongCatError
from .atomic import atomic_path, reason
from .places import check_place, check_suffix

Frames = np.ndarray

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webp", ".gif")
COLUMNS, CELL = 4, 280  # of a contact sheet: cells in a row, and their width in pixels
CRF = 16  # of H.264: visually lossless
# With its macroblock tree x264 encodes equal frames differently from run to run, at any number of threads.
X264_PARAMS = "mbtree=0"

# BT.709, limited range: written into the stream, so that players do not guess by the size.
_BT709, _LIMITED_RANGE = 1, 1


def _package(module: str) -> Any:
    """A package of the `headless` extra."""
    try:
        return import_module(module)
    except ImportError as error:
        name = {"PIL": "pillow"}.get(module.split(".")[0], module)
        raise LongCatError(
            f"reading and writing media needs the package {name}; run: pip install 'longcat-video[headless]'"
        ) from error


# --- writing ---------------------------------------------------------------------------------------------------------


def write_video(path: str | Path, frames: Frames | Iterable[Frames], fps: float) -> None:
    """Write frames as .mp4 (H.264, yuv420p, BT.709), .mkv (FFV1, lossless), .webp (animated, lossless) or .gif (256
    colors per frame).

    The suffix selects the format. frames: uint8 [F, H, W, 3], or an iterable of such clips, of which .mp4 and .mkv hold
    one at a time in memory. fps: frames per second; .gif and .webp round the end of each frame to 10 ms and 1 ms.
    Raises LongCatError for an unknown suffix, frames of another shape or dtype, or odd sides in an .mp4.
    """
    path = Path(path)
    check_output_name(path)
    suffix = path.suffix.lower()
    clips = iter([frames] if isinstance(frames, np.ndarray) else frames)
    first = next(clips, np.empty((0, 0, 0, 3), np.uint8))
    if not len(first):
        raise LongCatError(f"there are no frames to write to {path.name}")
    if suffix == ".mp4" and first.ndim == 4 and (first.shape[1] % 2 or first.shape[2] % 2):
        raise LongCatError(f"{path.name}: H.264 needs even sides, not {first.shape[1]}x{first.shape[2]}; use .webp")
    pictures = _pictures(chain([first], clips), first.shape[1:])
    with atomic_path(path) as temporary:
        if suffix in (".mp4", ".mkv"):
            _write_stream(temporary, pictures, first.shape[1:3], fps, lossless=suffix == ".mkv")
        else:
            _write_animation(temporary, pictures, fps)


def _pictures(clips: Iterable[Frames], shape: tuple[int, ...]) -> Iterator[Frames]:
    for clip in clips:
        if clip.ndim != 4 or clip.shape[3] != 3 or clip.dtype != np.uint8 or clip.shape[1:] != shape:
            raise LongCatError(f"frames are {clip.dtype} {list(clip.shape)}; give uint8 [F, H, W, 3], all of one size")
        yield from clip


def _write_stream(path: Path, pictures: Iterable[Frames], size: tuple[int, int], fps: float, *, lossless: bool) -> None:
    av = _package("av")
    form, codec = ("matroska", "ffv1") if lossless else ("mp4", "libx264")
    # Neither a date nor the writer's version, so that equal frames give equal files.
    options = {"fflags": "+bitexact"} if lossless else {"movflags": "+faststart"}
    with av.open(str(path), "w", format=form, options=options) as container:
        try:
            stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        except ValueError as error:
            raise LongCatError(f"this build of av has no encoder {codec} ({error}); write a .webp instead") from error
        stream.height, stream.width = size
        stream.pix_fmt = "bgr0" if lossless else "yuv420p"
        if not lossless:
            stream.options = {"crf": str(CRF), "x264-params": X264_PARAMS}
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = _BT709
            context.color_range = _LIMITED_RANGE
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            if not lossless:
                frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _write_animation(path: Path, frames: Iterable[Frames], fps: float) -> None:
    image = _package("PIL.Image")
    pictures = [image.fromarray(frame) for frame in frames]
    # Round the ends rather than the durations, so that errors do not add up.
    unit = 10 if path.suffix.lower() == ".gif" else 1
    ends = [unit * round(1000 * i / fps / unit) for i in range(len(pictures) + 1)]
    durations = [max(unit, b - a) for a, b in pairwise(ends)]
    form = {"lossless": True, "quality": 50, "method": 4} if unit == 1 else {"disposal": 1, "optimize": False}
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0, **form)


def contact_sheet(path: str | Path, frames: Frames, prompt: str, *, fps: float = 15, count: int = 12) -> None:
    """Write a .png of up to `count` evenly spaced frames, each with its number and time, and the prompt below.

    Small frames are enlarged by a whole factor without smoothing, to about CELL pixels; large ones are reduced.
    """
    path = Path(path)
    check_output_name(path, sheet=True)
    image, draw_on, fonts = _package("PIL.Image"), _package("PIL.ImageDraw"), _package("PIL.ImageFont")
    picked = sorted({round(i) for i in np.linspace(0, len(frames) - 1, min(count, len(frames)))})
    columns = min(COLUMNS, len(picked))
    height, width = frames.shape[1:3]
    size, filter_ = cell_form(height, width, CELL)
    margin, label, gap = 20, 24, 14
    font, prompt_font = fonts.load_default(size=14), fonts.load_default(size=24)
    sheet_width = 2 * margin + columns * size[0] + (columns - 1) * gap
    lines = wrap(prompt, prompt_font.getlength, sheet_width - 2 * margin)
    rows = -(-len(picked) // columns)
    top = margin + rows * (size[1] + label + gap)
    sheet = image.new("RGB", (sheet_width, top + 32 * len(lines) + margin), (250, 250, 250))
    draw = draw_on.Draw(sheet)
    for cell, index in enumerate(picked):
        x = margin + cell % columns * (size[0] + gap)
        y = margin + cell // columns * (size[1] + label + gap)
        sheet.paste(image.fromarray(frames[index]).resize(size, filter_), (x, y))
        draw.text((x, y + size[1] + 4), f"frame {index}, {index / fps:.2f} s", fill=(110, 110, 110), font=font)
    for number, line in enumerate(lines):
        draw.text((margin, top + 32 * number), line, fill=(20, 20, 20), font=prompt_font)
    with atomic_path(path) as temporary:
        sheet.save(temporary)


def cell_form(height: int, width: int, cell_width: int) -> tuple[tuple[int, int], Any]:
    """(width, height) in pixels of a frame in a contact sheet, and the Pillow filter that resizes it."""
    resampling = _package("PIL.Image").Resampling
    if width <= cell_width:
        factor = max(1, round(cell_width / width))
        return (width * factor, height * factor), resampling.NEAREST
    return (cell_width, max(1, round(height * cell_width / width))), resampling.LANCZOS


def wrap(text: str, measure: Callable[[str], float], width: float) -> list[str]:
    """Lines of `text`, at most `width` wide; a word is broken only if it does not fit on a line."""
    lines, line = [], ""
    for word in text.split():
        while measure(word) > width:
            cut = next(n for n in range(len(word), 0, -1) if n == 1 or measure(word[:n]) <= width)
            lines += [line] if line else []
            lines, line, word = [*lines, word[:cut]], "", word[cut:]
        joined = f"{line} {word}".strip()
        if measure(joined) > width:
            lines, joined = [*lines, line], word
        line = joined
    return [*lines, line] if line else lines


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


# --- reading ---------------------------------------------------------------------------------------------------------


def read_image(path: str | Path) -> np.ndarray:
    """A picture as uint8 [H, W, 3], rotated by its EXIF orientation, transparency over black."""
    path = _existing(path, "image")
    image, operations = _package("PIL.Image"), _package("PIL.ImageOps")
    try:
        with image.open(path) as picture:
            return _rgb(operations.exif_transpose(picture))
    except (OSError, SyntaxError, ValueError, image.DecompressionBombError) as error:
        raise LongCatError(f"{path} is not a readable image ({reason(error)}); give a PNG, JPEG or WebP") from error


def read_video(path: str | Path, last: int | None = None, first: int | None = None) -> tuple[Frames, float]:
    """All frames of a video, or its last `last`, or its first `first`, and its frames per second.

    Pillow reads .gif and .webp, PyAV everything else. Raises LongCatError for a file that cannot be read.
    """
    path = _existing(path, "video")
    read = _animation_frames if path.suffix.lower() in (".gif", ".webp") else _video_frames
    frames: deque[np.ndarray] = deque(maxlen=last)
    fps = 0.0
    for frame, fps in islice(read(path), first):  # noqa: B007 - the last value is that of the clip
        frames.append(frame)
    if not frames:
        raise LongCatError(f"{path} holds no video frames; give an .mp4, .webm, .gif or .webp")
    sizes = list(dict.fromkeys(f"{frame.shape[0]}x{frame.shape[1]}" for frame in frames))
    if len(sizes) > 1:
        raise LongCatError(
            f"{path} changes its size from {sizes[0]} to {sizes[1]}; cut it there, or scale it to one size"
        )
    return np.stack(frames), fps


def _video_frames(path: Path) -> Iterator[tuple[np.ndarray, float]]:
    av = _package("av")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                return
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            fps = float(stream.average_rate or stream.guessed_rate or 0) or 15.0
            end = 0
            for frame in container.decode(stream):
                picture = frame.to_ndarray(format="rgb24")
                yield np.rot90(picture, round(frame.rotation / 90) % 4), fps
                end = (frame.pts or 0) + (frame.duration or 0)
            # FFmpeg reads a truncated file without complaint; a continuation would start at the wrong frame.
            missing = (stream.start_time or 0) + (stream.duration or 0) - end
            if missing * (stream.time_base or 0) > 2 / fps:
                raise LongCatError(
                    f"{path} is cut short, {float(missing * stream.time_base):.2f} s are missing; get the whole file"
                )
    except LongCatError:
        raise
    except (av.error.FFmpegError, ValueError, OSError) as error:
        raise LongCatError(f"{path} is not a readable video ({reason(error)}); give an .mp4 or .webm") from error


def _animation_frames(path: Path) -> Iterator[tuple[np.ndarray, float]]:
    image, sequence = _package("PIL.Image"), _package("PIL.ImageSequence")
    try:
        with image.open(path) as animation:
            timed = [(_rgb(f), f.info.get("duration") or 67) for f in sequence.Iterator(animation)]
    except (OSError, SyntaxError, ValueError, image.DecompressionBombError) as error:
        raise LongCatError(f"{path} is not a readable animation ({reason(error)}); give an .mp4 or .webm") from error
    # Writers merge equal frames into one that lasts longer, so the shortest duration is that of one frame.
    shortest = min(duration for _, duration in timed)
    repeated = [frame for frame, duration in timed for _ in range(max(1, round(duration / shortest)))]
    fps = 1000 * len(repeated) / sum(duration for _, duration in timed)
    for frame in repeated:
        yield frame, fps


def resize_and_crop(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [F, H, W, 3] or [H, W, 3] resized to cover height x width, then cropped evenly on both sides."""
    if frames.ndim == 4:
        return np.stack([resize_and_crop(frame, height, width) for frame in frames])
    if frames.shape[:2] == (height, width):
        return frames
    image = _package("PIL.Image")
    scale = max(height / frames.shape[0], width / frames.shape[1])
    # The box is the part of the source that remains; passing it to resize crops and scales in one resampling.
    box_height, box_width = height / scale, width / scale
    top, left = (frames.shape[0] - box_height) / 2, (frames.shape[1] - box_width) / 2
    box = (max(0.0, left), max(0.0, top), left + box_width, top + box_height)
    box = (*box[:2], min(box[2], frames.shape[1]), min(box[3], frames.shape[0]))
    picture = image.fromarray(np.ascontiguousarray(frames))
    return np.asarray(picture.resize((width, height), image.Resampling.LANCZOS, box=box))


# --- shared ----------------------------------------------------------------------------------------------------------


def _rgb(picture: Any) -> np.ndarray:
    image = _package("PIL.Image")
    if picture.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255.
        return np.repeat((np.asarray(picture) >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if picture.mode in ("I", "F"):
        # Pillow clips them at 255, regardless of their range.
        raise ValueError("its pixels have 32 bits; save it with 8 or 16")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = image.alpha_composite(image.new("RGBA", picture.size, (0, 0, 0, 255)), picture)
    return np.array(picture.convert("RGB"))


def _existing(path: str | Path, what: str) -> Path:
    path = Path(path)
    if path.is_dir():
        raise LongCatError(f"{what} {path} is a folder; give a file")
    if not path.is_file():
        raise LongCatError(f"{what} {path} does not exist; give the path of a file")
    return path
