"""Schedules: the golden numbers to the last bit, evaluation counts, steps out of range."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longcat_core.errors import LongCatError
from longcat_core.files.safetensors_io import read_tensors
from longcat_core.model.config import AudioConfig
from longcat_core.sampling.flow import shift_sigmas
from longcat_core.sampling.schedules import AVATAR_SHIFT, MODES, SHIFT, dmd_schedule, make_schedule, schedule_of

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
CASES = [("base", 12), ("base", 50), *(("distill", n) for n in (8, 12, 16)), *(("enhance_hf", n) for n in (6, 50))]


@pytest.mark.parametrize(("name", "steps"), [*CASES, ("refine", 50)])
def test_golden_schedules_bit_for_bit(name, steps):
    golden = read_tensors(GOLDEN / "schedule.safetensors")
    schedule = make_schedule("distilled" if name == "distill" else name, steps)
    assert torch.equal(schedule.timesteps, golden[f"{name}.{steps}.timesteps"])
    assert torch.equal(schedule.sigmas, golden[f"{name}.{steps}.sigmas"])


@pytest.mark.parametrize(
    ("mode", "steps", "evaluations"),
    [("base", 50, 50), ("base", 1, 1), ("distilled", 16, 16), ("enhance_hf", 50, 56), ("refine", 50, 5)],
)
def test_evaluations(mode, steps, evaluations):
    schedule = make_schedule(mode, steps)
    assert len(schedule) == evaluations == len(schedule.sigmas) - 1
    assert schedule.mode == mode


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("steps", [1, 2, 7, 16, 50])
def test_noise_falls_to_nothing(mode, steps):
    schedule = make_schedule(mode, steps)
    assert schedule.timesteps.dtype == schedule.sigmas.dtype == torch.float32
    assert (schedule.sigmas.diff() < 0).all() and schedule.sigmas[-1] == 0
    assert torch.equal(schedule.sigmas[:-1], schedule.timesteps / 1000)
    assert schedule.timesteps[0] == (500 if mode == "refine" else 1000)


def test_distilled_steps_lie_on_the_grid_of_training():
    grid = shift_sigmas(torch.arange(1, 51) * 20 / 1000, SHIFT) * 1000
    for steps in range(1, 51):
        timesteps = make_schedule("distilled", steps).timesteps
        assert len(timesteps.unique()) == steps
        assert (timesteps[:, None] - grid).abs().amin(1).max() < 1e-3
        # floor(linspace(0, 50, n, endpoint=False)), in exact arithmetic.
        wanted = grid.flip(0)[[i * 50 // steps for i in range(steps)]]
        torch.testing.assert_close(timesteps, wanted, atol=1e-3, rtol=0)


def test_tail_of_fifties():
    timesteps = make_schedule("enhance_hf", 50).timesteps
    assert timesteps[-10:].tolist() == [500, 450, 400, 350, 300, 250, 200, 150, 100, 50]
    assert (timesteps[:-10] > 500).all()


def test_shift():
    sigmas = torch.tensor([0.0, 0.5, 1.0])
    assert shift_sigmas(sigmas, 12.0).tolist() == pytest.approx([0, 12 * 0.5 / 6.5, 1])
    assert torch.equal(shift_sigmas(sigmas, 1.0), sigmas)


@pytest.mark.parametrize(
    ("mode", "steps", "said"),
    [
        ("fast", 10, "unknown schedule 'fast'; choose one of base, distilled, enhance_hf, refine"),
        ("base", 0, "0 steps are out of range; the base schedule takes 1 to 1000"),
        ("base", 1001, "1001 steps are out of range; the base schedule takes 1 to 1000"),
        ("distilled", 51, "51 steps are out of range; the distilled schedule takes 1 to 50"),
        ("refine", -5, "-5 steps are out of range"),
    ],
)
def test_bad_steps_are_named(mode, steps, said):
    with pytest.raises(LongCatError, match=said):
        make_schedule(mode, steps)


def test_an_avatar_has_the_schedules_of_its_version():
    older, newer = AudioConfig(groups=12, channels=768), AudioConfig()
    for mode in ("base", "enhance_hf"):
        for audio, shift in ((None, SHIFT), (older, SHIFT), (newer, AVATAR_SHIFT)):
            assert torch.equal(schedule_of(audio, mode, 6).sigmas, make_schedule(mode, 6, shift).sigmas)
    assert torch.equal(schedule_of(older, "distilled", 16).sigmas, make_schedule("distilled", 16).sigmas)
    assert torch.equal(schedule_of(newer, "distilled", 8).sigmas, dmd_schedule().sigmas)
    for audio, mode, steps, match in (
        (newer, "distilled", 16, "has exactly 8 steps"),
        (older, "refine", 50, "has no refine stage"),
    ):
        with pytest.raises(LongCatError, match=match):
            schedule_of(audio, mode, steps)
