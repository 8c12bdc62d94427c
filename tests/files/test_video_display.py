"""Videos are read as players show them: upright, with square pixels, in SDR colors."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from longcat_core.errors import LongCatError
from longcat_core.files.media import open_video, read_video
from longcat_core.files.media.colors import BT2020, HLG, PQ, to_sdr
from longcat_core.files.media.display import Display

from .clips import counted, set_matrix, write_clip

QUARTERS = np.zeros((2, 32, 48, 3), np.uint8)
QUARTERS[:, :16, :24], QUARTERS[:, :16, 24:], QUARTERS[:, 16:, :24] = 60, 120, 180


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((1, 0, 0, 1), lambda f: f),
        ((-1, 0, 0, 1), lambda f: f[:, ::-1]),
        ((1, 0, 0, -1), lambda f: f[::-1]),
        ((-1, 0, 0, -1), lambda f: f[::-1, ::-1]),
        ((0, 1, -1, 0), lambda f: np.rot90(f, -1)),
        ((0, -1, 1, 0), lambda f: np.rot90(f)),
        ((0, 1, 1, 0), lambda f: f.transpose(1, 0, 2)),
        ((0, -1, -1, 0), lambda f: np.rot90(f.transpose(1, 0, 2), 2)),
    ],
)
def test_turned_and_mirrored(tmp_path: Path, matrix: tuple[int, ...], shown: object) -> None:
    path = write_clip(tmp_path / "a.mp4", QUARTERS, codec="libx264", pixels="yuv420p")
    plain = read_video(path)[0][0]
    set_matrix(path, *matrix)
    with open_video(path) as video:
        frame = next(iter(video))
        assert frame.shape[:2] == (video.height, video.width) and bool(video.note) == (matrix != (1, 0, 0, 1))
    np.testing.assert_array_equal(frame, shown(plain))


@pytest.mark.parametrize(
    ("aspect", "size"),
    [("2/1", (32, 96)), ("1/2", (64, 48)), ("16/15", (32, 51)), ("1/1", (32, 48)), ("500/1", (32, 48))],
)
def test_pixels_become_square(tmp_path: Path, aspect: str, size: tuple[int, int]) -> None:
    colors = {"sample_aspect_ratio": Fraction(aspect)}
    path = write_clip(tmp_path / "a.mkv", QUARTERS, codec="libx264", pixels="yuv420p", **colors)
    assert read_video(path)[0].shape[1:3] == size


@pytest.mark.parametrize(("width", "declared", "matrix"), [(48, 2, 6), (1280, 2, 1), (48, 1, 1), (1280, 6, 6)])
def test_an_undeclared_matrix_is_guessed_as_players_do(tmp_path: Path, width: int, declared: int, matrix: int) -> None:
    """The same bytes, read as they are declared and as `matrix`."""
    red = np.zeros((1, 32, width, 3), np.uint8)
    red[...] = (200, 40, 40)
    first = write_clip(tmp_path / "a.mkv", red, codec="ffv1", pixels="yuv420p", colorspace=declared)
    second = write_clip(tmp_path / "b.mkv", red, codec="ffv1", pixels="yuv420p", colorspace=matrix)
    np.testing.assert_array_equal(read_video(first)[0], read_video(second)[0])


def pq(nits: float) -> float:
    power = (nits / 10000) ** (2610 / 16384)
    return float(((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32))


@pytest.mark.parametrize(("transfer", "white"), [(HLG, 0.75), (PQ, pq(203))])
def test_white_of_hdr_becomes_white(transfer: int, white: float) -> None:
    levels = np.array((0, 0.5 * white, white, 0.9, 1)) * 65535
    shown = to_sdr(np.repeat(levels.astype(np.uint16), 3).reshape(1, 5, 3), transfer, BT2020)[0]
    assert (shown == shown[:, :1]).all(), "gray stays gray"
    tones = shown[:, 0].tolist()
    assert tones == sorted(tones) and tones[0] == 0 and tones[2] > 215 and tones[4] >= 254


@pytest.mark.parametrize("transfer", [HLG, PQ])
def test_an_hdr_clip_says_so(tmp_path: Path, transfer: int) -> None:
    colors = {"colorspace": 9, "color_primaries": 9, "color_trc": transfer}
    path = write_clip(tmp_path / "a.mkv", counted(3) + 190, codec="ffv1", pixels="yuv420p10le", **colors)
    with open_video(path) as video:
        assert "HDR colors" in video.note and next(iter(video)).mean() > 150


@pytest.mark.parametrize(
    ("transfer", "half", "white"),
    [(8, 186, 255), (9, 90, 255), (10, 69, 255), (17, 117, 255), (13, 128, 255), (6, 128, 255), (4, 128, 255)],
)
def test_other_transfer_functions(tmp_path: Path, transfer: int, half: int, white: int) -> None:
    """Linear light, logarithms and the cinema; sRGB, BT.601 and gamma 2.2 are shown as they are."""
    gray = np.full((1, 32, 48, 3), 128, np.uint8)
    gray[:, :, 24:] = 255
    path = write_clip(tmp_path / "a.mkv", gray, pixels="yuv444p", color_trc=transfer)
    with open_video(path) as video:
        frame = next(iter(video))
        assert ("are converted to BT.709" in video.note) == (transfer in (8, 9, 10, 17))
    assert np.abs(frame[0, 4].astype(int) - half).max() <= 3 and np.abs(frame[0, -4].astype(int) - white).max() <= 3


def test_colors_of_a_camera_are_refused(tmp_path: Path) -> None:
    class Frame:
        width, height, colorspace, color_trc, color_primaries = 48, 32, 1, 256, 1

    with pytest.raises(LongCatError, match=r"a\.mkv has the logarithmic colors of a camera, .*; save it as SDR"):
        Display.of(tmp_path / "a.mkv", Frame(), None)


@pytest.mark.parametrize("primaries", [8, 9, 11, 12])
def test_wide_gamuts(primaries: int) -> None:
    """Red of BT.709 is less than the red of a wider gamut, and white is white everywhere."""
    red, white = to_sdr(np.array([[(65535, 0, 0), (65535, 65535, 65535)]], np.uint16), 1, primaries)[0].tolist()
    assert red == [255, 0, 0] and white == [255, 255, 255]
    muted = to_sdr(np.array([[(40000, 20000, 20000)]], np.uint16), 1, primaries)[0, 0]
    assert muted[0] > 40000 >> 8 and muted[1] < 20000 >> 8


def test_the_white_of_xyz_is_white() -> None:
    white, red = to_sdr(np.array([[(65535,) * 3, (65535, 0, 0)]], np.uint16), 1, 10)[0].tolist()
    assert white == [255, 255, 255] and red[0] == 255 and red[1] == 0


def test_colors_that_cannot_be_converted_are_refused(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mkv", counted(1), codec="libx264", pixels="yuv420p", colorspace=14)
    with pytest.raises(LongCatError, match=r"a\.mkv has colors in ICtCp, .*; save it as SDR"):
        read_video(path)


def test_transparency_is_over_black(tmp_path: Path) -> None:
    import av

    pixels = np.full((2, 32, 48, 4), (200, 100, 50, 128), np.uint8)
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=15)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "bgra"
        for picture in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgba")))
        container.mux(stream.encode())
    assert np.abs(read_video(tmp_path / "a.mkv")[0].astype(int) - (100, 50, 25)).max() <= 1


@pytest.mark.parametrize(("declared", "black", "white"), [(1, 0, 252), (2, 16, 232)])
def test_the_declared_range_is_honored(tmp_path: Path, declared: int, black: int, white: int) -> None:
    """The same bytes, of limited range, declared as limited and as full."""
    ramp = np.broadcast_to(np.arange(0, 256, 4, dtype=np.uint8)[None, None, :, None], (1, 32, 64, 3))
    read = read_video(write_clip(tmp_path / "a.mkv", ramp, pixels="yuv420p", color_range=declared))[0]
    assert abs(int(read[0, 0, 0, 0]) - black) <= 3 and abs(int(read[0, 0, -1, 0]) - white) <= 3
