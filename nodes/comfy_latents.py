"""The latents of LongCat-Video and of LongCat-nano, as ComfyUI's previews see them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import comfy.latent_formats
from torch import Tensor

from ..longcat_core.nano.colors import BIAS, FACTORS


class LongCatLatents(comfy.latent_formats.Wan21):
    """Wan 2.1 latents. Stock samplers preview one frame a step: here each step shows the next generated frame.

    given: how many conditioning frames the running sampling has at the front, which previews leave out. unlike: how
    many latent frames at the front have other colors.
    """

    given = unlike = 0

    @property
    def latent_rgb_factors_reshape(self) -> Callable[[Tensor], Tensor]:
        """Picks a frame out of latents [B, C, T, h, w]. Previews ask for it once a run, and call it at each step."""
        steps = count()

        def pick(latents: Tensor) -> Tensor:
            if latents.ndim != 5:
                return latents
            shown = self.shown(latents.shape[2], self.given)
            frame = shown[next(steps) % len(shown)]
            return latents[:, :, frame : frame + 1]

        return pick

    def shown(self, frames: int, given: int) -> range:
        """Which of `frames` latent frames previews show; the first `given` are conditioning frames."""
        return range(min(max(given, self.unlike), frames - 1), frames)


class NanoLatents(LongCatLatents):
    """LongCat-nano's latents: those of a VAE of its own, so that they have colors of their own."""

    unlike = 1
    latent_rgb_factors = FACTORS
    latent_rgb_factors_bias = BIAS

    def __init__(self) -> None:
        super().__init__()
        # The one of Wan 2.1 would show other pictures.
        self.taesd_decoder_name = None
