"""Contact sheets."""

from __future__ import annotations

import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from longcat_core.files.media import read_image
from longcat_core.generate import lettering
from longcat_core.generate.lettering import Lettering, wrap
from longcat_core.generate.media import contact_sheet


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


@pytest.mark.parametrize("most", [None, 3])
@pytest.mark.parametrize("text", ["x" * 400_000, "word " * 100_000, "\u5b57" * 400_000])
def test_wrapping_takes_no_longer_than_its_lines(text: str, most: int | None) -> None:
    measured = 0

    def measure(words: str) -> float:
        nonlocal measured
        measured += len(words)
        return len(words)

    lines = wrap(text, measure, 50, most)
    assert measured < 60 * len(text) and all(len(line) <= 50 for line in lines)
    assert len(lines) == most if most else "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert most is None or lines[-1].endswith(" ...")


@pytest.mark.parametrize("fonts", [True, False])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("\u4e00\u4e2a\u7ea2\u8272", "\u4e24\u53ea\u9ed1\u8272"),
        ("\u0645\u0631\u062d", "\u0628\u0627\u0644"),
        ("\u0928\u092e\u0938\u094d\u0924\u0947", "\u0939\u093f\u0928\u094d\u0926\u0940"),
        ("\U0001f642", "\U0001f643"),
    ],
)
def test_prompts_in_any_script_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str, second: str, fonts: bool
) -> None:
    """In a font of this machine, or as codes with a warning."""
    if not fonts:
        monkeypatch.setattr(lettering, "_system_fonts", lambda: iter(()))
    sheets = []
    for prompt in (first, second):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            contact_sheet(tmp_path / "a.png", np.full((1, 32, 48, 3), 90, np.uint8), f"a {prompt}")
        assert fonts or prompt[0] in str(said[0].message)
        sheets.append(read_image(tmp_path / "a.png"))
    assert sheets[0].shape != sheets[1].shape or (sheets[0] != sheets[1]).any()


def test_codes_of_missing_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lettering, "_system_fonts", lambda: iter(()))
    letters = Lettering(24)
    assert letters.shown("a \u5b57\u0939\u094d b") == r"a \u5b57\u0939\u094d b" and letters.lacking == [
        "\u5b57",
        "\u0939",
    ]


def test_control_characters_of_a_prompt(tmp_path: Path) -> None:
    contact_sheet(tmp_path / "a.png", np.full((1, 32, 48, 3), 90, np.uint8), "a\x1b[31m\nb\u202e")
    assert read_image(tmp_path / "a.png").shape[0] > 200
