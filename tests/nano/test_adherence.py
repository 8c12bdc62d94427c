"""`longcat score-nano`: prompts of the model's own world, several settings of one loaded model, numbers in a file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from longcat_core.cli.main import main
from longcat_core.errors import LongCatError
from longcat_core.generate.paths import ModelPaths, World
from longcat_core.generate.request import NANO, GenerateRequest
from longcat_core.measure.calibrate import PROMPTS, default_prompts
from longcat_core.measure.results import read
from longcat_core.nano import adherence
from longcat_core.nano.adherence import MINI_JUDGE, NANO_JUDGE, batch_of, judge_of, measure
from longcat_core.nano.mini.scenes import CAMERA_WORDS
from longcat_core.nano.world import match_caption, render_clip

ATTRIBUTES = ("background", "ground", "camera", "texture", "color", "shape", "motion")


@pytest.fixture
def folder(trained, tmp_path) -> Callable[[str | None], Path]:
    """The tiny model's folder with a world of another name, or none."""

    def make(world: str | None) -> Path:
        copy = tmp_path / "model"
        copy.mkdir()
        for part in ("dit", "vae", "text_encoder"):
            (copy / part).symlink_to(trained[0] / part, target_is_directory=True)
        if world is not None:
            known = json.loads((trained[0] / "world.json").read_text())
            (copy / "world.json").write_text(json.dumps(known | {"world": world}))
        return copy

    return make


# --- the command ------------------------------------------------------------------------------------------------------


def test_mini_is_scored_by_its_own_world_with_several_settings(trained, tmp_path, capsys):
    file = tmp_path / "scores.json"
    options = ["--model", str(trained[0]), "--prompts", "3", "--steps", "2", "--device", "cpu", "-o", str(file)]
    versus = ["--versus", "--steps 2", "--versus", "--dtype bfloat16", "--versus", "--guidance-until 0.5 --steps 3"]
    assert main(["score-nano", *options, *versus]) == 0
    content = read(file)
    assert content["kind"] == "adherence"
    inputs = content["inputs"]
    assert (inputs["world"], inputs["size"], inputs["frames"], inputs["batch"]) == ("mini", "32x48", 9, 16)
    rows = {row["setting"]: row for row in content["rows"]}
    assert [rows[name]["options"] for name in "ABCD"] == ["", *versus[1::2]]
    scenes = [scene for _, scene in MINI_JUDGE.prompts(3)]
    actors = sum(len(scene.actors) for scene in scenes)
    for row in rows.values():
        assert tuple(row["total"]) == ATTRIBUTES and set(row["total"].values()) == {3, actors}
        assert all(0 <= row["right"][kind] <= row["total"][kind] for kind in ATTRIBUTES)
        assert row["adherence"] == sum(row["right"].values()) / sum(row["total"].values())
    assert rows["A"]["psnr_db"] is None and rows["A"]["each_psnr_db"] == []
    # The same setting gives the same videos, whose PSNR is infinite; JSON has no number for that.
    assert rows["B"]["each_psnr_db"] == [None] * 3 and rows["B"]["right"] == rows["A"]["right"]
    assert len(rows["C"]["each_psnr_db"]) == 3 and 20 < rows["C"]["psnr_db"] < 80
    assert [rows[name]["computed"] for name in "AD"] == [2, 2.5]
    out = capsys.readouterr().out
    assert "A: 3 fresh prompts, 2 steps of which 2.0 are computed, guidance 4" in out
    table = out[out.rindex("\nsetting") :].splitlines()[1:]
    assert table[0].split()[1:] == [*ATTRIBUTES, "all", "control", "PSNR", "steps", "seconds"]
    assert [row[:2] for row in table[2:]] == ["A ", "B:", "C:", "D:"] and "the same" in table[3]


def test_a_world_without_a_scorer_is_refused(folder, capsys):
    assert main(["score-nano", "--model", str(folder("moon"))]) == 2
    assert "knows the world 'moon', which has no scorer; known are nano, mini" in capsys.readouterr().err


