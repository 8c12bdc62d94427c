"""The talking faces of the nano avatar: the same for a seed, and seen as they were drawn."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from longcat_core.errors import LongCatError
from longcat_core.generate.audio import load_audio_encoder
from longcat_core.generate.audio.speech import leveled
from longcat_core.nano.avatar.ear import EAR, save_ear
from longcat_core.nano.avatar.measure import SEGMENTS, Spoken, frames_of, judge, pair_is_right
from longcat_core.nano.avatar.scorer import Seen, correlation, look
from longcat_core.nano.avatar.sounds import opening, voice
from longcat_core.nano.avatar.world import Face, Scene, caption, place, render, sample_scene
from longcat_core.nano.world import to_bytes


def said(seeds: range, frames: int) -> Tensor:
    """Openings [N, frames] of these voices."""
    return torch.stack([opening(leveled(torch.from_numpy(voice(seed, frames / 25))), frames) for seed in seeds])


def shown(scene: Scene, seed: int, frames: int) -> Spoken:
    """The world's own video of a scene."""
    mouths = said(range(2 * seed, 2 * seed + 2), frames) * torch.tensor([[float(f.talks)] for f in scene.faces][:2])
    mouths = mouths[: len(scene.faces)]
    full = torch.cat((mouths, torch.zeros(2 - len(mouths), frames)))
    return Spoken(scene, to_bytes(render(place([scene], seed), full[None])[0]), tuple(mouths.numpy()))


def test_a_voice_and_a_place_belong_to_their_seed():
    assert np.array_equal(voice(3, 0.7), voice(3, 0.7)) and not np.array_equal(voice(3, 0.7), voice(4, 0.7))
    scene = sample_scene(random.Random(1), 2)
    first, same, other = place([scene], 5), place([scene], 5), place([scene], 6)
    assert torch.equal(first.center, same.center) and not torch.equal(first.center, other.center)


def test_mouths_open_while_there_is_a_sound():
    wave = torch.zeros(32000, dtype=torch.float64)
    wave[8000:16000] = 0.1 * torch.sin(torch.arange(8000) * 0.1)
    mouth = opening(wave, 60)
    assert len(mouth) == 60 and mouth[:9].max() == 0 and mouth[28:].max() == 0
    assert torch.allclose(mouth[15:23], torch.full((8,), 0.1 / 2**0.5 / 0.13), atol=0.02)


def test_captions_say_who_talks():
    scene = Scene("blue", (Face("circle", "orange"), Face("square", "green", False)))
    assert caption(scene) == "an orange circle face talks and a green square face listens on a blue background"
    with pytest.raises(LongCatError, match="different colors"):
        Scene("blue", (Face("circle", "blue"),))
    with pytest.raises(LongCatError, match="at least one talks"):
        Scene("blue", (Face("circle", "red", False),))


def test_the_scorer_sees_what_was_drawn():
    rng = random.Random(2)
    for number in range(12):
        spoken = shown(sample_scene(rng, 1 + number % 2, 1), number, 25)
        background, faces = look(spoken.frames, len(spoken.scene.faces))
        assert background == spoken.scene.background
        for face, drawn, loudness in zip(faces, spoken.scene.faces, spoken.loudness, strict=True):
            assert face is not None and (face.head, face.color) == (drawn.head, drawn.color)
            assert np.abs(face.opening - loudness).max() < 0.08


def test_the_world_itself_gets_full_marks_and_shuffled_sounds_none():
    rng = random.Random(3)
    alone = [shown(sample_scene(rng, 1), 10 + i, frames_of(SEGMENTS)) for i in range(4)]
    pairs = [shown(sample_scene(rng, 2, 2), 20 + i, 53) for i in range(3)]
    scores = judge(alone, pairs)
    assert min(scores.correlations) > 0.999 and abs(scores.shuffled) < 0.2
    assert (scores.kept, scores.named, scores.pairs) == ((16, 16), (4, 4), (3, 3))


def test_mouths_that_follow_the_other_voice_are_wrong():
    first, second = said(range(2), 50).numpy()
    seen = [Seen("circle", "red", mouth) for mouth in (first, second)]
    assert pair_is_right(seen, (first, second)) and not pair_is_right(seen, (second, first))
    assert not pair_is_right([seen[0], None], (first, second))
    # One mouth for both voices.
    assert not pair_is_right([seen[0], seen[0]], (first, second))
    assert correlation(first, np.zeros(50)) == 0


def test_the_scorer_reads_video_alone():
    with pytest.raises(LongCatError, match=r"reads uint8 video \[F, H, W, 3\]"):
        look(np.zeros((2, 4, 4, 3), np.float32), 1)


def test_loudness_can_be_read_from_the_ear(tmp_path):
    save_ear(tmp_path / "ear.safetensors")
    ear = load_audio_encoder(tmp_path / "ear.safetensors")
    assert (ear.version, ear.groups, ear.channels) == ("1.5", 5, EAR.width)
    waves = [leveled(torch.from_numpy(voice(seed, 6.0))) for seed in range(12)]
    heard = torch.stack([ear.embed(wave) for wave in waves]).flatten(2)
    around = torch.cat([heard.roll(shift, 1) for shift in (-1, 0, 1)], dim=2)[:, 2:-2].double()
    wanted = torch.stack([opening(wave, heard.shape[1]) for wave in waves])[:, 2:-2].double()
    ones = torch.ones(*around.shape[:2], 1, dtype=torch.float64)
    inputs = torch.cat((around, ones), dim=2)
    # A linear map, fitted to ten voices and tried on two others.
    squares = inputs[:10].flatten(0, 1).T @ inputs[:10].flatten(0, 1)
    fit = torch.linalg.solve(
        squares + 0.1 * torch.eye(len(squares), dtype=torch.float64),
        inputs[:10].flatten(0, 1).T @ wanted[:10].flatten(),
    )
    assert correlation((inputs[10:].flatten(0, 1) @ fit).numpy(), wanted[10:].flatten().numpy()) > 0.9
