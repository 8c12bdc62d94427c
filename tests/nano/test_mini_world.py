"""LongCat-mini's world: its pictures show what its captions say."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from longcat_core.errors import LongCatError
from longcat_core.nano.mini.drawing import RADIUS, TORUS, place, render, tracks
from longcat_core.nano.mini.scenes import (
    BACKGROUNDS,
    CHOICES,
    COLORS,
    DARK,
    QUESTIONS,
    Actor,
    Scene,
    caption,
    labeled,
    sample_scene,
)
from longcat_core.nano.reading import NO_ANSWER, labels

RED = Actor("plain", "red", "circle", "still")
BLUE = Actor("plain", "blue", "square", "still")


def scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = random.Random(seed)
    return [sample_scene(rng) for _ in range(count)]


def same_place(placements, **changes):
    """All shapes of a placement in the middle of the picture."""
    return replace(placements, place=torch.full_like(placements.place, 0.5), **changes)


def test_the_same_seed_draws_the_same_pictures_at_any_batch():
    several = scenes(3)
    video = render(place(several, 5), 3, 48, 80)
    assert video.shape == (3, 3, 48, 80, 3) and video.dtype == torch.float32
    assert video.min() >= 0 and video.max() <= 1
    assert torch.equal(video, render(place(several, 5), 3, 48, 80))
    assert not torch.equal(video, render(place(several, 6), 3, 48, 80))
    assert torch.equal(video[1:2], render(place(several, 5)[slice(1, 2)], 3, 48, 80))


def test_frames_do_not_depend_on_where_a_clip_begins():
    placements = place(scenes(4), 1)
    whole = render(placements, 6, 48, 80)
    assert torch.allclose(whole[:, 4:], render(placements, 2, 48, 80, start_frame=4), atol=1e-5)


def test_the_shape_named_first_hides_the_others():
    for actors in ((RED, BLUE), (BLUE, RED)):
        placements = same_place(place([Scene("black", "checked", "still", actors)], 0))
        middle = render(placements, 1, 96, 160)[0, 0, 48, 80]
        assert torch.allclose(middle, torch.tensor(COLORS[actors[0].color]) / 255, atol=1e-3)


@pytest.mark.parametrize("texture", CHOICES["texture"])
def test_textures_show_two_tones_of_one_hue(texture):
    scene = Scene("white", "cloudy", "still", (replace(RED, texture=texture, shape="square"),))
    placements = same_place(place([scene], 0))
    half = int(3 * placements.radius[0, 0] * 0.6)
    patch = render(placements, 1, 192, 320)[0, 0, 96 - half : 96 + half, 160 - half : 160 + half].flatten(0, 1)
    bright = torch.tensor(COLORS["red"]) / 255
    found = [bool(((patch - tone).abs().amax(-1) < 0.02).any()) for tone in (bright, bright * DARK)]
    assert found == [True, texture != "plain"]
    assert ((patch - bright * (patch[:, :1] / bright[0])).abs() < 0.01).all()


@pytest.mark.parametrize("camera", CHOICES["camera"])
def test_a_still_shape_moves_with_the_ground(camera):
    """What stands still keeps its place on the ground, so that in the picture it moves against the camera."""
    placements = place([Scene("gray", "cloudy", camera, (RED,))], 3)
    found = tracks(placements, 30, (106.67, 64.0), 15, 0)
    on_ground = found.center[0, 0] + found.camera[0]
    steps = on_ground.diff(dim=0)
    period = TORUS * torch.tensor([106.67, 64.0], dtype=torch.float64)
    assert ((steps + period / 2) % period - period / 2).abs().max() < 1e-9
    moved = found.camera[0, -1] - found.camera[0, 0]
    ways = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
    if camera in ways:
        assert torch.equal(moved.sign().long(), torch.tensor(ways[camera]))
    else:
        assert moved[1] == 0 and (camera == "sway") == bool(found.camera[0, :, 0].std() > 1)


def test_a_shape_that_leaves_comes_back_as_it_was():
    scene = Scene("gray", "checked", "still", (replace(RED, motion="left", texture="spotted"),))
    placements = place([scene], 2)
    seconds = TORUS * (320 / 3) / placements.velocity[0, 0, 0].abs().item()
    first = render(placements, 1, 192, 320)[0, 0]
    again = render(replace(placements, seen=placements.seen + seconds), 1, 192, 320)[0, 0]
    assert torch.allclose(first, again, atol=1e-3)
    x = tracks(placements, int(seconds * 15), (320 / 3, 64.0), 15, 0).center[0, 0, :, 0]
    gone = (x < -RADIUS[1]) | (x > 320 / 3 + RADIUS[1])
    assert gone.any() and not gone.all()


def test_sizes_and_rates_show_the_same_world():
    placements = place(scenes(2, 4), 9)
    large, small = render(placements, 1, 96, 160), render(placements, 1, 48, 80)
    pooled = large.movedim(-1, 2).flatten(0, 1)
    pooled = torch.nn.functional.avg_pool2d(pooled, 2).unflatten(0, (2, 1)).movedim(2, -1)
    assert (pooled - small).abs().mean() < 0.03
    twice = render(placements, 3, 48, 80, fps=30)
    assert torch.allclose(twice[:, 2], render(placements, 2, 48, 80, fps=15)[:, 1], atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_captions_name_everything_and_their_spans_the_shapes(seed):
    rng = random.Random(seed)
    scene = sample_scene(rng)
    for said in (labeled(scene), *(labeled(scene, rng) for _ in range(5))):
        assert scene.background in said.text and len(said.parts) == len(scene.actors)
        for ((begin, end), answers), actor in zip(said.parts, scene.actors, strict=True):
            assert said.text[begin:end].startswith("a ") and f" {actor.color} " in said.text[begin:end]
            assert answers == vars(actor)
    assert caption(scene) == labeled(scene).text == caption(scene)


def test_each_token_answers_for_its_own_shape():
    class Words:
        def encode(self, text, out_type=None):
            return ["\u2581" + word for word in text.split(" ")]

    said = labeled(Scene("gray", "spotted", "left", (RED, BLUE)))
    rows = labels(Words(), said.text, said.whole, said.parts, QUESTIONS, 40)
    words, color = said.text.split(" "), list(QUESTIONS).index("color")
    answers = {word: rows[i][color] for i, word in enumerate(words)}
    assert answers["circle"] == list(COLORS).index("red") and answers["square"] == list(COLORS).index("blue")
    assert answers["background,"] == NO_ANSWER
    assert rows[0][0] == list(BACKGROUNDS).index("gray")


def test_scenes_that_cannot_be_read_are_refused():
    with pytest.raises(LongCatError, match="different colors, got red, red"):
        Scene("gray", "checked", "still", (RED, RED))
    with pytest.raises(LongCatError, match="1 to 3 shapes, not 0"):
        Scene("gray", "checked", "still", ())
    with pytest.raises(LongCatError, match="the camera of a scene is 'zoom'"):
        Scene("gray", "checked", "zoom", (RED,))
    with pytest.raises(LongCatError, match="cannot draw 0 frames"):
        render(place([Scene("gray", "checked", "still", (RED,))], 0), 0, 48, 80)
