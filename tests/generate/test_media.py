"""Contact sheets."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np

from longcat_core.files.media import read_image
from longcat_core.generate.media import contact_sheet, wrap


def test_contact_sheet_shows_frames_and_prompt(tmp_path: Path) -> None:
    video = np.zeros((33, 64, 96, 3), np.uint8)
    video[...] = np.arange(33, dtype=np.uint8)[:, None, None, None] * 7
    contact_sheet(tmp_path / "a.png", video, "a red circle")
    sheet = read_image(tmp_path / "a.png")
    # 4 columns and 3 rows of frames enlarged threefold, 14 apart, 20 around.
    assert sheet.shape[1] == 4 * 288 + 3 * 14 + 2 * 20
    assert sheet.shape[0] == 20 + 3 * (192 + 24 + 14) + 32 + 20
    corner = [sheet[20 + row * 230 + 5, 20 + column * 302 + 5, 0] for row in range(3) for column in range(4)]
    assert corner[0] == 0 and corner[-1] == 32 * 7
    assert all(a < b for a, b in pairwise(corner))
    assert sheet[-52:-20].min() < 100, "the prompt is written"
    assert sheet[20 + 192 : 20 + 192 + 24, 20:300].min() < 160, "frame and time are written"


def test_contact_sheet_enlarges_by_pixels(tmp_path: Path) -> None:
    video = np.random.default_rng(0).integers(0, 256, (1, 64, 96, 3), dtype=np.uint8)
    contact_sheet(tmp_path / "a.png", video, "x")
    sheet = read_image(tmp_path / "a.png")
    np.testing.assert_array_equal(sheet[20 : 20 + 192, 20 : 20 + 288], video[0].repeat(3, 0).repeat(3, 1))


def test_contact_sheet_of_large_frames(tmp_path: Path) -> None:
    contact_sheet(tmp_path / "a.png", np.zeros((5, 480, 832, 3), np.uint8), "x", count=2)
    assert read_image(tmp_path / "a.png").shape[1] == 2 * 280 + 14 + 2 * 20


def test_long_prompt_is_wrapped(tmp_path: Path) -> None:
    video = np.full((1, 32, 48, 3), 90, np.uint8)
    heights = []
    for prompt in ("short", "many words " * 40, "x" * 400, ""):
        contact_sheet(tmp_path / "a.png", video, prompt)
        heights.append(read_image(tmp_path / "a.png").shape[0])
    assert heights[1] > heights[0] + 200 and heights[2] > heights[0] + 200 and heights[3] == heights[0] - 32


def test_wrapping_loses_nothing() -> None:
    text = "a wonderful  sentence with averyveryverylongword in it"
    lines = wrap(text, len, 10)
    assert all(len(line) <= 10 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
