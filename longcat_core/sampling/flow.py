"""The flow-matching process that training and sampling share: sigma = timestep / 1000."""

from __future__ import annotations

from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000


def estimate_clean(latents: Tensor, out: Tensor, sigma: float | Tensor) -> Tensor:
    """The estimate of the clean latents that the network's output, x0 - noise, makes of `latents` at `sigma`."""
    return latents + sigma * out


def output_of(latents: Tensor, clean: Tensor, sigma: float | Tensor) -> Tensor:
    """The network's output, x0 - noise, from the estimate of the clean latents; inverts `estimate_clean`."""
    return (clean - latents) / sigma


def shift_sigmas(sigmas: Tensor, shift: float | Tensor) -> Tensor:
    """Resolution shift of noise levels in 0..1 (arXiv 2403.03206, eq. 23)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)
