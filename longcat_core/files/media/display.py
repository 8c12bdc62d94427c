"""Bring decoded video frames to what a player shows: upright, with square pixels, in SDR BT.709 colors."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from .opening import check_pixels, package

# FFmpeg's numbers (libavutil/pixfmt.h) of what a stream declares about its colors.
BT709, UNSPECIFIED = 1, 2
# Aspects of a pixel beyond this are mistakes of a writer; players ignore them.
MAX_PIXEL_ASPECT = 8


@dataclass(frozen=True)
class Display:
    """How frames of one kind are shown: stretched to width x height, transposed, flipped.

    matrix: FFmpeg's color matrix to convert with; None: what the frame declares.
    """

    width: int
    height: int
    aspect: Fraction = Fraction(1)
    transposed: bool = False
    flipped_x: bool = False
    flipped_y: bool = False
    matrix: int | None = None

    @classmethod
    def of(cls, frame: Any, aspect: Fraction | None) -> Display:
        """The display of a PyAV frame. aspect: width by height of a pixel, from the stream."""
        aspect = aspect if aspect and 1 / MAX_PIXEL_ASPECT <= aspect <= MAX_PIXEL_ASPECT else Fraction(1)
        # Only ever enlarged, so that no detail is lost.
        width = round(frame.width * max(aspect, Fraction(1)))
        height = round(frame.height / min(aspect, Fraction(1)))
        check_pixels(width, height)
        # What players take an undeclared matrix for: BT.709 for HD, BT.601 below, which is FFmpeg's default.
        large = frame.width >= 1280 or frame.height > 576
        guessed = BT709 if large and int(frame.colorspace) == UNSPECIFIED else None
        return cls(width, height, aspect, *_turns(frame), guessed)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) as shown."""
        return (self.width, self.height) if self.transposed else (self.height, self.width)

    @property
    def done(self) -> list[str]:
        """What is done to the frames, in words."""
        words = []
        if self.aspect != 1:
            words.append(f"its pixels of {self.aspect.numerator}:{self.aspect.denominator} are stretched to squares")
        if self.transposed or (self.flipped_x and self.flipped_y):
            words.append("its picture is turned upright")
        elif self.flipped_x or self.flipped_y:
            words.append("its picture is mirrored as players show it")
        return words

    def show(self, frame: Any) -> np.ndarray:
        """The frame as uint8 [H, W, 3], RGB."""
        options: dict[str, Any] = {"format": "rgb24"}
        if (frame.width, frame.height) != (self.width, self.height):
            interpolation = package("av.video.reformatter").Interpolation.BICUBIC
            options |= {"width": self.width, "height": self.height, "interpolation": interpolation}
        if self.matrix is not None:
            options["src_colorspace"] = self.matrix
        picture: np.ndarray = frame.reformat(**options).to_ndarray()
        if self.transposed:
            picture = picture.transpose(1, 0, 2)
        if self.flipped_x:
            picture = picture[:, ::-1]
        if self.flipped_y:
            picture = picture[::-1]
        return np.ascontiguousarray(picture)


def _turns(frame: Any) -> tuple[bool, bool, bool]:
    """Whether a frame is to be transposed, then flipped in x and in y, from its display matrix.

    The matrix is a, b, u, c, d, v, x, y, w: the pixel (p, q) is shown at (a p + c q + x, b p + d q + y), as in
    libavutil/display.h. Turns by other than right angles are rounded to one.
    """
    try:
        data = bytes(frame.side_data["DISPLAYMATRIX"])
    except KeyError:
        return False, False, False
    a, b, _, c, d, *_ = struct.unpack("=9i", data[:36])
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return False, a < 0, d < 0
    return True, c < 0, b < 0
