"""Noise schedules: the timesteps that the sampler visits. All are fp32 with sigma = timestep / 1000 (flow matching)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import LongCatError, is_whole
from ..model.config import AudioConfig
from .flow import NUM_TRAIN_TIMESTEPS, shift_sigmas

Mode = Literal["base", "distilled", "enhance_hf", "refine"]
MODES: tuple[Mode, ...] = get_args(Mode)

SHIFT = 12.0
# Of LongCat-Video-Avatar 1.5; that of 1.0 is LongCat-Video's.
AVATAR_SHIFT = 7.0
# Groups of states that 1.5 takes from Whisper; 1.0 takes every layer of wav2vec2.
WHISPER_GROUPS = 5
# The only number of steps of the LoRA that distils LongCat-Video-Avatar 1.5.
DMD_STEPS = 8
# The distilled LoRA was trained on a grid of 50 timesteps: 20, 40 ... 1000.
DISTILLED_GRID = 50
# Above this timestep enhance_hf follows the base schedule, below it every 50; refining starts here.
TAIL_START = 500.0
TAIL_STEP = 50.0


@dataclass(frozen=True)
class Schedule:
    """timesteps [n] in 0..1000, one network evaluation each; sigmas [n+1] end in 0. Both fp32 on the CPU."""

    mode: Mode
    timesteps: Tensor
    sigmas: Tensor

    def __len__(self) -> int:
        return len(self.timesteps)


def _base_timesteps(steps: int, shift: float) -> Tensor:
    return shift_sigmas(torch.linspace(1.0, 0.001, steps), shift) * NUM_TRAIN_TIMESTEPS


def _distilled_timesteps(steps: int) -> Tensor:
    spacing = NUM_TRAIN_TIMESTEPS // DISTILLED_GRID
    grid = torch.arange(1, DISTILLED_GRID + 1).flip(0) * spacing
    # Whole-number arithmetic: floor(i * 50 / n) in floating point can land one index too low.
    index = torch.arange(steps) * DISTILLED_GRID // steps
    return shift_sigmas(grid[index].float() / NUM_TRAIN_TIMESTEPS, SHIFT) * NUM_TRAIN_TIMESTEPS


def make_schedule(mode: str, steps: int, shift: float = SHIFT) -> Schedule:
    """The schedule of `steps` nominal steps in one of four modes.

    base: linspace(1, 0.001, n), shifted. distilled: n of the distilled grid, shifted. enhance_hf: the base
    timesteps above 500, then 500, 450 ... 50. refine: 500, then the base timesteps below 500. In the last two
    the number of evaluations, `len(schedule)`, differs from `steps`. shift: of all but distilled.
    """
    if not isinstance(mode, str) or mode not in MODES:
        raise LongCatError(f"unknown schedule {mode!r}; choose one of {', '.join(MODES)}")
    limit = DISTILLED_GRID if mode == "distilled" else NUM_TRAIN_TIMESTEPS
    if not is_whole(steps) or not 1 <= steps <= limit:
        raise LongCatError(f"{steps} steps are out of range; the {mode} schedule takes 1 to {limit}")
    if mode == "distilled":
        timesteps = _distilled_timesteps(steps)
    else:
        timesteps = _base_timesteps(steps, shift)
    if mode == "enhance_hf":
        tail = torch.arange(TAIL_START, 0, -TAIL_STEP)
        timesteps = torch.cat((timesteps[timesteps > TAIL_START], tail))
    elif mode == "refine":
        timesteps = torch.cat((torch.tensor([TAIL_START]), timesteps[timesteps < TAIL_START]))
    return _schedule(mode, timesteps)


def dmd_schedule() -> Schedule:
    """The schedule of LongCat-Video-Avatar 1.5 with the LoRA that distils it: DMD_STEPS steps."""
    spacing = NUM_TRAIN_TIMESTEPS // DMD_STEPS
    sigmas = 1 - torch.arange(DMD_STEPS, dtype=torch.float64) * spacing / (NUM_TRAIN_TIMESTEPS - 1)
    return _schedule("distilled", shift_sigmas(sigmas, AVATAR_SHIFT).float() * NUM_TRAIN_TIMESTEPS)


def is_newer(audio: AudioConfig) -> bool:
    """Whether an avatar's network is of version 1.5, by the audio that it takes; otherwise it is of 1.0."""
    return audio.groups == WHISPER_GROUPS


def shift_of(audio: AudioConfig | None) -> float:
    """The shift of a network's noise levels."""
    return AVATAR_SHIFT if audio is not None and is_newer(audio) else SHIFT


def schedule_of(audio: AudioConfig | None, mode: str, steps: int) -> Schedule:
    """`make_schedule` for a network: of LongCat-Video, for which audio is None, or of an avatar.

    Raises LongCatError for other than DMD_STEPS steps of mode distilled in version 1.5, and for mode refine of an
    avatar, which has no second stage.
    """
    if audio is None:
        return make_schedule(mode, steps)
    if mode == "refine":
        raise LongCatError("LongCat-Video-Avatar has no refine stage; choose the base schedule")
    if mode != "distilled" or not is_newer(audio):
        return make_schedule(mode, steps, shift_of(audio))
    if steps != DMD_STEPS:
        raise LongCatError(
            f"{steps} steps; the distilled schedule of LongCat-Video-Avatar 1.5 has exactly {DMD_STEPS} steps"
        )
    return dmd_schedule()


def _schedule(mode: Mode, timesteps: Tensor) -> Schedule:
    return Schedule(mode, timesteps, torch.cat((timesteps / NUM_TRAIN_TIMESTEPS, torch.zeros(1))))
