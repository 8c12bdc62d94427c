"""The sizes that the released model was trained on, by resolution class and the divisor of both sides."""

from __future__ import annotations

from ..errors import LongCatError

# resolution -> divisor of both sides -> (height, width), from wide to tall.
BUCKETS: dict[str, dict[int, tuple[tuple[int, int], ...]]] = {
    "480p": {
        32: (
            (320, 1216),
            (352, 1120),
            (384, 1024),
            (416, 960),
            (448, 864),
            (480, 832),
            (512, 768),
            (544, 736),
            (576, 672),
            (608, 640),
            (640, 608),
            (672, 576),
            (704, 544),
            (736, 544),
            (768, 512),
            (800, 480),
            (832, 480),
            (896, 448),
            (960, 416),
            (992, 384),
            (1056, 384),
            (1088, 352),
            (1184, 320),
            (1216, 320),
            (1248, 320),
            (1280, 320),
        ),
        64: (
            (320, 1216),
            (384, 1024),
            (448, 896),
            (512, 768),
            (576, 704),
            (640, 640),
            (704, 576),
            (768, 512),
            (832, 448),
            (896, 448),
            (960, 384),
            (1088, 384),
            (1152, 320),
            (1216, 320),
            (1280, 320),
        ),
        128: (
            (256, 1024),
            (384, 1024),
            (384, 896),
            (512, 896),
            (512, 768),
            (640, 640),
            (768, 512),
            (896, 512),
            (896, 384),
            (1024, 384),
            (1024, 256),
        ),
        256: (
            (256, 1024),
            (256, 768),
            (256, 512),
            (512, 768),
            (512, 512),
            (768, 512),
            (512, 256),
            (768, 256),
            (1024, 256),
        ),
    },
    "720p": {
        32: (
            (480, 1920),
            (512, 1792),
            (544, 1696),
            (576, 1600),
            (608, 1504),
            (672, 1376),
            (704, 1312),
            (736, 1248),
            (800, 1152),
            (832, 1120),
            (864, 1056),
            (896, 1024),
            (928, 992),
            (960, 960),
            (992, 928),
            (1024, 896),
            (1056, 864),
            (1088, 832),
            (1120, 832),
            (1152, 800),
            (1248, 736),
            (1344, 672),
            (1376, 672),
            (1504, 608),
            (1536, 608),
            (1632, 576),
            (1664, 544),
            (1696, 544),
            (1856, 512),
            (1888, 480),
            (1920, 480),
        ),
        64: (
            (448, 2048),
            (512, 1792),
            (576, 1600),
            (640, 1408),
            (704, 1280),
            (768, 1216),
            (832, 1088),
            (896, 1024),
            (960, 960),
            (1024, 896),
            (1088, 832),
            (1152, 768),
            (1216, 768),
            (1280, 704),
            (1344, 704),
            (1408, 640),
            (1472, 640),
            (1536, 576),
            (1664, 576),
            (1856, 512),
            (1920, 512),
        ),
        128: (
            (384, 1920),
            (512, 1920),
            (512, 1536),
            (640, 1536),
            (640, 1280),
            (768, 1280),
            (768, 1152),
            (896, 1152),
            (1024, 1024),
            (1152, 896),
            (1152, 768),
            (1280, 768),
            (1280, 640),
            (1536, 640),
            (1536, 512),
            (1920, 512),
            (1920, 384),
        ),
        256: (
            (512, 1536),
            (768, 1280),
            (1024, 1024),
            (1280, 768),
            (1536, 512),
        ),
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
