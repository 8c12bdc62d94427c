"""Long video on the golden model: what is generated again, what a segment is given, how joins are reported."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from longcat_core.errors import LongCatError
from longcat_core.generate import pipeline as pipelines
from longcat_core.generate import segments
from longcat_core.generate.long_video import (
    MAX_SEGMENTS,
    Finished,
    Join,
    LongVideoRequest,
    long_video,
    measure_join,
    new_frames,
    segment_folder,
    spread_prompts,
)
from longcat_core.generate.pipeline import Pipeline
from longcat_core.generate.request import MAX_SEED, NANO, RELEASED, GenerateRequest
from longcat_core.generate.segments import FRAMES, LATENTS, RECORD
from longcat_core.optimize.sparse.settings import Sparse
from longcat_core.sampling.conditioning import to_pixels
from longcat_core.sampling.sampler import Interrupted

from ..support.folders import contents, copied, flipped, state
from ..support.tiny import SEED, unwanted

PROMPTS = ("a", "b", "c", "d")
FIRST = GenerateRequest("", height=16, width=32, frames=9, steps=2, seed=SEED)


def request(prompts: tuple[str, ...] = PROMPTS, first: GenerateRequest = FIRST, **changes: Any) -> LongVideoRequest:
    return LongVideoRequest(first, prompts, **{"overlap": 5} | changes).filled(NANO)


def run(engine: Pipeline, path: Path, *args: Any, **changes: Any) -> list[Finished]:
    return list(long_video(lambda: engine, request(*args, **changes), segment_folder(path)))


def of(number: int, found: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in found.items() if name.startswith(f"segment-{number + 1:03}/")}


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run; not to be written to."""
    path = tmp_path_factory.mktemp("whole")
    run(tiny, path)
    return path


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return copied(whole, tmp_path / "copy")


# --- a whole run -----------------------------------------------------------------------------------------------------


def test_segments_follow_each_other(tiny, tmp_path, made):
    steps = []
    folder = segment_folder(tmp_path / "v")
    finished = []
    for segment in long_video(lambda: tiny, request(), folder, lambda *step: steps.append(step)):
        finished.append(segment)
        kept = [item.name for item in sorted(folder.path.glob("segment-*"))]
        assert kept == [f"segment-{n + 1:03}" for n in range(len(finished))], "kept before the next is begun"
    assert made == [0, 1, 2, 3]
    assert [(s.number, s.of, s.skip, s.reused) for s in finished] == [(n, 4, 5 if n else 0, False) for n in range(4)]
    assert [(n, of, s.index, s.total) for n, of, s in steps] == [(n, 4, i, 2) for n in range(4) for i in range(2)]
    parts = [folder.frames(number) for number in range(4)]
    assert all(part.shape == (9, 16, 32, 3) and part.dtype == np.uint8 for part in parts)
    assert not np.array_equal(parts[0], parts[1])
    video = np.concatenate(list(new_frames(folder, finished)))
    assert len(video) == request().total_frames == 9 + 3 * (9 - 5)
    assert np.array_equal(video, np.concatenate([parts[0], *[part[5:] for part in parts[1:]]]))


def test_one_segment_is_a_plain_video(tiny, tmp_path):
    (finished,) = run(tiny, tmp_path / "v", ("a",))
    frames = tiny.generate(replace(FIRST, prompt="a")).frames
    assert np.array_equal(segment_folder(tmp_path / "v").frames(0), frames) and finished.join is None


def test_a_request_is_a_video_bit_for_bit(tiny, whole, tmp_path):
    run(tiny, tmp_path / "v")
    assert contents(tmp_path / "v") == contents(whole) and len(contents(whole)) == 4 * 3


def test_what_a_segment_is_made_of(tiny):
    """Every segment by hand: its prompt, its seed, the end of the one before, the schedule of clips."""
    wanted = request(schedule="enhance_hf")
    assert wanted.segment(0) == wanted.first and wanted.first.schedule == "base"
    given = np.zeros((5, 16, 32, 3), np.uint8)
    second = wanted.segment(1, given)
    assert (second.prompt, second.seed, second.schedule, second.num_cond_frames) == ("b", 8, "enhance_hf", 5)
    assert second.given is given and second.steps == 2 and second.guidance_scale == 4.0
    late = request(first=replace(FIRST, seed=MAX_SEED))
    assert [late.segment(number).seed for number in range(3)] == [MAX_SEED, 0, 1]


