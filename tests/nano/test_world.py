from __future__ import annotations

import random
import re

import numpy as np
import pytest
import torch

from longcat_core.errors import LongCatError
from longcat_core.nano import world
from longcat_core.nano.world import Actor, Scene

from ..support.captions import NAMES, parse_caption, words_of_the_world

RED_RIGHT = Scene("blue", (Actor("circle", "red", "right"),))


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = random.Random(0)
    return [world.sample_scene(rng) for _ in range(600)]


def color_mask(video: np.ndarray, name: str) -> np.ndarray:
    return np.abs(video.astype(int) - world.COLORS[name]).sum(-1) < 30


def test_the_world_is_large_enough_and_its_colors_are_far_apart():
    assert len(world.SHAPES) >= 3 and len(world.MOTIONS) >= 6
    palette = {**world.COLORS, **world.BACKGROUNDS}
    for name, rgb in palette.items():
        for other, other_rgb in palette.items():
            if name != other:
                assert np.linalg.norm(np.subtract(rgb, other_rgb)) > 85, (name, other)


def test_sampling_covers_everything_with_distinct_colors(scenes):
    actors = [actor for scene in scenes for actor in scene.actors]
    assert {scene.background for scene in scenes} == set(world.BACKGROUNDS)
    assert {actor.shape for actor in actors} == set(world.SHAPES)
    assert {actor.color for actor in actors} == set(world.COLORS)
    assert {actor.motion for actor in actors} == set(world.MOTIONS)
    assert 0.28 < np.mean([len(scene.actors) == 2 for scene in scenes]) < 0.42
    for scene in scenes:
        colors = [scene.background, *(actor.color for actor in scene.actors)]
        assert len(set(colors)) == len(colors)


def test_two_shapes_follows_its_argument():
    rng = random.Random(0)
    assert all(len(world.sample_scene(rng, two_shapes=0.0).actors) == 1 for _ in range(50))
    assert all(len(world.sample_scene(rng, two_shapes=1.0).actors) == 2 for _ in range(50))


@pytest.mark.parametrize(
    ("background", "actors", "named"),
    [
        ("mauve", (Actor("circle", "red", "left"),), "mauve"),
        ("blue", (Actor("hexagon", "red", "left"),), "hexagon"),
        ("blue", (Actor("circle", "beige", "left"),), "beige"),
        ("blue", (Actor("circle", "red", "sideways"),), "sideways"),
        ("blue", (Actor("circle", "blue", "left"),), "different colors"),
        ("blue", (Actor("circle", "red", "left"), Actor("square", "red", "left")), "different colors"),
        ("blue", (), "not 0"),
    ],
)
def test_an_impossible_scene_is_refused(background, actors, named):
    with pytest.raises(LongCatError, match=named):
        Scene(background, actors)


def test_canonical_captions():
    def says(motion: str, color: str = "red") -> str:
        return world.caption(Scene("blue", (Actor("circle", color, motion),)))

    assert says("right") == "a red circle moves right on a blue background"
    assert says("still") == "a red circle stays still on a blue background"
    assert says("circle") == "a red circle moves in a circle on a blue background"
    assert says("pulse", "orange") == "an orange circle pulses on a blue background"
    two = Scene("blue", (Actor("circle", "red", "right"), Actor("square", "green", "left")))
    assert world.caption(two) == "a red circle moves right and a green square moves left on a blue background"


def test_captions_round_trip(scenes):
    rng = random.Random(1)
    for scene in scenes:
        assert parse_caption(world.caption(scene)) == scene
        paraphrase = world.caption(scene, rng)
        assert parse_caption(paraphrase) == scene, paraphrase


@pytest.mark.parametrize(
    "text",
    [
        "A red ball is moving to the right, over a plain blue background.",
        "  red  disc drifts right on blue ",
        "blue background, the red circle slides right",
    ],
)
def test_paraphrases_are_understood(text):
    assert parse_caption(text) == RED_RIGHT


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a cat",
        "a red circle moves right",
        "a red circle on a blue background",
        "blue background, a red circle pulses on blue",
    ],
)
def test_an_unknown_caption_is_answered_with_the_vocabulary(text):
    with pytest.raises(LongCatError) as error:
        parse_caption(text)
    for word in ("a red circle moves right", "triangle", "yellow", "gray", "moves in a circle"):
        assert word in str(error.value)


def test_the_corpus_uses_every_word_and_varies():
    texts = world.corpus(2000, seed=3)
    assert texts == world.corpus(2000, seed=3) and texts != world.corpus(2000, seed=4)
    named = {word for names in NAMES for phrase in names for word in phrase.split()}
    joining = {"a", "an", "and", "one", "the", "while"}
    placing = {"against", "background", "front", "in", "of", "on", "over", "plain"}
    assert words_of_the_world() == named | joining | placing
    assert not re.search(r"\ba orange|  |\ban (?!orange)", " ".join(texts).lower())
    canonical = np.mean([text == world.caption(parse_caption(text)) for text in texts])
    assert 0.4 < canonical < 0.65


def test_rendering_has_the_promised_form_and_is_deterministic(scenes):
    video = world.render(world.place(scenes[:6], 7), 9, 64, 96)
    assert video.shape == (6, 9, 64, 96, 3) and video.dtype == torch.float32
    assert video.min() >= 0 and video.max() <= 1
    assert torch.equal(video, world.render(world.place(scenes[:6], 7), 9, 64, 96))
    assert torch.equal(video, world.render(world.place(scenes[:6], torch.Generator().manual_seed(7)), 9, 64, 96))
    assert not torch.equal(video, world.render(world.place(scenes[:6], 8), 9, 64, 96))


