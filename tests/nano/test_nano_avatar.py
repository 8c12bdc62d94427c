"""The committed weights of the nano avatar: size, form, and that its mouths follow what is said."""

from __future__ import annotations

import random

import pytest
import torch

from longcat_core.checkpoints.load import open_checkpoint
from longcat_core.files.safetensors_io import read_header
from longcat_core.generate.audio import AudioEncoder
from longcat_core.generate.audio.speech import leveled
from longcat_core.generate.engine import Engine
from longcat_core.nano.avatar.measure import BUNDLED, Spoken, load_avatar, pair_is_right, request_of, speak
from longcat_core.nano.avatar.recipe import CONFIG
from longcat_core.nano.avatar.scorer import correlation, look
from longcat_core.nano.avatar.sounds import FPS, opening, voice
from longcat_core.nano.avatar.world import sample_scene

STEPS = 16


@pytest.fixture(scope="module")
def avatar() -> tuple[Engine, AudioEncoder]:
    return load_avatar(None, torch.device("cpu"))


def spoken(avatar: tuple[Engine, AudioEncoder], faces: int, segments: int, image: bool) -> Spoken:
    scene = sample_scene(random.Random(faces), faces, faces)
    asked = request_of(scene, faces, segments, STEPS, image)
    return speak(*avatar, avatar[0].defaults, asked, scene, lambda step: None)


def test_assets_are_small_bf16_and_whole():
    own = [file for file in BUNDLED if "umt5" not in file.name]
    assert len(own) == 3 and sum(file.stat().st_size for file in own) <= 10_000_000
    for file in own:
        assert {dtype for dtype, _ in read_header(file).values()} == {torch.bfloat16}
    assert open_checkpoint(BUNDLED[0]).config == CONFIG


def test_mouth_follows_its_sound_and_the_face_is_kept(avatar):
    video = spoken(avatar, 1, 2, False)
    face = video.scene.faces[0]
    background, (seen,) = look(video.frames, 1)
    assert (background, seen.head, seen.color) == (video.scene.background, face.head, face.color)
    other = opening(leveled(torch.from_numpy(voice(0, len(video.frames) / FPS))), len(video.frames)).numpy()
    assert correlation(seen.opening, video.loudness[0]) >= 0.9 > 0.5 > correlation(seen.opening, other)


def test_each_of_two_mouths_follows_its_own_sound(avatar):
    video = spoken(avatar, 2, 1, True)
    assert pair_is_right(look(video.frames, 2)[1], video.loudness)
