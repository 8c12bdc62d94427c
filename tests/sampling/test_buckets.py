"""The table of trained sizes and the choice of the one nearest in shape."""

from __future__ import annotations

import pytest

from longcat_core.errors import LongCatError
from longcat_core.sampling.buckets import BUCKETS, nearest_bucket

TABLES = [(resolution, divisor) for resolution, table in BUCKETS.items() for divisor in table]


@pytest.mark.parametrize(("resolution", "divisor"), TABLES)
def test_every_size_is_its_own_nearest_bucket(resolution: str, divisor: int) -> None:
    sizes = BUCKETS[resolution][divisor]
    assert len({round(h / w, 2) for h, w in sizes}) == len(sizes)
    for height, width in sizes:
        assert height % divisor == 0 and width % divisor == 0
        assert nearest_bucket(height, width, resolution, divisor) == (height, width)


def test_table_is_complete() -> None:
    counts = {resolution: [len(sizes) for sizes in table.values()] for resolution, table in BUCKETS.items()}
    assert counts == {"480p": [26, 15, 11, 9], "720p": [31, 21, 17, 5]}
    assert list(BUCKETS["480p"]) == list(BUCKETS["720p"]) == [32, 64, 128, 256]


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1080, 1920), (480, 832)), ((1920, 1080), (832, 480)), ((500, 500), (608, 640)), ((1, 100), (320, 1216))],
)
def test_nearest_in_shape(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert nearest_bucket(*size) == expected


def test_scale_of_the_picture_does_not_matter() -> None:
    assert nearest_bucket(270, 480) == nearest_bucket(2160, 3840)


def test_other_resolution() -> None:
    assert nearest_bucket(720, 1280, "720p") == (704, 1312)
    assert nearest_bucket(1000, 1000, "720p", 32) == (960, 960)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [((0, 10), "0x10"), ((10, 10, "1080p"), "480p, 720p"), ((10, 10, "480p", 16), "32, 64, 128, 256")],
)
def test_what_is_not_in_the_table(arguments: tuple, said: str) -> None:
    with pytest.raises(LongCatError, match=said):
        nearest_bucket(*arguments)