@pytest.mark.parametrize(
    ("first", "schedule", "defaults", "wanted"),
    [
        ({}, None, NANO, ("base", "base", 2)),
        ({}, None, RELEASED, ("base", "enhance_hf", 2)),
        ({"schedule": "distilled", "steps": None}, None, RELEASED, ("distilled", "distilled", 16)),
        ({"schedule": "enhance_hf"}, "base", RELEASED, ("enhance_hf", "base", 2)),
    ],
)
def test_schedules_of_later_segments(first, schedule, defaults, wanted):
    filled = LongVideoRequest(replace(FIRST, **first), PROMPTS, 5, schedule).filled(defaults)
    assert (filled.first.schedule, filled.segment(1).schedule, filled.segment(1).steps) == wanted


def test_the_released_model_goes_on_as_it_was_trained():
    filled = LongVideoRequest(GenerateRequest(""), PROMPTS).filled(RELEASED)
    assert (filled.first.frames, filled.overlap, filled.total_frames) == (93, 13, 93 + 3 * 80)


# --- resumed ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("damage", [shutil.rmtree, flipped(FRAMES), flipped(LATENTS)])
def test_only_what_is_lost_or_damaged_is_made_again(tiny, whole, copy, made, number, damage):
    damage(copy / f"segment-{number + 1:03}")
    assert contents(copy) != contents(whole)
    finished = run(tiny, copy)
    assert made == [number]
    assert [segment.reused for segment in finished] == [n != number for n in range(4)]
    assert contents(copy) == contents(whole)


@pytest.mark.parametrize("number", range(4))
def test_a_segment_whose_record_is_damaged_is_made_again_beside_it(tiny, whole, copy, made, number):
    flipped(RECORD)(copy / f"segment-{number + 1:03}")
    before = contents(copy)
    finished = run(tiny, copy)
    assert made == [number] and finished[number].place == f"segment-{number + 1:03}-v2"
    after = contents(copy)
    assert {name: after[name] for name in before} == before
    again = {name.replace("-v2", ""): content for name, content in after.items() if "-v2" in name}
    assert again == of(number, contents(whole))
    assert all(segment.reused for segment in run(unwanted, copy)) and made == [number]


def test_where_all_is_there_no_model_is_loaded(whole, copy, made):
    before = contents(copy)
    finished = list(long_video(unwanted, request(), segment_folder(copy)))
    assert made == [] and all(segment.reused for segment in finished) and contents(copy) == before
    assert len(np.concatenate(list(new_frames(segment_folder(copy), finished)))) == request().total_frames


def test_a_model_is_loaded_once_and_only_when_it_is_needed(tiny, copy):
    for number in (2, 3):
        shutil.rmtree(copy / f"segment-{number:03}")
    loaded = []
    segments = long_video(lambda: loaded.append(1) or tiny, request(), segment_folder(copy))
    assert next(segments).reused and loaded == []
    assert [segment.reused for segment in segments] == [False, False, True] and loaded == [1]


def test_joins_are_reported_again_from_the_folder(tiny, whole, tmp_path):
    finished = run(tiny, tmp_path / "v")
    again = list(long_video(unwanted, request(), segment_folder(tmp_path / "v")))
    assert [segment.join for segment in again] == [segment.join for segment in finished]
    frames = [segment_folder(whole).frames(number) for number in range(4)]
    assert [segment.join for segment in again] == [None, *[measure_join(*frames[n : n + 2], 5) for n in range(3)]]
    record = json.loads((whole / "segment-002" / RECORD).read_text())
    assert tuple(record["notes"]["join"]["color"]) == again[1].join.color


