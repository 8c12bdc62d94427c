"""A small pipeline whose VAE costs nothing, for tests that sample videos of a thousand tokens."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from longcat_core.sampling.conditioning import SPATIAL_FACTOR, video_frames

from .tiny import PromptText, TinyPipeline, golden_pipeline


class QuickPipeline(TinyPipeline):
    """Shows three channels of the latents as colors."""

    def decode(self, latents: Tensor) -> np.ndarray:
        colors = latents[0, :3].cpu().mul(32).add(128).clamp(0, 255).byte().permute(1, 2, 3, 0).numpy()
        frames = np.repeat(colors, 4, axis=0)[: video_frames(latents.shape[2])]
        return frames.repeat(SPATIAL_FACTOR, axis=1).repeat(SPATIAL_FACTOR, axis=2)


def quick_pipeline() -> QuickPipeline:
    made = golden_pipeline(PromptText(), QuickPipeline)
    assert isinstance(made, QuickPipeline)
    return made
