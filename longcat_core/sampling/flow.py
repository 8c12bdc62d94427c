"""The flow-matching process that training and sampling share: sigma = timestep / 1000."""

from __future__ import annotations

from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Resolution shift of noise levels in 0..1 (arXiv 2403.03206, eq. 23)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)
