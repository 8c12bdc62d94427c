"""Read pictures as they are shown, and fit frames to a size."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import check_path
from .opening import decoding, opened, opened_picture, package

# Larger pictures are reduced by a whole factor as they are read; no frame has nearly as many pixels.
ENOUGH_PIXELS = 32_000_000


def read_image(path: str | Path) -> np.ndarray:
    """A picture as uint8 [H, W, 3], sRGB, turned and mirrored by its EXIF orientation, transparency over black.

    A picture of more than ENOUGH_PIXELS is reduced below. Raises LongCatError for a file that is not one of the
    PICTURE_FORMATS, is damaged, or has more than MAX_PIXELS.
    """
    operations = package("PIL.ImageOps")
    with _picture(path) as picture:
        _check_depth(picture)
        factor = math.ceil(math.sqrt(picture.width * picture.height / ENOUGH_PIXELS))
        return to_rgb(operations.exif_transpose(_reduced(picture, factor) if factor > 1 else picture))


def count_pictures(path: str | Path) -> int:
    """How many pictures a file holds: the frames of an animation, the pages of a TIFF. Raises as `read_image` does."""
    with _picture(path) as picture:
        # The second picture of an MPO is the first one again, small or for the other eye.
        return 1 if picture.format in ("MPO", "ICO") else int(getattr(picture, "n_frames", 1))


@contextmanager
def _picture(path: str | Path) -> Iterator[Any]:
    """A Pillow image, its pixels not decoded yet; what fails while it is used is a LongCatError too."""
    check_path("the path of the image", path)
    path, remedy = Path(path), "a PNG, JPEG or WebP"
    with opened(path, "image") as file, decoding(path, "image", remedy), opened_picture(path, file) as picture:
        yield picture


def _reduced(picture: Any, factor: int) -> Any:
    """A Pillow image whose sides are about `factor` times smaller."""
    image, (width, height) = package("PIL.Image"), picture.size
    # A JPEG is decoded at a smaller size at once.
    picture.draft(picture.mode, (-(-width // factor), -(-height // factor)))
    picture.load()
    factor = max(1, round(factor * picture.width / width))
    # By strips, because Pillow copies what it reduces.
    rows, strips = 64 * factor, []
    for top in range(0, picture.height, rows):
        strip = picture.crop((0, top, picture.width, min(picture.height, top + rows)))
        if strip.mode.startswith("I;16"):
            strip = image.fromarray((np.asarray(strip) >> 8).astype(np.uint8))
        elif strip.mode in ("P", "PA", "1"):
            strip = strip.convert("RGBA" if picture.has_transparency_data else "RGB")
        strips.append(strip.reduce(factor))
    reduced = image.new(strips[0].mode, (strips[0].width, sum(strip.height for strip in strips)))
    for number, strip in enumerate(strips):
        reduced.paste(strip, (0, 64 * number))
    reduced.info = {name: value for name, value in picture.info.items() if name != "transparency"}
    return reduced


def to_rgb(picture: Any) -> np.ndarray:
    """A Pillow image as uint8 [H, W, 3], transparency over black. Raises ValueError for pixels of 32 bits."""
    image = package("PIL.Image")
    if picture.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255.
        return np.repeat((np.asarray(picture) >> 8).astype(np.uint8)[..., None], 3, axis=2)
    _check_depth(picture)
    picture = _srgb(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = image.alpha_composite(image.new("RGBA", picture.size, (0, 0, 0, 255)), picture)
    return np.array(picture.convert("RGB"))


def _check_depth(picture: Any) -> None:
    if picture.mode in ("I", "F"):
        # Pillow clips them at 255, regardless of their range.
        raise ValueError("its pixels have 32 bits; save it with 8 or 16")


def _srgb(picture: Any) -> Any:
    """A Pillow image in sRGB, by its color profile if it has one that is not sRGB itself."""
    profile = picture.info.get("icc_profile")
    if not profile or picture.mode not in ("RGB", "RGBA", "CMYK"):
        return picture
    colors = package("PIL.ImageCms")
    try:
        source = colors.ImageCmsProfile(BytesIO(profile))
        if "srgb" in colors.getProfileDescription(source).lower():
            return picture
        kept = picture.getchannel("A") if picture.mode == "RGBA" else None
        base = picture.convert("RGB") if kept is not None else picture
        shown = colors.profileToProfile(base, source, colors.createProfile("sRGB"), outputMode="RGB")
        if kept is not None:
            shown.putalpha(kept)
        return shown
    except (colors.PyCMSError, OSError, ValueError, TypeError):
        # Players show a picture whose profile is damaged or does not fit it without the profile.
        return picture


def resize_and_crop(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [F, H, W, 3] or [H, W, 3] resized to cover height x width, then cropped evenly on both sides."""
    if frames.ndim == 4:
        return np.stack([resize_and_crop(frame, height, width) for frame in frames])
    if frames.shape[:2] == (height, width):
        return frames
    image = package("PIL.Image")
    scale = max(height / frames.shape[0], width / frames.shape[1])
    # The box is the part of the source that remains; passing it to resize crops and scales in one resampling.
    box_height, box_width = height / scale, width / scale
    top, left = (frames.shape[0] - box_height) / 2, (frames.shape[1] - box_width) / 2
    box = (max(0.0, left), max(0.0, top), left + box_width, top + box_height)
    box = (*box[:2], min(box[2], frames.shape[1]), min(box[3], frames.shape[0]))
    picture = image.fromarray(np.ascontiguousarray(frames))
    return np.asarray(picture.resize((width, height), image.Resampling.LANCZOS, box=box))


def cover(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, 3] as the avatar's public code fits it: resized to whole pixels that cover height x width, cropped.

    `resize_and_crop` keeps the aspect ratio to a fraction of a pixel, and differs from this in the last digits.
    """
    image = package("PIL.Image")
    rows, columns = picture.shape[:2]
    wide = width * rows > columns * height
    size = (width, max(height, rows * width // columns)) if wide else (max(width, columns * height // rows), height)
    resized = np.asarray(image.fromarray(np.ascontiguousarray(picture)).resize(size, image.Resampling.LANCZOS))
    left, top = size[0] // 2 - width // 2, size[1] // 2 - height // 2
    return resized[top : top + height, left : left + width]
