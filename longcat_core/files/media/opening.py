"""Open pictures and videos: local regular files alone, in containers and codecs of a list, with errors as sentences.

A name is never taken for an address, a pattern or a list of files, because decoders get an open file and no name. A
file cannot lead to others either: playlists, PostScript and the like are on neither list.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

from ...errors import LongCatError
from ..atomic import reason
from ..regular import check_regular

# Pillow's names. Decoders that run programs (EPS) or are rarely tried (FLI, PSD, ...) are left out.
PICTURE_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "JPEG2000", "TGA", "ICO")
# FFmpeg's names. None of these demuxers opens a second file. The last row holds sound alone.
DEMUXERS = (
    "mov", "matroska", "avi", "mpegts", "mpeg", "mpegvideo", "flv", "ogg", "asf", "nut", "ivf", "gif", "apng", "mxf",
    "dv", "h264", "hevc", "m4v", "yuv4mpegpipe", "obu",
    "wav", "w64", "mp3", "flac", "aac", "ac3", "eac3", "aiff", "au", "caf", "wv", "tta", "amr",
)  # fmt: skip
DECODERS = (
    "h264", "hevc", "av1", "libdav1d", "libaom-av1", "vp8", "vp9", "libvpx", "libvpx-vp9", "vvc", "mpeg1video",
    "mpeg2video", "mpeg4", "msmpeg4v1", "msmpeg4v2", "msmpeg4", "h261", "h263", "h263p", "flv", "wmv1", "wmv2", "wmv3",
    "vc1", "theora", "mjpeg", "prores", "dnxhd", "cfhd", "dvvideo", "ffv1", "huffyuv", "ffvhuff", "utvideo",
    "magicyuv", "qtrle", "rawvideo", "v210", "png", "apng", "gif", "cinepak", "svq1", "svq3",
)  # fmt: skip
# Beyond these a picture or frame is refused before it is decoded. Most decoders hold it more than once; those of
# BY_ROWS do not.
MAX_PIXELS, MAX_PIXELS_BY_ROWS = 80_000_000, 178_000_000
BY_ROWS = ("PNG", "JPEG", "MPO", "BMP", "PPM", "TGA")
# Pixels that one byte of a file can stand for, by the name of the decoder of such a format: pixels of a bit, of 8 bits
# or plain text, runs of 128, and blocks of 8x8 of which, by pairs, one has a bit. Deflated rows count in bytes.
_MOST_PIXELS = {"raw": 8, "ppm": 1, "ppm_plain": 1, "tga_rle": 128, "jpeg": 1024}
_DEFLATED = 1032  # bytes to one, at most
_PNG_BITS = {"RGB": 24, "RGBA": 32, "LA": 16, "I;16": 16}  # of a pixel, by mode; at least 1 of the others

# Why a file is not read whose format is not on the lists.
UNKNOWN = "its format is unknown or not supported"


def package(module: str) -> Any:
    """A package of the `headless` extra."""
    try:
        return import_module(module)
    except ImportError as error:
        name = {"PIL": "pillow"}.get(module.split(".")[0], module)
        raise LongCatError(
            f"reading and writing media needs the package {name}; run: pip install 'longcat-video[headless]'"
        ) from error


@contextmanager
def decoding(path: Path, what: str, remedy: str) -> Iterator[None]:
    """Turn any failure of a decoder into a LongCatError. what: image, animation or video; remedy: what to give."""
    try:
        yield
    except LongCatError:
        raise
    except MemoryError as error:
        raise LongCatError(f"{path} needs more memory than there is; make it smaller") from error
    except Exception as error:
        # Decoders of damaged files raise anything: IndexError, struct.error, KeyError, zlib.error.
        unknown = type(error).__name__ == "UnidentifiedImageError"
        why = UNKNOWN if unknown else reason(error)
        raise LongCatError(f"{path} is not a readable {what} ({why}); give {remedy}") from error


@contextmanager
def opened(path: Path, what: str) -> Iterator[BinaryIO]:
    """A regular file, opened for reading. It has no name that a decoder could take for more than a file."""
    check_regular(path, what)
    try:
        file = os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0)), "rb")
    except OSError as error:
        raise LongCatError(f"{what} {path} cannot be read ({reason(error)}); check its permissions") from error
    with file:
        yield file


@contextmanager
def opened_picture(path: Path, file: BinaryIO) -> Iterator[Any]:
    """A Pillow image of a format on the list, its pixels not decoded yet. Raises LongCatError for too many pixels."""
    image = package("PIL.Image")
    try:
        picture = image.open(file, formats=_known_formats(image))
    except image.DecompressionBombError as error:
        # Pillow's own limit, which is a little above ours.
        raise LongCatError(f"{path} has too many pixels; scale it down") from error
    with picture:
        most = _most_pixels(picture, os.fstat(file.fileno()).st_size) if picture.format in BY_ROWS else None
        check_pixels(path, picture.width, picture.height, MAX_PIXELS if most is None else MAX_PIXELS_BY_ROWS)
        if most is not None and picture.width * picture.height > most:
            # Decoders take the memory for all pixels before they find out.
            raise LongCatError(
                f"{path} declares {picture.width}x{picture.height} pixels, more than a file of its size can hold; get "
                "the whole file"
            )
        yield picture


def _most_pixels(picture: Any, size: int) -> int | None:
    """How many pixels a picture in a file of `size` bytes may have; None: as many as its size may be."""
    decoders = {tile[0] for tile in picture.tile}
    if decoders == {"zip"}:
        # Each row has one byte more.
        row = 1 + picture.width * _PNG_BITS.get(picture.mode, 1) / 8
        return int(size * _DEFLATED / row * picture.width)
    return max(_MOST_PIXELS[name] for name in decoders) * size if decoders and decoders <= _MOST_PIXELS.keys() else None


def _known_formats(image: Any) -> list[str]:
    image.init()
    return [form for form in PICTURE_FORMATS if form in image.OPEN]


class _Handle:
    """A file for PyAV, which prints a traceback if a damaged header makes it seek to where nothing can be.

    after: bytes that seem to follow the last one of the file.
    """

    def __init__(self, file: BinaryIO, after: bytes) -> None:
        self._file, self._after = file, after
        self._size = os.fstat(file.fileno()).st_size

    def tell(self) -> int:
        return self._file.tell()

    def read(self, count: int) -> bytes:
        passed = self._file.tell() - self._size
        data = self._file.read(count)
        if self._after and passed + count > 0:
            data += self._after[max(0, passed) : passed + count]
            self._file.seek(self._size + min(passed + count, len(self._after)))
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        try:
            return self._file.seek(offset, whence)
        except (OSError, ValueError, OverflowError):
            return -1


@contextmanager
def opened_container(file: BinaryIO, decoders: tuple[str, ...] = DECODERS, after: bytes = b"") -> Iterator[Any]:
    """A PyAV container that reads from `file` alone, with these decoders. after: bytes that seem to follow its end."""
    options = {
        "format_whitelist": ",".join(DEMUXERS),
        "codec_whitelist": ",".join(decoders),
        "protocol_whitelist": "file",
        # The first frames are decoded when a container is opened.
        "max_pixels": str(MAX_PIXELS),
    }
    av = package("av")
    # Titles that are not UTF-8 must not end it; from version 19 on they never do, and the argument is gone.
    lenient = {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}
    try:
        container = av.open(_Handle(file, after), options=options, **lenient)
    except av.error.ArgumentError as error:
        # FFmpeg's word for a format that is not on the list.
        raise ValueError(UNKNOWN) from error
    with container:
        yield container


def check_pixels(path: Path, width: int, height: int, limit: int = MAX_PIXELS) -> None:
    """Raise LongCatError if a picture or frame has more pixels than `limit`."""
    if width * height > limit:
        raise LongCatError(f"{path} has {width}x{height} pixels; scale it to at most {limit / 1e6:,.0f} million pixels")