# --- other prompts, other numbers of segments ------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1, 3])
def test_another_prompt_makes_the_video_from_there_and_the_old_one_stays(tiny, whole, copy, made, number):
    before = contents(whole)
    other = tuple("x" if n == number else prompt for n, prompt in enumerate(PROMPTS))
    finished = run(tiny, copy, other)
    assert made == list(range(number, 4))
    # Another first segment begins another take; a later one stands beside the old one.
    assert [segment.place for segment in finished] == [
        f"take-002/segment-{n + 1:03}" if number == 0 else f"segment-{n + 1:03}{'-v2' if n >= number else ''}"
        for n in range(4)
    ]
    after = contents(copy)
    assert {name: after[name] for name in before} == before
    made.clear()
    back, again = (list(long_video(unwanted, request(prompts), segment_folder(copy))) for prompts in (PROMPTS, other))
    assert all(segment.reused for segment in (*back, *again)) and made == []
    assert [segment.place for segment in back] == [f"segment-{n + 1:03}" for n in range(4)]
    assert [segment.place for segment in again] == [segment.place for segment in finished]
    folder = segment_folder(copy)
    for kept, prompts in ((back, PROMPTS), (again, other)):
        fresh = run(tiny, copy.with_name("fresh"), prompts)
        wanted = np.concatenate(list(new_frames(segment_folder(copy.with_name("fresh")), fresh)))
        assert np.array_equal(np.concatenate(list(new_frames(folder, kept))), wanted)


def test_fewer_and_more_segments_use_what_is_there(tiny, whole, copy, made):
    assert len(run(tiny, copy, PROMPTS[:2])) == 2 and made == [] and contents(copy) == contents(whole)
    finished = run(tiny, copy, (*PROMPTS, "e"))
    assert made == [4] and [segment.reused for segment in finished] == [True] * 4 + [False]
    assert {name: content for name, content in contents(copy).items() if "005" not in name} == contents(whole)


def test_segments_beyond_a_changed_end_are_not_taken_for_later_ones(tiny, whole, copy, made):
    """Two segments of another prompt, then four again: the last two came from other frames."""
    run(tiny, copy, ("a", "x"))
    made.clear()
    run(tiny, copy, ("a", "x", "c", "d"))
    assert made == [2, 3]


# --- other settings --------------------------------------------------------------------------------------------------

OTHER = {
    "seed": ({}, {"seed": 8}, "seed 7 there, 8 now"),
    "steps": ({}, {"steps": 3}, "steps 2 there, 3 now"),
    "height": ({}, {"height": 32}, "height 16 there, 32 now"),
    "width": ({}, {"width": 16}, "width 32 there, 16 now"),
    "frames": ({}, {"frames": 13}, "frames 9 there, 13 now"),
    "guidance": ({}, {"guidance_scale": 3.0}, "guidance_scale 4.0 there, 3.0 now"),
    "negative prompt": ({}, {"negative_prompt": "fog"}, "negative_prompt"),
    "step cache": ({}, {"step_cache": 0.1}, "step cache none there, 0.1 now"),
    "until": ({}, {"guidance_until": 0.6}, "guidance until none there, 0.6 now"),
    "sparse attention": ({}, {"sparse": Sparse(0.3, dense_steps=1.0)}, "sparse none there, density 0.3"),
    "model": ({"model": {"model": "f00"}}, {}, "model none there, f00 now"),
    "lossy": ({"lossy": {"precision": "bfloat16"}}, {}, "precision none there, bfloat16 now"),
    "given frames": ({}, {"given": np.zeros((1, 16, 32, 3), np.uint8)}, "given frames none there"),
}


@pytest.mark.parametrize("name", OTHER)
def test_other_settings_begin_a_take_and_the_old_one_is_found_again(tiny, copy, made, name):
    changes, first, said = OTHER[name]
    before, heard = state(copy), []
    folder = segment_folder(copy, say=heard.append)
    other = request(PROMPTS[:2], replace(FIRST, **first), **changes)
    finished = list(long_video(lambda: tiny, other, folder))
    assert [segment.place for segment in finished] == ["take-002/segment-001", "take-002/segment-002"]
    assert heard == [folder.said] and folder.said.startswith(
        f"a new take begins in {copy / 'take-002'}, because {copy} has"
    )
    assert said in folder.said and folder.said.count(" there, ") == 1
    assert ("lossy change" in folder.said) == (name in ("lossy", "step cache", "kind", "until", "sparse attention"))
    after = state(copy)
    assert {path: found for path, found in after.items() if path in before and path != str(copy)} == {
        path: found for path, found in before.items() if path != str(copy)
    }
    for wanted, take in ((request(), ""), (other, "take-002/")):
        again = list(long_video(unwanted, wanted, segment_folder(copy)))
        assert all(segment.reused and segment.place.startswith(f"{take}segment") for segment in again)


LATER = {
    "overlap": {"overlap": 1},
    "hand-off": {"hand_off": "latents"},
    "schedule of clips": {"schedule": "enhance_hf"},
    "kv cache": {"first": replace(FIRST, kv_cache="official")},
}


