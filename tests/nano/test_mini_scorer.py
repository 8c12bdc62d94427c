"""The scorer of LongCat-mini's world reads back what was drawn, and nothing else."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from longcat_core.errors import LongCatError
from longcat_core.nano.mini import scorer, tracking
from longcat_core.nano.mini.drawing import FRAMES, Placements, place, render, tracks
from longcat_core.nano.mini.scenes import CHOICES, COLORS, DARK, Actor, Scene, sample_scene
from longcat_core.nano.mini.tracking import Fits
from longcat_core.nano.scorer import IRREGULAR
from longcat_core.nano.world import to_bytes

RED = Actor("plain", "red", "circle", "still")
GREEN = Actor("plain", "green", "square", "still")
PLAIN = Scene("gray", "checked", "still", (RED,))
# Width and height of the picture in pixels at a shorter side of 64.
PICTURE = (64 * 5 / 3, 64.0)
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def share(pairs: list[tuple[scorer.Observation, Scene]]) -> float:
    scores = [scorer.compare(seen, scene) for seen, scene in pairs]
    return sum(sum(score.values()) for score in scores) / sum(map(len, scores))


# --- whole videos -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn() -> tuple[list[Scene], Tensor]:
    """Twelve scenes in which every value of every attribute occurs, three seconds each, at a quarter of the pixels."""
    rng = random.Random(2)
    scenes = [sample_scene(rng) for _ in range(12)]
    for name, values in CHOICES.items():
        things = [thing for scene in scenes for thing in (scene, *scene.actors) if hasattr(thing, name)]
        assert {getattr(thing, name) for thing in things} == set(values), name
    return scenes, torch.cat([render(place([scene], i), 45, 96, 160) for i, scene in enumerate(scenes)])


@pytest.fixture(scope="module")
def seen(drawn) -> list[scorer.Observation]:
    return [scorer.analyze(to_bytes(video)) for video in drawn[1]]


def test_what_was_drawn_is_read_back(drawn, seen):
    assert share(list(zip(seen, drawn[0], strict=True))) >= 0.97


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_captions_of_other_videos_score_at_chance(drawn, seen, shift):
    assert 0.05 < share(list(zip(seen, drawn[0][shift:] + drawn[0][:shift], strict=True))) <= 0.35


def test_soft_and_noisy_videos_are_read_too(drawn):
    """A blur and noise that leave about 29 dB, as much as the VAE does."""
    scenes, videos = drawn[0][::2], drawn[1][::2]
    line = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    kernel = (line[:, None] * line).expand(3, 1, 5, 5)
    flat = torch.nn.functional.pad(videos.flatten(0, 1).movedim(-1, 1), (2, 2, 2, 2), "replicate")
    soft = torch.nn.functional.conv2d(flat, kernel, groups=3).movedim(1, -1).view_as(videos)
    soft += torch.randn(soft.shape, generator=torch.Generator().manual_seed(0)) * 6 / 255
    assert -10 * math.log10((soft - videos).square().mean()) < 30
    found = [scorer.analyze(to_bytes(video.clamp(0, 1))) for video in soft]
    assert share(list(zip(found, scenes, strict=True))) >= 0.95


# --- single rules -----------------------------------------------------------------------------------------------------


def middle(scene: Scene, seed: int = 0, at: float = 0.5, **changes: Tensor) -> Placements:
    """The front shape in the middle of the picture at time 0, the second one `at` its width."""
    placements = place([scene], seed)
    where = torch.full_like(placements.place, 0.5)
    where[:, 1:, 0] = at
    return replace(placements, place=where, seen=torch.zeros_like(placements.seen), **changes)


def look(placements: Placements, frames: int = 1) -> scorer.Observation:
    return scorer.analyze(to_bytes(render(placements, frames, 192, 320)[0]))


@pytest.mark.parametrize("background", CHOICES["background"])
@pytest.mark.parametrize("ground", CHOICES["ground"])
def test_the_ground_is_known_by_its_tones_and_its_lattice(background, ground):
    for seed in range(3):
        found = look(middle(Scene(background, ground, "still", (RED,)), seed))
        assert (found.background, found.ground) == (background, ground)


@pytest.mark.parametrize("cell", [6.5, 9.5])
@pytest.mark.parametrize("ground", ["checked", "spotted"])
def test_the_smallest_and_the_largest_lattice(ground, cell):
    placements = middle(Scene("slate", ground, "still", (RED,)), cell=torch.tensor([cell], dtype=torch.float64))
    assert look(placements).ground == ground


@pytest.mark.parametrize("shape", CHOICES["shape"])
@pytest.mark.parametrize("texture", CHOICES["texture"])
def test_shapes_and_textures_are_known_in_a_single_frame(shape, texture):
    colors = random.Random(f"{shape} {texture}").sample(list(COLORS), 2)
    for color, background in zip(colors, ("white", "black"), strict=True):
        actor = Actor(texture, color, shape, "still")
        (found,) = look(middle(Scene(background, "cloudy", "still", (actor,)))).actors
        assert (found.texture, found.color, found.shape) == (texture, color, shape)


@pytest.mark.parametrize("color", COLORS)
def test_both_tones_have_the_color_of_the_name(color):
    for tone in (1.0, DARK):
        rgb = torch.tensor(COLORS[color], dtype=torch.float32)[:, None, None] * tone
        assert scorer._color(float(tracking.hue_of(rgb))) == color


@pytest.mark.parametrize("shape", CHOICES["shape"])
def test_a_shape_that_is_partly_hidden_keeps_its_name_and_its_place(shape):
    """A third of its width is behind another one."""
    behind = replace(GREEN, shape=shape, texture="striped")
    placements = middle(Scene("white", "cloudy", "still", (RED, behind)), at=0.5 + 14 / PICTURE[0])
    placements = replace(placements, radius=torch.full_like(placements.radius, 10.0))
    pictures = tracking.reduce(torch.from_numpy(to_bytes(render(placements, 1, 192, 320)[0])))
    hues = tracking.shape_hues(pictures)
    masks = tracking.shape_masks(pictures, hues)
    index = [scorer._color(hue) for hue in hues].index("green")
    name, fits, _ = tracking.fit(tracking.halved(masks), index, pictures.scale / 2)
    assert name == shape
    # Small pictures begin a third of a unit further on.
    assert (fits.center[0] - torch.tensor([PICTURE[0] / 2 + 14, 32.0])).norm() < 1.0
    assert abs(fits.radius[0] - 10) < 1.2 and 0.5 < fits.visible[0] < 1.0


def test_a_shape_that_leaves_the_picture_keeps_its_center():
    placements = middle(Scene("white", "cloudy", "still", (replace(RED, motion="left"),)), seed=3)
    video = torch.from_numpy(to_bytes(render(placements, 61, 192, 320)[0]))
    pictures = tracking.reduce(video)
    masks = tracking.shape_masks(pictures, tracking.shape_hues(pictures))
    _, fits, _ = tracking.fit(tracking.halved(masks), 0, pictures.scale / 2)
    true = tracks(placements, 61, PICTURE, 15, 0).center[0, 0, fits.frames]
    cut = true[:, 0] < placements.radius[0, 0]
    assert cut.sum() >= 5 and (fits.center - true).norm(dim=1).max() < 1.5


@pytest.mark.parametrize("camera", CHOICES["camera"])
@pytest.mark.parametrize("ground", CHOICES["ground"])
def test_the_camera_is_followed_to_a_fraction_of_a_pixel(camera, ground):
    """Shapes that move against it do not mislead it."""
    actors = (replace(RED, motion="right"), replace(GREEN, motion="up"))
    placements = place([Scene("slate", ground, camera, actors)], 5)
    video = torch.from_numpy(to_bytes(render(placements, 13, 96, 160)[0]))
    pictures = tracking.reduce(video)
    found = tracking.camera_track(tracking.ground_of(pictures), pictures.scale, 15)
    true = tracks(placements, 13, PICTURE, 15, 0).camera[0]
    assert (found - (true - true[0])).abs().max() < 0.05 * 13


def sampled_motion(motion: str, camera: str, seed: int, noise: float = 0.2) -> str:
    """What is said of true tracks, with noise, while at least half of a shape is in the picture."""
    placements = place([Scene("gray", "cloudy", camera, (replace(RED, motion=motion),))], seed)
    true = tracks(placements, FRAMES, PICTURE, 15, 0)
    generator = torch.Generator().manual_seed(seed)
    center, radius = true.center[0, 0], true.radius[0, 0]
    inside = ((center > 0) & (center < torch.tensor(PICTURE))).all(1).nonzero()[:, 0]
    measured = center[inside] + noise * torch.randn(len(inside), 2, generator=generator)
    steps = tracking.RADII
    coarse = steps[(steps.log() - radius[inside].log()[:, None]).abs().argmin(1)]
    fits = Fits(inside, measured.float(), coarse.float(), torch.ones(len(inside)))
    view = (true.camera[0] - true.camera[0, 0]).float()
    return scorer._motion(fits, view, torch.tensor(PICTURE), 15)


@pytest.mark.parametrize("camera", CHOICES["camera"])
@pytest.mark.parametrize("motion", CHOICES["motion"])
def test_motions_are_known_over_a_ground_that_moves(motion, camera):
    found = [sampled_motion(motion, camera, seed) for seed in range(6)]
    assert found.count(motion) >= 5, found


def test_jumps_are_no_motion_of_the_world():
    generator = torch.Generator().manual_seed(0)
    center = 40 + 20 * torch.rand(40, 2, generator=generator)
    fits = Fits(torch.arange(40), center, torch.full((40,), 10.0), torch.ones(40))
    assert scorer._motion(fits, torch.zeros(40, 2), torch.tensor(PICTURE), 15) == IRREGULAR


TIME = torch.arange(61)


@pytest.mark.parametrize(
    ("way", "name"),
    [
        *(((0.4 * TIME[:, None] * torch.tensor(way)), name) for name, way in WAYS.items()),
        *(((0.9 * TIME[:, None] * torch.tensor(way)), name) for name, way in WAYS.items()),
        (torch.stack((10 * torch.sin(TIME / 61 * 8), 0 * TIME), 1), "sway"),
        (torch.stack((16 * torch.sin(TIME / 61 * 11 + 2), 0 * TIME), 1), "sway"),
        (0.05 * TIME[:, None] * torch.tensor([1, -1]), "still"),
        (torch.stack((0.5 * TIME, 0.5 * TIME), 1), IRREGULAR),
        (torch.stack((0 * TIME, 12 * torch.sin(TIME / 61 * 9)), 1), IRREGULAR),
        (torch.zeros(2, 2), IRREGULAR),
    ],
)
def test_cameras_are_named_by_their_way(way, name):
    noise = 0.1 * torch.randn(way.shape, generator=torch.Generator().manual_seed(0))
    assert scorer._camera(way + noise, 15) == name


def test_an_empty_ground_has_no_shapes():
    placements = place([PLAIN], 0)
    found = look(replace(placements, shape=torch.full_like(placements.shape, -1)), frames=5)
    assert found == scorer.Observation("gray", "checked", "still", ())


def test_a_video_of_one_color_is_read_without_an_error():
    for color in ((0, 0, 0), (230, 30, 40)):
        found = scorer.analyze(np.full((5, 32, 48, 3), color, np.uint8))
        assert len(found.actors) <= 1


# --- comparing --------------------------------------------------------------------------------------------------------


def observed(scene: Scene) -> scorer.Observation:
    actors = tuple(scorer.Seen(**vars(actor)) for actor in scene.actors)
    return scorer.Observation(scene.background, scene.ground, scene.camera, actors)


def test_every_attribute_counts_and_the_order_of_shapes_does_not():
    scene = Scene("brown", "spotted", "sway", (RED, GREEN))
    assert all(scorer.compare(observed(scene), scene).values())
    assert all(scorer.compare(observed(replace(scene, actors=(GREEN, RED))), scene).values())
    assert len(scorer.compare(observed(scene), scene)) == 3 + 2 * 4
    changes = {"background": "black", "ground": "cloudy", "camera": "left"}
    for name, value in changes.items():
        wrong = scorer.compare(observed(replace(scene, **{name: value})), scene)
        assert [key for key, right in wrong.items() if not right] == [name]
    for name, value in {"texture": "striped", "color": "blue", "shape": "ring", "motion": "up"}.items():
        wrong = scorer.compare(observed(replace(scene, actors=(replace(RED, **{name: value}), GREEN))), scene)
        assert [key for key, right in wrong.items() if not right] == [f"0.{name}"]


def test_a_shape_that_is_missing_is_wrong_in_everything_and_one_too_many_is_left_out():
    scene = Scene("brown", "spotted", "sway", (RED, GREEN))
    one = replace(scene, actors=(GREEN,))
    found = scorer.compare(observed(one), scene)
    assert [key for key, right in found.items() if not right] == [f"0.{name}" for name in vars(RED)]
    # The smallest of those seen does not count where fewer were asked for.
    assert not any(scorer.compare(observed(scene), one)[f"0.{name}"] for name in ("color", "shape"))


@pytest.mark.parametrize(
    ("video", "fps"),
    [
        (np.zeros((5, 64, 96, 3), np.float32), 15),
        (np.zeros((64, 96, 3), np.uint8), 15),
        (np.zeros((0, 64, 96, 3), np.uint8), 15),
        (np.zeros((5, 64, 96, 3), np.uint8), 0),
    ],
)
def test_unreadable_videos_are_refused(video, fps):
    with pytest.raises(LongCatError, match="scorer"):
        scorer.analyze(video, fps)
