"""Bring decoded video frames to what a player shows: upright, with square pixels, in SDR BT.709 colors."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import LongCatError
from .colors import CAMERA_LOGS, CURVES, HDR, TO_BT709, to_sdr
from .opening import check_pixels, package

# FFmpeg's numbers (libavutil/pixfmt.h) of what a stream declares about its colors.
BT709, UNSPECIFIED, BT2020 = 1, 2, 9
# Color matrices that FFmpeg's scaler does not know and would take for BT.601.
UNKNOWN_MATRICES = {
    8: "YCgCo", 10: "BT.2020 constant luminance", 11: "YDzDx", 12: "chromaticity-derived", 13: "chromaticity-derived",
    14: "ICtCp", 15: "IPT-C2", 16: "YCgCo-R", 17: "YCgCo-R",
}  # fmt: skip
# Aspects of a pixel beyond this are mistakes of a writer; players ignore them.
MAX_PIXEL_ASPECT = 8


@dataclass(frozen=True)
class Display:
    """How frames of one kind are shown: stretched to width x height, transposed, flipped, in SDR colors.

    matrix: FFmpeg's color matrix to convert with; None: what the frame declares. transfer, primaries: its declared
    numbers.
    """

    width: int
    height: int
    aspect: Fraction = Fraction(1)
    transposed: bool = False
    flipped_x: bool = False
    flipped_y: bool = False
    matrix: int | None = None
    transfer: int = BT709
    primaries: int = BT709

    @classmethod
    def of(cls, path: Path, frame: Any, aspect: Fraction | None) -> Display:
        """The display of a PyAV frame of the file `path`. aspect: width by height of a pixel, from the stream.

        Raises LongCatError for colors that cannot be converted.
        """
        aspect = aspect if aspect and 1 / MAX_PIXEL_ASPECT <= aspect <= MAX_PIXEL_ASPECT else Fraction(1)
        # Only ever enlarged, so that no detail is lost.
        width = round(frame.width * max(aspect, Fraction(1)))
        height = round(frame.height / min(aspect, Fraction(1)))
        check_pixels(path, width, height)
        matrix, transfer, primaries = (int(getattr(frame, name, UNSPECIFIED)) for name in _DECLARED)
        if matrix in UNKNOWN_MATRICES:
            raise LongCatError(
                f"{path} has colors in {UNKNOWN_MATRICES[matrix]}, which cannot be converted; save it as SDR"
            )
        if transfer >= CAMERA_LOGS:
            raise LongCatError(f"{path} has the logarithmic colors of a camera, to be graded first; save it as SDR")
        if transfer == UNSPECIFIED and _has(frame, "DOVI_METADATA"):
            raise LongCatError(f"{path} has colors of Dolby Vision alone, which cannot be converted; save it as SDR")
        guessed = None
        if matrix == UNSPECIFIED and transfer in HDR:
            guessed = BT2020
        elif matrix == UNSPECIFIED and (frame.width >= 1280 or frame.height > 576):
            # Players take HD for BT.709, and what is smaller for BT.601, which is FFmpeg's default.
            guessed = BT709
        if primaries == UNSPECIFIED and transfer in HDR:
            primaries = BT2020
        return cls(width, height, aspect, *_turns(frame), guessed, transfer, primaries)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) as shown."""
        return (self.width, self.height) if self.transposed else (self.height, self.width)

    @property
    def done(self) -> list[str]:
        """What is done to the frames, in words."""
        words = []
        if self.transfer in HDR:
            words.append(f"its HDR colors ({HDR[self.transfer]}) are converted to SDR")
        elif self.transfer in CURVES:
            words.append(f"its colors ({CURVES[self.transfer]}) are converted to BT.709")
        elif self.primaries in TO_BT709:
            words.append("its wide-gamut colors are converted to BT.709")
        if self.aspect != 1:
            words.append(f"its pixels of {self.aspect.numerator}:{self.aspect.denominator} are stretched to squares")
        if self.transposed or (self.flipped_x and self.flipped_y):
            words.append("its picture is turned upright")
        elif self.flipped_x or self.flipped_y:
            words.append("its picture is mirrored as players show it")
        return words

    def show(self, frame: Any) -> np.ndarray:
        """The frame as uint8 [H, W, 3], RGB."""
        converts = self.transfer in HDR or self.transfer in CURVES or self.primaries in TO_BT709
        # The fourth component of formats with more colors than a palette is how opaque a pixel is.
        seen_through = not converts and len(frame.format.components) == 4
        options: dict[str, Any] = {"format": "rgb48le" if converts else "rgba" if seen_through else "rgb24"}
        if (frame.width, frame.height) != (self.width, self.height):
            interpolation = package("av.video.reformatter").Interpolation.BICUBIC
            options |= {"width": self.width, "height": self.height, "interpolation": interpolation}
        if self.matrix is not None:
            options["src_colorspace"] = self.matrix
        picture: np.ndarray = frame.reformat(**options).to_ndarray()
        if seen_through:
            # Over black, as in pictures.
            opaque = picture[..., 3:].astype(np.uint16)
            picture = ((picture[..., :3] * opaque + 127) // 255).astype(np.uint8)
        if converts:
            picture = to_sdr(picture, self.transfer, self.primaries)
        if self.transposed:
            picture = picture.transpose(1, 0, 2)
        if self.flipped_x:
            picture = picture[:, ::-1]
        if self.flipped_y:
            picture = picture[::-1]
        return np.ascontiguousarray(picture)


# A frame's attributes; older versions of PyAV lack the last two.
_DECLARED = ("colorspace", "color_trc", "color_primaries")


def _has(frame: Any, name: str) -> bool:
    try:
        return frame.side_data[name] is not None
    except KeyError:
        return False


def _turns(frame: Any) -> tuple[bool, bool, bool]:
    """Whether a frame is to be transposed, then flipped in x and in y, from its display matrix.

    The matrix is a, b, u, c, d, v, x, y, w: the pixel (p, q) is shown at (a p + c q + x, b p + d q + y), as in
    libavutil/display.h. Turns by other than right angles are rounded to one.
    """
    if not _has(frame, "DISPLAYMATRIX"):
        return False, False, False
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(frame.side_data["DISPLAYMATRIX"])[:36])
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return False, a < 0, d < 0
    return True, c < 0, b < 0