@pytest.mark.parametrize("name", LATER)
def test_what_matters_after_the_first_segment_makes_versions_in_the_same_take(tiny, copy, made, name):
    finished = run(tiny, copy, PROMPTS[:3], **LATER[name])
    assert [segment.place for segment in finished] == ["segment-001", "segment-002-v2", "segment-003-v2"]
    assert made == [1, 2] and all(segment.reused for segment in run(unwanted, copy))


SAME = {
    "kv cache": {"first": replace(FIRST, kv_cache="off")},
    "stored for readers": {"model": {"device": "cuda", "compile": "blocks"}},
    "stored by earlier versions": {
        "model": {"dtype": "float32", "fp8": False, "attention": "sdpa", "optimizations": "defaults", "wrappers": []}
    },
}


@pytest.mark.parametrize("name", SAME)
def test_what_does_not_change_the_result_is_not_compared(copy, name):
    folder = segment_folder(copy)
    finished = list(long_video(unwanted, request(**SAME[name]), folder))
    assert len(finished) == 4 and folder.said == ""


def test_going_on_with_lossy_settings(tiny, copy, made):
    lossy = request((*PROMPTS, "e"), lossy={"attention": "sage"})
    folder = segment_folder(copy, lossy_change="go on")
    finished = list(long_video(lambda: tiny, lossy, folder))
    assert made == [4] and [segment.place for segment in finished] == [f"segment-{n + 1:03}" for n in range(5)]
    assert folder.said == f"the take in {copy} goes on with other lossy settings (attention none there, sage now)"
    with pytest.raises(LongCatError, match="the lossy change is 'ask'; choose one of new take, go on"):
        segment_folder(copy, lossy_change="ask")


def test_the_frame_rate_of_the_file_is_not_a_setting(copy):
    finished = list(long_video(unwanted, request(first=replace(FIRST, fps=24)), segment_folder(copy)))
    assert len(finished) == 4


# --- hand-off --------------------------------------------------------------------------------------------------------


@pytest.fixture
def given(monkeypatch) -> list[Tensor | None]:
    """Given latents of every segment that is generated."""
    latents, sample = [], pipelines.sample

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        latents.append(kwargs["cond_latents"])
        return sample(*args, **kwargs)

    monkeypatch.setattr(pipelines, "sample", spy)
    return latents


def encoded(engine: Pipeline, frames: np.ndarray) -> Tensor:
    return engine.encode(to_pixels(torch.from_numpy(frames.copy())))


@pytest.mark.parametrize("hand_off", ["frames", "latents"])
@pytest.mark.parametrize("resumed", [False, True])
def test_what_is_handed_on(tiny, tmp_path, given, resumed, hand_off):
    folder = segment_folder(tmp_path / "v")
    arguments = (folder.path, PROMPTS[:3], replace(FIRST, frames=13))
    run(tiny, *arguments, overlap=9, hand_off=hand_off)
    if resumed:
        shutil.rmtree(folder.path / "segment-003")
        run(tiny, *arguments, overlap=9, hand_off=hand_off)
    assert given[0] is None and len(given) == 3 + resumed
    for number, latents in zip((1, 2, 2), given[1:], strict=False):
        before = folder.take.load(number - 1)
        again = encoded(tiny, before.frames[-9:])
        if hand_off == "frames":
            assert torch.equal(latents, again), number
        else:
            assert latents.shape[2] == 3 and torch.equal(latents[:, :, 1:], before.latents[:, :, -2:]), number
            assert torch.equal(latents[:, :, :1], encoded(tiny, before.frames[-9:-8])), number
            assert not torch.equal(latents[:, :, 1:], again[:, :, 1:])


def test_a_single_frame_is_handed_on_the_same_way_by_both(tiny, tmp_path, given):
    for hand_off in ("frames", "latents"):
        run(tiny, tmp_path / hand_off, PROMPTS[:2], overlap=1, hand_off=hand_off)
    assert given[1].shape[2] == 1 and torch.equal(given[1], given[3])
    assert len(segment_folder(tmp_path / "frames").frames(1, skip=1)) == 8


# --- begun with an image or a clip -----------------------------------------------------------------------------------


