"""What the sampler loop asks of a network. `optimize.optimized.OptimizedTransformer` provides it."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..model.audio_tokens import AudioTokens
from ..model.kv_cache import KVCache, Reference
from ..model.text import TextTokens
from ..optimize.switches import Optimizations


class Network(Protocol):
    """A network that predicts x0 - noise. It is called under torch.no_grad with tensors on `device`."""

    @property
    def device(self) -> torch.device:
        """Where latents, timesteps and text must be."""

    @property
    def optimizations(self) -> Optimizations:
        """The switches in force; a callback that makes room may change them between two evaluations."""

    def embed_text(self, context: Tensor, mask: Tensor | None, /) -> TextTokens:
        """Text [B, L, caption] with its mask [B, L] (1: a real token; None: all are), embedded for every step."""

    def embed_audio(self, windows: Tensor, classes: Tensor | None, /) -> AudioTokens:
        """Audio windows [B, F, window, groups, channels], or of the speakers of one video, for every step.

        Asked of networks that hear, only for audio; see `LongCatTransformer.embed_audio`.
        """

    def fill_kv_cache(
        self, cond_latents: Tensor, device: str | None, /, *, reference: Reference | None = None
    ) -> KVCache:
        """Keys and values of clean latents [B, C, n, H, W] fp32, kept on `device` (None: beside the latents).

        The cache's `out` holds the network's output for these frames, [B, C, n, H, W] fp32. reference: the first
        frame is a reference frame; given only if it is.
        """

    def __call__(
        self,
        x: Tensor,
        timestep: Tensor,
        text: TextTokens,
        /,
        *,
        num_cond_latents: int,
        kv_cache: KVCache | None,
        progress: float | None,
        reference: Reference | None = None,
    ) -> Tensor:
        """x0 - noise [B, C, T, H, W] fp32 for latents x of the same shape.

        timestep: [1, 1] for all frames or [1, T], in 0..1000. text: of 1 or B samples. num_cond_latents: clean frames
        at the front of x, at timestep 0. kv_cache: of clean frames that stand in front of x and are not part of it.
        progress: the share of the steps that is done, 0 <= progress < 1.
        reference: the first clean frame is a reference frame; given only if it is.
        """
