"""Read pictures as they are shown, and fit frames to a size."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from .opening import decoding, opened, opened_picture, package

# Larger pictures are reduced by a whole factor as they are read; no frame has nearly as many pixels.
ENOUGH_PIXELS = 64_000_000


def read_image(path: str | Path) -> np.ndarray:
    """A picture as uint8 [H, W, 3], sRGB, turned and mirrored by its EXIF orientation, transparency over black.

    A picture of more than ENOUGH_PIXELS is reduced below. Raises LongCatError for a file that is not one of the
    PICTURE_FORMATS, is damaged, or has more than MAX_PIXELS.
    """
    path = Path(path)
    operations = package("PIL.ImageOps")
    with opened(path, "image") as file, decoding(path, "image", "a PNG, JPEG or WebP"), opened_picture(file) as picture:
        factor = 1
        while picture.width * picture.height > ENOUGH_PIXELS * factor**2:
            factor *= 2
        # A JPEG is decoded at the smaller size at once; other formats are reduced as soon as they are decoded.
        picture.draft(picture.mode, (-(-picture.width // factor), -(-picture.height // factor)))
        reduced = to_sized(picture, ENOUGH_PIXELS)
        return to_rgb(operations.exif_transpose(reduced))


def to_sized(picture: Any, pixels: int) -> Any:
    """A Pillow image, reduced by a whole factor if it has more than `pixels`."""
    factor = 1
    while picture.width * picture.height > pixels * factor**2:
        factor += 1
    if factor == 1:
        return picture
    if picture.mode in ("P", "1"):
        picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    return picture.reduce(factor)


def to_rgb(picture: Any) -> np.ndarray:
    """A Pillow image as uint8 [H, W, 3], transparency over black. Raises ValueError for pixels of 32 bits."""
    image = package("PIL.Image")
    if picture.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255.
        return np.repeat((np.asarray(picture) >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if picture.mode in ("I", "F"):
        # Pillow clips them at 255, regardless of their range.
        raise ValueError("its pixels have 32 bits; save it with 8 or 16")
    picture = _srgb(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = image.alpha_composite(image.new("RGBA", picture.size, (0, 0, 0, 255)), picture)
    return np.array(picture.convert("RGB"))


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