def pictures(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 16, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize("count", [1, 5])
def test_begun_with_an_image_or_a_clip(tiny, tmp_path, given, made, count):
    begin = replace(FIRST, given=pictures(count, 0), num_cond_frames=5)
    folder = segment_folder(tmp_path / "v")
    run(tiny, folder.path, PROMPTS[:2], begin)
    assert torch.equal(given[0], encoded(tiny, begin.given))
    assert torch.equal(given[1], encoded(tiny, folder.frames(0)[-5:]))
    others = (replace(begin, given=pictures(count, 1)), replace(begin, given=None))
    for take, other in enumerate(others, 2):
        assert [segment.place for segment in run(tiny, folder.path, PROMPTS[:1], other)] == [
            f"take-00{take}/segment-001"
        ]
    made.clear()
    assert all(segment.reused for segment in run(tiny, folder.path, PROMPTS[:2], begin)) and made == []


def test_of_a_clip_only_its_end_counts(tiny, tmp_path, made):
    clip = pictures(9, 0)
    begin = replace(FIRST, given=clip, num_cond_frames=5)
    run(tiny, tmp_path / "v", PROMPTS[:2], begin)
    made.clear()
    run(tiny, tmp_path / "v", PROMPTS[:2], replace(begin, given=np.concatenate([pictures(4, 1), clip[-5:]])))
    assert made == []


# --- stopped ---------------------------------------------------------------------------------------------------------


def test_a_full_disk_stops_the_run_and_room_lets_it_go_on(tiny, whole, tmp_path, made, monkeypatch):
    path, usage = tmp_path / "v", shutil.disk_usage(tmp_path)
    needed = segments.SPARE_BYTES + 4 * 9 * 16 * 32

    def free(_: Path) -> Any:
        # Others take it up meanwhile.
        return usage._replace(free=4 * needed if len(list(path.glob("segment-*"))) < 2 else needed - 1)

    with monkeypatch.context() as patch:
        patch.setattr(segments.shutil, "disk_usage", free)
        with pytest.raises(LongCatError, match=r"segment 3 may take .*, so free some space and run the same"):
            run(tiny, path)
    assert made == [0, 1], "nothing is computed that cannot be kept"
    run(tiny, path)
    assert made == [0, 1, 2, 3] and contents(path) == contents(whole)


def test_a_disk_that_is_too_small_for_the_rest_is_named_before_the_work(copy, monkeypatch):
    usage = shutil.disk_usage(copy)._replace(free=segments.SPARE_BYTES + 4 * 9 * 16 * 32 - 1)
    monkeypatch.setattr(segments.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(LongCatError, match=r"the 2 segments that are missing take about 0\.0 MB and 16\.8 MB"):
        next(long_video(unwanted, request((*PROMPTS, "e", "f")), segment_folder(copy)))
    assert len(list(long_video(unwanted, request(), segment_folder(copy)))) == 4


@pytest.mark.parametrize("moment", ["while a segment is made", "after it was made"])
def test_a_folder_that_is_deleted_meanwhile(tiny, tmp_path, moment):
    def delete(number: int, *_: Any) -> None:
        if number == 1:
            shutil.rmtree(path)

    path, folder = tmp_path / "v", segment_folder(tmp_path / "v")
    said = rf"{path} was deleted or renamed while this run was writing to it; run the same command again"
    with pytest.raises(LongCatError, match=said):
        for segment in long_video(lambda: tiny, request(), folder, delete if moment.startswith("while") else None):
            if segment.number == 1:
                shutil.rmtree(path)
    assert not path.exists()
    with pytest.raises(LongCatError, match=r"segment-001/frames\.mkv was deleted after this run had used it"):
        folder.frames(0)
    assert len(run(tiny, path)) == 4


def test_a_run_that_another_would_disturb(tiny, copy, made):
    shutil.rmtree(copy / "segment-004")
    running = long_video(lambda: tiny, request(), segment_folder(copy))
    next(running)
    with pytest.raises(LongCatError, match="another run is writing"):
        run(tiny, copy)
    # Another take of the same folder is free.
    assert run(tiny, copy, ("x",))[0].place == "take-002/segment-001"
    made.clear()
    with pytest.raises(Interrupted):
        running.throw(Interrupted())
    run(tiny, copy)
    assert made == [3]


# --- bad input -------------------------------------------------------------------------------------------------------

BAD = {
    "no prompt": ({"prompts": ()}, "0 segments are out of range; ask for 1 to 999"),
    "too many": ({"prompts": ("a",) * 1000}, "1000 segments are out of range; ask for 1 to 999"),
    "hand-off": ({"hand_off": "mail"}, "the hand-off is 'mail'; choose one of frames, latents"),
    "prompt not UTF-8": ({"prompts": ("a", "\udc80")}, "prompt of segment 2 is not valid UTF-8"),
    "prompt no text": ({"prompts": ("a", 3)}, "prompt of segment 2 is a int; give text"),
    "first prompt empty": ({"prompts": (" ", "b")}, "the prompt is empty"),
    "later prompt empty": ({"prompts": ("a", "&nbsp;")}, "the prompt is empty"),
    "overlap not 4k+1": ({"overlap": 12}, "12 frames are not of the form 4k+1; the nearest are 9 and 13"),
    "overlap negative": ({"overlap": -3}, "-3 frames are not of the form 4k+1"),
    "overlap all": ({"overlap": 9}, "segments of 9 frames that share 9 leave nothing new; ask for at least 13"),
    "schedule": ({"schedule": "refine"}, "unknown schedule 'refine'"),
    "steps of clips": ({"first": replace(FIRST, steps=60), "schedule": "distilled"}, "60 steps are out of range"),
    "first": ({"first": replace(FIRST, height=17)}, "height 17 is not a multiple of 16"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests(name):
    changes, said = BAD[name]
    with pytest.raises(LongCatError, match=re.escape(said)):
        LongVideoRequest(**{"first": FIRST, "prompts": ("a", "b"), "overlap": 5} | changes).filled(NANO)


def test_prompts_are_spread():
    assert spread_prompts(["a", "b"], None) == ("a", "b")
    assert spread_prompts(["a", "b"], 4) == ("a", "b", "b", "b")
    assert spread_prompts(["a"], MAX_SEGMENTS) == ("a",) * 999
    for prompts, count, said in (
        ([], 3, "the prompt is empty"),
        (["a"], 0, "0 segments are out of range; ask for 1 to 999"),
        (["a"] * 1000, None, "1000 segments"),
        (["a", "b"], 1, "2 prompts are more than the 1 segments; give at most one for each"),
    ):
        with pytest.raises(LongCatError, match=said):
            spread_prompts(prompts, count)


# --- joins -----------------------------------------------------------------------------------------------------------


def plain(*colors: tuple[int, int, int]) -> np.ndarray:
    return np.stack([np.broadcast_to(np.array(color, np.uint8), (4, 6, 3)) for color in colors])


def test_a_join_is_measured_from_the_last_old_to_the_first_new_frame():
    before = plain((100, 50, 10), (100, 50, 10), (102, 50, 10))
    # The two frames in common are not looked at by the join: only the third is new.
    after = plain((0, 0, 0), (0, 0, 4), (112, 45, 12), (112, 45, 12))
    join = measure_join(before, after, 2)
    assert join.color == (10.0, -5.0, 2.0) and join.step == 10.0
    assert join.brightness == pytest.approx(0.2126 * 10 - 0.7152 * 5 + 0.0722 * 2, abs=1e-4)
    assert join.usual == pytest.approx((0 + 2 + 4 + 112 + 0) / 5, abs=1e-4)


def test_the_mean_over_the_picture_counts():
    before, after = plain((100, 100, 100)), plain((100, 100, 100), (100, 100, 100))
    after[1, :2] = 60
    join = measure_join(before, after, 1)
    assert join.color == (-20.0,) * 3 and join.step == 20.0 and join.brightness == pytest.approx(-20)
    assert measure_join(before, before[[0, 0]], 1) == Join((0.0, 0.0, 0.0), 0.0, 0.0)


def test_equal_parts_of_one_video_have_a_usual_join():
    rising = plain(*[(10 + 3 * i, 20, 30 + i) for i in range(14)])
    join = measure_join(rising[:9], rising[4:], 5)
    assert join.color == (3.0, 0.0, 1.0) and join.usual == 3.0


def test_joins_are_reported(copy):
    finished = list(long_video(unwanted, request(), segment_folder(copy)))
    assert finished[0].summary("here") == "segment 1 of 4: already in here"
    fresh = replace(finished[1], reused=False, join=Join((1.25, -7.5, 0.0), -2.345, 0.5))
    assert fresh.summary("here") == (
        "segment 2 of 4: finished and saved in here; at its join the mean color changes by 7.50 of 255 and the "
        "brightness by -2.35; between neighboring frames the color changes by 0.50"
    )
