"""The VAE on several ranks: rank 0 sends latents or a clip, and all ranks decode or encode it together."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..vae.network import WanVAE
from .division import Division
from .group import Group
from .vae import SpreadVAE


@dataclass(frozen=True)
class Decode:
    """Latents [B, z_dim, T, h, w] to decode, and the VAE where it has changed."""

    latents: Tensor
    vae: WanVAE | None


@dataclass(frozen=True)
class Encode:
    """A video [B, 3, F, H, W] to encode, and the VAE where it has changed."""

    video: Tensor
    vae: WanVAE | None


class LedVAE(SpreadVAE):
    """Rank 0's side of a VAE that lies on the group's device; it stands for `VideoVAE.spread`.

    Between two parts of a video the ranks are in step, so a caller may stop there. What passes of a network hold on
    the ranks is freed first.
    """

    def __init__(self, group: Group, vae: WanVAE) -> None:
        super().__init__(vae)
        self.group, self.vae = group, vae
        self._sent: tuple[torch.dtype, torch.device] | None = None

    def decode(self, latents: Tensor) -> Generator[Tensor]:
        with self.group.working():
            self._begin(Decode(latents, self._changed()))
        parts = super().decode(latents)
        try:
            while True:
                with self.group.working():
                    part = next(parts, None)
                if part is None:
                    return
                yield part
        finally:
            # The other ranks stop as well.
            parts.close()

    def encode(self, video: Tensor) -> Tensor:
        with self.group.working():
            self._begin(Encode(video, self._changed()))
            return super().encode(video)

    def _begin(self, message: Decode | Encode) -> None:
        self.group.send(message)
        Division.of(self.group).release()

    def _changed(self) -> WanVAE | None:
        weight = next(self.vae.parameters())
        form = weight.dtype, weight.device
        if form == self._sent:
            return None
        self._sent = form
        return self.vae


class ServedVAE:
    """The side of the other ranks of a group."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self._vae: SpreadVAE | None = None

    def decode(self, message: Decode) -> None:
        for _ in self._of(message.vae).decode(message.latents):
            pass

    def encode(self, message: Encode) -> None:
        self._of(message.vae).encode(message.video)

    def _of(self, vae: WanVAE | None) -> SpreadVAE:
        Division.of(self.group).release()
        if vae is not None:
            self._vae = SpreadVAE(vae.eval())
        assert self._vae is not None, "rank 0 sends it first"
        return self._vae
