"""The sizes that the released model was trained on, by resolution class and the divisor of both sides."""

from __future__ import annotations

from ..errors import LongCatError

Sizes = tuple[tuple[int, int], ...]


def _sizes(table: str) -> Sizes:
    return tuple((int(height), int(width)) for height, width in (size.split("x") for size in table.split()))


# resolution -> divisor of both sides -> (height, width), from wide to tall.
BUCKETS: dict[str, dict[int, Sizes]] = {
    "480p": {
        32: _sizes(
            "320x1216 352x1120 384x1024 416x960 448x864 480x832 512x768 544x736 576x672 608x640 640x608 672x576 "
            "704x544 736x544 768x512 800x480 832x480 896x448 960x416 992x384 1056x384 1088x352 1184x320 1216x320 "
            "1248x320 1280x320"
        ),
        64: _sizes(
            "320x1216 384x1024 448x896 512x768 576x704 640x640 704x576 768x512 832x448 896x448 960x384 1088x384 "
            "1152x320 1216x320 1280x320"
        ),
        128: _sizes("256x1024 384x1024 384x896 512x896 512x768 640x640 768x512 896x512 896x384 1024x384 1024x256"),
        256: _sizes("256x1024 256x768 256x512 512x768 512x512 768x512 512x256 768x256 1024x256"),
    },
    "720p": {
        32: _sizes(
            "480x1920 512x1792 544x1696 576x1600 608x1504 672x1376 704x1312 736x1248 800x1152 832x1120 864x1056 "
            "896x1024 928x992 960x960 992x928 1024x896 1056x864 1088x832 1120x832 1152x800 1248x736 1344x672 "
            "1376x672 1504x608 1536x608 1632x576 1664x544 1696x544 1856x512 1888x480 1920x480"
        ),
        64: _sizes(
            "448x2048 512x1792 576x1600 640x1408 704x1280 768x1216 832x1088 896x1024 960x960 1024x896 1088x832 "
            "1152x768 1216x768 1280x704 1344x704 1408x640 1472x640 1536x576 1664x576 1856x512 1920x512"
        ),
        128: _sizes(
            "384x1920 512x1920 512x1536 640x1536 640x1280 768x1280 768x1152 896x1152 1024x1024 1152x896 1152x768 "
            "1280x768 1280x640 1536x640 1536x512 1920x512 1920x384"
        ),
        256: _sizes("512x1536 768x1280 1024x1024 1280x768 1536x512"),
    },
}


def nearest_bucket(height: int, width: int, resolution: str = "480p", divisor: int = 32) -> tuple[int, int]:
    """The (height, width) in pixels whose aspect ratio is nearest to that of `height` x `width`.

    Ratios are height / width, compared by difference after the table's are rounded to two digits, as the public
    pipeline does; of two equally near ratios the wider wins. Raises LongCatError for a resolution or divisor
    that is not in the table.
    """
    if height < 1 or width < 1:
        raise LongCatError(f"{height}x{width} has no aspect ratio; both sides must be at least 1 pixel")
    table = BUCKETS.get(resolution)
    if table is None:
        raise LongCatError(f"unknown resolution {resolution!r}; choose one of {', '.join(BUCKETS)}")
    if divisor not in table:
        choices = ", ".join(str(d) for d in table)
        raise LongCatError(f"no {resolution} sizes are divisible by {divisor}; choose one of {choices}")
    return min(table[divisor], key=lambda size: abs(round(size[0] / size[1], 2) - height / width))
