"""Audio as blocks read it: tokens of latent frames, or keys and values of these."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import LongCatError


class BlockAudio(NamedTuple):
    """What one block hears; tensors only.

    tokens [B or 1, T, M, width] of the noisy frames, or the block's own keys and values, each [.., M, heads, head_dim].
    rope: tables [M, head_dim/2] for the keys of several speakers, or None. classes [S, K] bool: which of the first
    frame's tokens belong to each class, or None for one speaker.
    """

    tokens: Tensor | None
    keys: tuple[Tensor, Tensor] | None = None
    rope: tuple[Tensor, Tensor] | None = None
    classes: Tensor | None = None


@dataclass
class AudioTokens:
    """Projected audio of one segment.

    tokens: [B, T, M, width] for every latent frame but a reference, in the network's dtype. rope, classes: see
    `BlockAudio`. cached: keys and values of each block, which `optimize.text_keys` keeps for the next step.
    """

    tokens: Tensor
    rope: tuple[Tensor, Tensor] | None = None
    classes: Tensor | None = None
    cached: Any = field(default=None, compare=False, repr=False)

    def block(self, frames: int) -> BlockAudio:
        """What the last `frames` latent frames hear. Raises LongCatError if the audio has fewer."""
        if frames > self.tokens.shape[1]:
            raise LongCatError(
                f"the audio has {self.tokens.shape[1]} latent frames and {frames} are generated; give longer audio"
            )
        tokens = self.tokens[:, self.tokens.shape[1] - frames :]
        return BlockAudio(tokens, None, self.rope, self.classes)