def test_a_model_without_a_world_is_refused(folder, capsys):
    assert main(["score-nano", "--model", str(folder(None))]) == 2
    assert "knows no procedural world, so its videos cannot be scored" in capsys.readouterr().err


def test_the_lesson_is_nanos(trained, capsys):
    assert main(["score-nano", "--lesson", "--model", str(trained[0])]) == 2
    assert "--lesson has prompts for the bundled model" in capsys.readouterr().err


# --- worlds -----------------------------------------------------------------------------------------------------------


def test_a_folder_says_which_world_its_model_knows(trained, folder):
    assert ModelPaths.of(trained[0]).world == World("mini", 32, 48, 9)
    assert ModelPaths.of().world == World("nano", 64, 96, 33)
    assert ModelPaths.of(folder(None)).world is None
    assert judge_of("mini") is MINI_JUDGE and judge_of("nano") is NANO_JUDGE


def test_default_prompts_are_of_the_world_that_a_model_knows():
    nano, mini = (default_prompts(World(name, 64, 96, 33), 3) for name in ("nano", "mini"))
    assert all(match_caption(text) for text in nano)
    views = [word for row in CAMERA_WORDS.values() for word in row]
    assert all(any(view in text for view in views) for text in mini)
    assert mini != default_prompts(World("mini", 64, 96, 33), 4)
    assert default_prompts(None) == list(PROMPTS) == default_prompts(World("moon", 64, 96, 33))


# --- measuring --------------------------------------------------------------------------------------------------------


def test_a_step_cache_takes_videos_one_at_a_time_in_every_setting_of_a_run():
    plain = GenerateRequest("x").filled(NANO)
    cached = GenerateRequest("x", step_cache=0.05).filled(NANO)
    assert batch_of([plain]) == 16 and batch_of([plain, cached]) == 1


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_videos_meet_their_own_prompts_however_many_threads_look(monkeypatch, device):
    """The pipeline draws what the prompts say, and the first videos take longest to look at."""
    scenes = dict(NANO_JUDGE.prompts(7))

    def drawn(pipeline, prompts, seeds, request, stepped):
        for _ in range(request.steps):
            stepped(SimpleNamespace(computed=0.5))
        clips = [
            render_clip(scenes[p], frames=33, height=64, width=96, seed=s) for p, s in zip(prompts, seeds, strict=True)
        ]
        return np.stack(clips)

    def each(number: int, video: np.ndarray) -> None:
        time.sleep(0.05 * (number < 2))
        looked.append((number, len(video)))

    looked: list[tuple[int, int]] = []
    monkeypatch.setattr(adherence, "generate_batch", drawn)
    monkeypatch.setattr(adherence.os, "cpu_count", lambda: 6)
    pipeline = SimpleNamespace(model=SimpleNamespace(device=torch.device(device)))
    threads = torch.get_num_threads()
    found = measure(pipeline, 7, GenerateRequest("x", steps=5).filled(NANO), batch=3, each=each)
    assert torch.get_num_threads() == threads
    assert sorted(looked) == [(number, 33) for number in range(7)]
    assert found.fraction >= 0.95 and found.control < 0.5 and found.computed == 2.5


def test_what_fails_while_a_video_is_looked_at_is_an_error(monkeypatch):
    def broken(video: np.ndarray) -> None:
        raise LongCatError("unreadable")

    monkeypatch.setattr(adherence, "generate_batch", lambda p, texts, *_: np.zeros((len(texts), 1, 8, 8, 3), np.uint8))
    pipeline = SimpleNamespace(model=SimpleNamespace(device=torch.device("cpu")))
    judge = adherence.Judge(NANO_JUDGE.prompts, broken, NANO_JUDGE.compare, NANO_JUDGE.attributes)
    with pytest.raises(LongCatError, match="unreadable"):
        measure(pipeline, 2, GenerateRequest("x").filled(NANO), judge)
