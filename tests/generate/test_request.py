"""Requests: what is filled in for which model, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from longcat_core.errors import LongCatError
from longcat_core.files.media import write_video
from longcat_core.generate.request import (
    MAX_SEED,
    NANO,
    RELEASED,
    GenerateRequest,
    check_frames,
    check_side,
    nearest_frame_counts,
)
from longcat_core.optimize.sparse.settings import Sparse
from longcat_core.sampling.guidance import DEFAULT_NEGATIVE_PROMPT

from ..support.clips import numbered, numbers, write_clip

IMAGE = np.zeros((1, 30, 40, 3), np.uint8)
CLIP = np.zeros((20, 30, 40, 3), np.uint8)


def test_text_to_video_defaults() -> None:
    nano = GenerateRequest("x").filled(NANO)
    assert (nano.height, nano.width, nano.frames, nano.steps, nano.guidance_scale) == (64, 96, 33, 50, 4.0)
    assert (nano.schedule, nano.negative_prompt, nano.cond_frames) == ("base", DEFAULT_NEGATIVE_PROMPT, 0)
    released = GenerateRequest("x").filled(RELEASED)
    assert (released.height, released.width, released.frames, released.schedule) == (480, 832, 93, "base")


def test_what_is_given_stays() -> None:
    given = GenerateRequest(
        "x", "", 32, 48, 5, 7, 1.5, seed=MAX_SEED, schedule="enhance_hf", num_cond_frames=5, kv_cache="off", fps=24,
        step_cache=0.1, guidance_until=0.9, sparse=Sparse(), speed="exact",
    )  # fmt: skip
    found = (given.filled(NANO), given.filled(RELEASED), given)
    nano, released, own = (vars(request) | {"chosen": None} for request in found)
    assert nano == released == own


def test_filling_twice_changes_nothing() -> None:
    once = GenerateRequest("x", given=CLIP).filled(RELEASED)
    assert once.filled(NANO) == once and once.given is CLIP


@pytest.mark.parametrize(
    ("fps", "rate", "wanted"),
    [
        (15, 15, [35, 36, 37, 38, 39]),
        (30, 15, [31, 33, 35, 37, 39]),
        (60, 15, [23, 27, 31, 35, 39]),
        (29.97, 15, [31, 33, 35, 37, 39]),
        (7.5, 15, [37, 37, 38, 38, 39]),
        (60, 30, [31, 33, 35, 37, 39]),
        (30, 30, [35, 36, 37, 38, 39]),
    ],
)
def test_a_clip_is_continued_at_the_speed_that_it_has(
    tmp_path: Path, fps: float, rate: float, wanted: list[int]
) -> None:
    clip = write_clip(tmp_path / "a.mkv", numbered(40), fps)
    request = GenerateRequest("x", video=clip, num_cond_frames=5, fps=rate).filled(NANO)
    assert request.given is not None and numbers(request.given) == wanted
    assert [f"at {rate:g}" in note for note in request.notes()] == [True] * (round(fps) != rate)
    # Another rate of a filled request is another choice of frames.
    again = replace(request, fps=2 * rate).filled(NANO)
    assert again.given is not None and numbers(again.given) != wanted


def test_a_clip_that_is_too_short_is_measured_in_seconds(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.mkv", numbered(20), 30)
    with pytest.raises(LongCatError, match=r"lasts 0\.67 s and has 10 frames at 15 .* last 0\.87 s; .* at most 9 "):
        GenerateRequest("x", video=clip).filled(NANO)


def test_the_video_begins_with_the_clip_itself() -> None:
    clip, made = np.random.default_rng(0).integers(0, 256, (2, 9, 32, 48, 3), np.uint8)
    for given, count in ((clip, 5), (clip[:1], 0), (None, 0)):
        request = GenerateRequest("x", given=given, num_cond_frames=5, frames=9, height=32, width=48).filled(NANO)
        found = request.begun(made)
        assert np.array_equal(found[:count], clip[4:][:count]) and np.array_equal(found[count:], made[count:])
    assert (made[4:] != clip[4:]).any(), "what is handed in stays"


def test_what_is_not_used_of_a_file_is_said(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.mkv", numbered(20), sound="aac")
    notes = GenerateRequest("x", video=clip, num_cond_frames=5).filled(NANO).notes()
    assert notes == [f"the sound of {clip} is left out"]
    write_video(tmp_path / "a.gif", numbered(5), 15)
    notes = GenerateRequest("x", image=tmp_path / "a.gif").filled(NANO).notes()
    assert notes == [f"{tmp_path / 'a.gif'} holds 5 pictures; the first one is used"]


@pytest.mark.parametrize("number", [np.int64, np.int32, np.uint16, np.array, torch.tensor])
def test_numbers_of_numpy_and_pytorch_are_numbers(number: Any) -> None:
    request = GenerateRequest("x", seed=number(7), frames=number(17), steps=number(2), height=number(64)).filled(NANO)
    assert request == GenerateRequest("x", seed=7, frames=17, steps=2, height=64).filled(NANO)
    assert {type(value) for value in (request.seed, request.frames, request.steps, request.height)} == {int}
    guided = GenerateRequest("x", guidance_scale=np.float32(1.5), fps=np.float64(24), step_cache=np.float16(0.25))
    assert json.dumps([guided.guidance_scale, guided.fps, guided.step_cache]) == "[1.5, 24.0, 0.25]"


@pytest.mark.parametrize("number", [True, np.True_, 17.0, np.float32(17), "17", np.array([17]), None, np.nan])
def test_what_is_not_a_whole_number_is_refused(number: Any) -> None:
    with pytest.raises(LongCatError, match="steps are out of range"):
        GenerateRequest("x", frames=17, steps=[] if number is None else number).filled(NANO)


def test_a_new_file_in_a_filled_request_is_read(tmp_path: Path) -> None:
    for name, color in (("a.png", (10, 20, 30)), ("b.png", (200, 100, 0))):
        Image.new("RGB", (40, 30), color).save(tmp_path / name)
    write_video(tmp_path / "c.mkv", CLIP, 15)
    first = GenerateRequest("x", image=tmp_path / "a.png").filled(NANO)
    again = replace(first, image=tmp_path / "b.png").filled(NANO)
    assert (again.given == (200, 100, 0)).all() and again.image == tmp_path / "b.png"
    # Nothing is read twice.
    assert again.filled(NANO).given is again.given
    clip = replace(first, image=None, video=tmp_path / "c.mkv").filled(NANO)
    assert np.array_equal(clip.given, CLIP[-13:])
    assert len(replace(clip, num_cond_frames=5).filled(NANO).given) == 5
    # Without its file it is a request of text alone.
    assert replace(first, image=None).filled(NANO).given is None


def test_new_frames_in_a_filled_request_take_the_place_of_its_file(tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), (10, 20, 30)).save(tmp_path / "a.png")
    first = GenerateRequest("x", image=tmp_path / "a.png").filled(NANO)
    own = replace(first, given=IMAGE).filled(NANO)
    assert own.given is IMAGE and own.image is None and own.filled(NANO).given is IMAGE
    assert (replace(own, image=tmp_path / "a.png").filled(NANO).given == (10, 20, 30)).all()
    assert replace(own, given=CLIP, num_cond_frames=5).filled(NANO).cond_frames == 5
    assert replace(first, given=None).filled(NANO).given.shape == (1, 30, 40, 3)


def test_distilled_brings_its_own_steps_and_guidance() -> None:
    request = GenerateRequest("x", schedule="distilled").filled(NANO)
    assert (request.steps, request.guidance_scale, request.notes()) == (16, 1.0, [])
    guided = GenerateRequest("x", schedule="distilled", guidance_scale=4.0).filled(NANO)
    assert guided.guidance_scale == 4.0 and "guidance 1, not 4" in guided.notes()[0]


def test_note_on_a_negative_prompt_without_guidance() -> None:
    assert "no effect" in GenerateRequest("x", "fog", guidance_scale=1).filled(NANO).notes()[0]
    assert GenerateRequest("x", "fog").filled(NANO).notes() == []


def test_conditioning_picks_size_and_schedule() -> None:
    image = GenerateRequest("x", given=IMAGE).filled(RELEASED)
    assert (image.cond_frames, image.schedule, image.height, image.width) == (1, "base", 544, 736)
    clip = GenerateRequest("x", given=CLIP).filled(RELEASED)
    assert (clip.cond_frames, clip.schedule, clip.height, clip.width) == (13, "enhance_hf", 544, 736)
    nano = GenerateRequest("x", given=CLIP).filled(NANO)
    assert (nano.cond_frames, nano.schedule, nano.height, nano.width) == (13, "base", 64, 96)
    sized = GenerateRequest("x", given=IMAGE, height=64, width=64).filled(RELEASED)
    assert (sized.height, sized.width) == (64, 64)


def test_files_are_read(tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), (10, 20, 30)).save(tmp_path / "a.png")
    image = GenerateRequest("x", image=tmp_path / "a.png").filled(NANO)
    assert image.given.shape == (1, 30, 40, 3) and (image.given == (10, 20, 30)).all()

    video = np.arange(20, dtype=np.uint8)[:, None, None, None].repeat(16, 1).repeat(16, 2).repeat(3, 3)
    write_video(tmp_path / "a.webp", video, 15)
    clip = GenerateRequest("x", video=tmp_path / "a.webp", num_cond_frames=5).filled(NANO)
    np.testing.assert_array_equal(clip.given, video[-5:])


@pytest.mark.parametrize(("frames", "nearest"), [(1, (1, 5)), (2, (1, 5)), (4, (1, 5)), (5, (5, 9)), (32, (29, 33))])
def test_nearest_frame_counts(frames: int, nearest: tuple[int, int]) -> None:
    assert nearest_frame_counts(frames) == nearest


@pytest.mark.parametrize("frames", range(1, 40))
def test_frame_counts(frames: int) -> None:
    if frames % 4 == 1:
        check_frames(frames)
    else:
        with pytest.raises(LongCatError) as caught:
            check_frames(frames)
        numbers = [int(n) for n in str(caught.value).rpartition("nearest are ")[2].split(" and ")]
        assert numbers[0] < frames < numbers[1] == numbers[0] + 4 and numbers[0] % 4 == 1


@pytest.mark.parametrize(("side", "nearest"), [(17, 16), (24, 32), (100, 96), (479, 480), (4095, 4096)])
def test_sides(side: int, nearest: int) -> None:
    with pytest.raises(LongCatError, match=f"width {side} is not a multiple of 16; the nearest one is {nearest}$"):
        check_side("width", side)
    check_side("width", nearest)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt": None}, "prompt is a NoneType"),
        ({"prompt": " &nbsp;&amp;nbsp; \n"}, "prompt is empty"),
        ({"prompt": "\u200b\x1a"}, "prompt is empty"),
        ({"prompt": "a \udcff"}, "prompt is not valid UTF-8 at character 2"),
        ({"negative_prompt": 3}, "negative prompt is a int"),
        ({"height": 64.0}, "height 64.0 must be a whole number"),
        ({"height": -64}, "height -64 .*16 to 4096"),
        ({"width": 100000}, "width 100000 .*16 to 4096"),
        ({"frames": True}, "True frames"),
        ({"frames": 0}, "0 frames .*1 to 2001"),
        ({"frames": -3}, "-3 frames .*1 to 2001"),
        ({"frames": 40001}, "40001 frames .*1 to 2001"),
        ({"steps": 1.5}, "1.5 steps"),
        ({"steps": -1}, "-1 steps .*1 to 1000"),
        ({"steps": 1001}, "1001 steps .*1 to 1000"),
        ({"guidance_scale": "4"}, "guidance 4"),
        ({"guidance_scale": 31}, "guidance 31 .*0 to 30"),
        ({"guidance_scale": float("inf")}, "guidance inf"),
        ({"guidance_scale": float("nan")}, "guidance nan is out of range; give a number from 0 to 30"),
        ({"seed": 1.0}, "seed 1.0"),
        ({"seed": -1}, "seed -1"),
        ({"seed": MAX_SEED + 1}, "2\\^63"),
        ({"fps": float("inf")}, "fps inf"),
        ({"fps": float("nan")}, "fps nan .*1 to 120"),
        ({"schedule": "refine"}, "unknown schedule 'refine'; choose one of base, distilled, enhance_hf"),
        ({"schedule": "distilled", "steps": 51}, "51 steps .* 1 to 50"),
        ({"num_cond_frames": 12}, "nearest are 9 and 13"),
        ({"num_cond_frames": 0}, "0 conditioning frames"),
        ({"num_cond_frames": -4}, "-4 conditioning frames .*1 and 5"),
        ({"given": IMAGE, "frames": 1}, "at least 5 frames"),
        ({"given": CLIP, "frames": 13}, "at least 17 frames"),
        ({"given": CLIP[:9]}, "9 given frames are fewer than the 13"),
        ({"given": CLIP.astype(np.float32)}, "float32"),
        ({"given": CLIP[0]}, "30, 40, 3"),
        ({"image": Path("a"), "video": Path("b")}, "an image and a video are both given"),
    ],
)
def test_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(LongCatError, match=said) as caught:
        GenerateRequest(**{"prompt": "x", **changes}).filled(NANO)
    assert "\n" not in str(caught.value)


def test_limits_themselves_are_allowed() -> None:
    for changes in ({"guidance_scale": 0}, {"guidance_scale": 30.0}, {"steps": 1}, {"steps": 1000}, {"height": 4096}):
        GenerateRequest("x", **changes).filled(NANO)