def test_a_batch_draws_what_its_rows_draw(scenes):
    placements = world.place(scenes[:5], 7)
    video = world.render(placements, 5, 64, 64)
    assert len(placements) == 5
    torch.testing.assert_close(world.render(placements[1:3], 5, 64, 64), video[1:3])


def test_a_later_start_continues_the_same_video(scenes):
    placements = world.place(scenes[:8], 2)
    whole = world.render(placements, 49, 64, 96)
    torch.testing.assert_close(world.render(placements, 16, 64, 96, start_frame=33), whole[:, 33:])


def test_the_double_frame_rate_shows_the_same_motion(scenes):
    placements = world.place(scenes[:8], 2)
    torch.testing.assert_close(
        world.render(placements, 17, 64, 96, fps=30)[:, ::2], world.render(placements, 9, 64, 96, fps=15)
    )


def test_another_size_shows_the_same_scene_larger():
    small, large = (world.render_clip(RED_RIGHT, frames=5, height=h, width=2 * h, seed=0) for h in (64, 128))
    pooled = large.reshape(5, 64, 2, 128, 2, 3).mean(axis=(2, 4))
    assert np.abs(pooled - small).mean() < 2


def test_the_shapes_differ_and_have_their_area():
    axis = torch.arange(-40.0, 41.0)
    masks = {name: world.shape_distance(name, axis[None], axis[:, None], 20.0) < 0 for name in world.SHAPES}
    for name, mask in masks.items():
        assert abs(mask.sum() / (world.SHAPE_AREA[name] * 20**2) - 1) < 0.05
        for other in world.SHAPES:
            if other != name:
                assert (mask & masks[other]).sum() / (mask | masks[other]).sum() < 0.9
    rows = masks["triangle"].sum(1)
    assert rows[40 - 20] < rows[40] < rows[40 + 12]  # the tip is above


def test_a_shape_wraps_around_and_keeps_its_area():
    video = world.render_clip(RED_RIGHT, frames=93, height=64, width=96, seed=0)
    mask = color_mask(video, "red")
    area = mask.sum(axis=(1, 2))
    assert area.max() - area.min() < 0.12 * area.mean()
    split = mask[:, :, 0].any(1) & mask[:, :, -1].any(1) & ~mask.any(1).all(1)
    assert split.any() and not split.all()


@pytest.mark.parametrize(("motion", "sign"), [("left", (-1, 0)), ("right", (1, 0)), ("up", (0, -1)), ("down", (0, 1))])
def test_straight_motion_has_direction_and_speed(motion, sign):
    placements = world.place([Scene("black", (Actor("square", "red", motion),))] * 20, 0)
    center, radius = world.trajectories(placements, 33, 64, 96)
    step = center[:, 0].diff(dim=1)
    speed = step.norm(dim=-1)
    low, high = world.SPEED
    assert (speed > low - 1e-6).all() and (speed < high + 1e-6).all()
    torch.testing.assert_close(step / speed[..., None], torch.tensor(sign, dtype=torch.float64).expand_as(step))
    assert (radius.diff(dim=-1) == 0).all()


def test_still_orbit_and_pulse():
    def paths(motion: str):
        return world.trajectories(world.place([Scene("black", (Actor("square", "red", motion),))] * 20, 0), 61, 64, 96)

    assert (paths("still")[0].diff(dim=2) == 0).all()
    center, radius = paths("pulse")
    assert (center.diff(dim=2) == 0).all()
    ratio = radius[:, 0].amax(-1) / radius[:, 0].amin(-1)
    assert (ratio > 1.7).all() and (ratio < 1.9).all()
    center = paths("circle")[0][:, 0]
    extent = (center.amax(1) - center.amin(1)) / 2
    low, high = world.ORBIT_RADIUS
    assert (extent > low - 0.5).all() and (extent < high + 0.5).all()
    before, after = center.diff(dim=1)[:, :-1], center.diff(dim=1)[:, 1:]
    assert (before[..., 0] * after[..., 1] - before[..., 1] * after[..., 0] > 0).all()  # clockwise, as y points down


def test_two_actors_start_apart_and_the_second_is_drawn_on_top():
    two = Scene("black", (Actor("circle", "red", "right"), Actor("circle", "white", "left")))
    placements = world.place([two] * 100, 0)
    center, _ = world.trajectories(placements, 1, 64, 96)
    offset = (center[:, 1, 0] - center[:, 0, 0]).abs()
    offset = torch.minimum(offset, torch.tensor([96.0, 64.0]) - offset)
    assert offset.norm(dim=-1).min() > 2 * world.RADIUS[1]
    placements.position[:, 1] = placements.position[:, 0]
    placements.radius[:, 0] = placements.radius[:, 1]
    assert not color_mask((world.render(placements[:3], 1, 64, 96) * 255).numpy(), "red").any()


@pytest.mark.parametrize(("frames", "height", "fps"), [(0, 64, 15), (5, 0, 15), (5, 64, 0)])
def test_nothing_to_draw_is_an_error(frames, height, fps):
    with pytest.raises(LongCatError, match="must be positive"):
        world.render(world.place([RED_RIGHT], 0), frames, height, 96, fps=fps)


def test_uint8_clip():
    clip = world.render_clip(RED_RIGHT, frames=5, height=48, width=80, seed=1)
    assert clip.shape == (5, 48, 80, 3) and clip.dtype == np.uint8
    background = np.abs(clip.astype(int) - world.BACKGROUNDS["blue"]).sum(-1) == 0
    assert background.mean() > 0.6 and color_mask(clip, "red").mean() > 0.02
