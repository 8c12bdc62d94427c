"""The training of the nano avatar: its steps lower the loss, and what it writes can be loaded."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from longcat_core.checkpoints.load import load_transformer, open_checkpoint
from longcat_core.generate.paths import NANO_MODEL, NANO_VAE
from longcat_core.nano.avatar import recipe
from longcat_core.nano.avatar.recipe import BLOCKS, CONFIG, MODEL_FILE, TAIL, VAE_FILE, Lesson, Recipe, Teacher

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nano's VAE."""
    folder = tmp_path_factory.mktemp("avatar")
    recipe.write_folder(folder)
    shutil.copyfile(NANO_VAE, folder / VAE_FILE)
    return folder


@pytest.fixture(scope="module")
def teacher(folder) -> Teacher:
    return Teacher(folder, Recipe(voices=2, clips=2, batch=2, pairs=1), 0, CPU)


@pytest.mark.parametrize("lesson", [Lesson("solo", 0, 1), Lesson("pair", 1, 1), Lesson("duo", TAIL, 1)], ids=str)
def test_a_step_lowers_the_loss(teacher, lesson):
    rows = torch.arange(1 if lesson.kind == "duo" else 2)

    def loss() -> float:
        torch.manual_seed(5)
        with torch.no_grad():
            return float(teacher.losses(lesson, rows).mean())

    before = loss()
    assert loss() == before
    torch.manual_seed(5)
    teacher.rate.fill_(2e-4)
    teacher.optimizer.zero_grad()
    teacher._step(lesson, rows)
    assert loss() < before


def test_the_avatar_begins_as_nano(teacher):
    known, fresh = load_transformer(NANO_MODEL), recipe.new_model(CPU)
    for own, nanos in enumerate(BLOCKS):
        assert torch.equal(fresh.blocks[own].attn.qkv.weight, known.blocks[nanos].attn.qkv.weight)
    # Before training nothing is heard.
    assert not any(block.audio_modulation.weight.any() for block in fresh.blocks)


def test_what_is_saved_can_be_loaded_and_trained_on(folder, teacher):
    teacher.step(Lesson("solo", 1, 1), 1e-4)
    teacher.save(folder, 7)
    assert open_checkpoint(folder / MODEL_FILE).config == CONFIG
    weights = [parameter.clone() for parameter in teacher.parameters]
    teacher.step(Lesson("solo", 1, 1), 1e-3)
    assert teacher.load(folder) == 7
    assert all(torch.equal(a, b) for a, b in zip(weights, teacher.parameters, strict=True))


def test_each_token_of_a_pair_belongs_to_one(teacher):
    classes = teacher.data["duo"].classes
    assert classes.shape == (2, 24, 3) and (classes.sum(2) == 1).all() and classes.any(1).all()
