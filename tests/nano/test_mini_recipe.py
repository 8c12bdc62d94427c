"""LongCat-mini's training on a tiny size: it stops at its time, resumes, and leaves a model that loads."""

from __future__ import annotations

import itertools
import json
import random
import shutil

import pytest
import torch

from longcat_core.cli.main import main
from longcat_core.errors import LongCatError
from longcat_core.generate.paths import ModelPaths
from longcat_core.generate.pipeline import Pipeline
from longcat_core.generate.request import GenerateRequest
from longcat_core.nano.mini import recipe as recipes
from longcat_core.nano.mini.clock import Clock, Paused
from longcat_core.nano.mini.recipe import LEARNING_RATE, RECIPES, WARM_UP, rate_at

CPU = torch.device("cpu")


def test_the_clock_counts_over_runs_and_pauses_a_run_in_time(tmp_path):
    time = itertools.count(0.0, 10.0)
    clock = Clock(tmp_path / "clock.json", 100, run=45, now=lambda: next(time))
    clock.tick("vae")
    assert clock.spent == 10 and clock.share == 0.1
    clock.finish("vae", "ready")
    assert clock.done == {"vae": "ready"} and clock.spent == 20
    with pytest.raises(Paused):
        clock.pause_if_due()
    again = Clock(tmp_path / "clock.json", 100)
    assert again.spent == 20 and again.done == {"vae": "ready"} and not again.used_up


def test_a_damaged_clock_is_refused(tmp_path):
    (tmp_path / "clock.json").write_text("{")
    with pytest.raises(LongCatError, match="remove the folder to begin again"):
        Clock(tmp_path / "clock.json", 100)


def test_the_rate_warms_up_and_falls_to_zero():
    assert rate_at(0.0, 0) == pytest.approx(LEARNING_RATE / WARM_UP)
    assert rate_at(0.4, 10 * WARM_UP) == LEARNING_RATE
    assert rate_at(0.7, 10 * WARM_UP) == pytest.approx(LEARNING_RATE / 2)
    assert rate_at(1.0, 10 * WARM_UP) == 0


def test_the_course_goes_from_tiny_pictures_to_full_ones():
    items = recipes.lessons(RECIPES["mini"])

    def drawn(share: float, prepared: tuple = ()) -> set[str]:
        rng = random.Random(0)
        return {recipes.draw_lesson(items, share, prepared, rng).bucket for _ in range(400)}

    assert drawn(0.0) == drawn(0.29) == {"tiny"}
    assert drawn(0.4) == {"tiny", "small"}
    assert drawn(0.6) == {"small", "full"}
    assert drawn(0.75) == drawn(1.0) == {"full"}
    conditions = {recipes.draw_lesson(items, 0.9, (), random.Random(i)).cond for i in range(60)}
    assert conditions == {0, 1, 4}
    # A step that is hardly drawn any more is not compiled for it, and goes on where it is there already.
    assert drawn(0.495) == {"small"} and drawn(0.495, items) == {"tiny", "small"}


def test_mini_is_what_it_is_for():
    """Head dim 128, about 60 M parameters, 3,840 tokens: 60 blocks of 64."""
    recipe = RECIPES["mini"]
    with torch.device("meta"):
        model = recipes.OptimizedTransformer(recipe.config)
    assert recipe.config.head_dim == 128
    assert 55e6 < sum(parameter.numel() for parameter in model.parameters()) < 65e6
    assert recipe.latents * (recipe.full.height // 16) * (recipe.full.width // 16) == 3840


def test_every_run_goes_on_where_the_last_one_stopped(trained):
    _, clocks = trained
    assert len(clocks) >= 4
    for before, after in itertools.pairwise(clocks):
        assert before["done"].items() <= after["done"].items()
        assert sum(after["seconds"].values()) > sum(before["seconds"].values())
    assert list(clocks[-1]["done"]) == ["text", "vae", "tiny", "small", "full", "transformer"]


def test_the_folder_is_a_model_that_generates(trained):
    folder, _ = trained
    paths = ModelPaths.of(folder)
    assert (paths.defaults.height, paths.defaults.width, paths.defaults.frames) == (32, 48, 9)
    assert not paths.defaults.bucketed
    pipeline = Pipeline.load(paths)
    assert pipeline.model.config == RECIPES["mini-tiny"].config
    result = pipeline.generate(GenerateRequest("a plain red circle moves left on a cloudy gray background", steps=2))
    assert result.frames.shape == (9, 32, 48, 3)


def test_text_and_vae_are_taken_from_a_finished_folder(trained, tmp_path, monkeypatch):
    folder, clocks = trained
    stages = []
    monkeypatch.setattr(recipes, "train_transformer", lambda *_: stages.append("transformer") or "done")
    for name in ("train_text", "train_vae"):
        monkeypatch.setattr(recipes, name, lambda *_: pytest.fail("a finished stage was trained again"))
    assert recipes.train_mini(tmp_path, size="mini-tiny", minutes=0.2, start_from=folder, device=CPU)
    for file in (recipes.TEXT_FILE, recipes.VAE_FILE):
        assert (tmp_path / file).read_bytes() == (folder / file).read_bytes()
    clock = json.loads((tmp_path / "state" / "clock.json").read_text())
    assert stages == ["transformer"] and clock["done"]["vae"] == f"taken from {folder}"
    for stage in ("text", "vae"):
        assert 0 <= clock["seconds"][stage] - clocks[-1]["seconds"][stage] < 2
    # The same command again changes nothing.
    assert recipes.train_mini(tmp_path, size="mini-tiny", minutes=0.2, start_from=folder, device=CPU)
    assert stages == ["transformer"]


@pytest.mark.parametrize(
    ("size", "break_it", "said"),
    [
        ("mini", lambda folder: None, "was trained with another --size"),
        ("mini-tiny", lambda folder: (folder / "vae" / "vae.safetensors").unlink(), "has no finished VAE"),
        ("mini-tiny", lambda folder: (folder / "world.json").unlink(), "holds no training of mini"),
        (
            "mini-tiny",
            lambda folder: (folder / "state" / "clock.json").write_text('{"seconds": {}, "done": {"text": ""}}'),
            "has no finished VAE",
        ),
    ],
)
def test_folders_to_start_from_are_checked(trained, tmp_path, size, break_it, said):
    other = tmp_path / "other"
    shutil.copytree(trained[0], other, ignore=shutil.ignore_patterns("*.safetensors"))
    for part in (recipes.TEXT_FILE, recipes.VAE_FILE):
        shutil.copyfile(trained[0] / part, other / part)
    break_it(other)
    with pytest.raises(LongCatError, match=said):
        recipes.train_mini(tmp_path / "new", size=size, start_from=other, device=CPU)


def test_mini_is_not_written_into_the_pack(capsys):
    assert main(["train-nano", "--size", "mini", "--device", "cpu"]) == 2
    assert "--size mini needs a folder of its own; give one with --output" in capsys.readouterr().err


def test_minutes_must_be_above_zero(tmp_path, capsys):
    arguments = ["--size", "mini", "--device", "cpu", "--output", str(tmp_path), "--minutes", "0"]
    assert main(["train-nano", *arguments]) == 2
    assert "--minutes 0 must be above 0" in capsys.readouterr().err
