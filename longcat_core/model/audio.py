"""What the avatar network hears: windows of audio embeddings become tokens of latent frames, each of which belongs to
one of several speakers.

Where several people speak, a video token's class says whose voice it follows. Its class is that of the part of the
first frame to which the token attends most (`Ops.class_maps`), and a 1-D RoPE draws it to the tokens of that speaker.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import LongCatError
from .audio_tokens import AudioTokens
from .config import AudioConfig
from .layers import LayerNorm
from .rope import line_table

# Of the norm after the projection; those of the blocks have 1e-6.
PROJECTION_EPS = 1e-5
# Classes of the first frame: two people who speak, and everything else.
PEOPLE = 2
# The most masks with which everything else lies in the middle of the range; with more, far away.
FEW_MASKS, FAR = 3, 100.0
TINY = 1e-8


def latent_windows(windows: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """Windows [B, F, W, ..] of video frames, `frames` to a latent frame after the first -> those of latent frames.

    The first one has its whole window, [B, 1, W, ..]; a later one the first half of its first frame's, the middle of
    every frame's and the last half of its last frame's, [B, T-1, W + frames - 1, ..].
    """
    middle = windows.shape[2] // 2
    first, rest = windows[:, :1], windows[:, 1:].unflatten(1, ((windows.shape[1] - 1) // frames, frames))
    parts = rest[:, :, 0, :middle], rest[:, :, :, middle], rest[:, :, -1, middle + 1 :]
    return first, torch.cat(parts, dim=2)


class AudioEmbed(nn.Module):
    """Audio windows to tokens: one projection for the first latent frame, one for the others, and a shared rest."""

    def __init__(self, config: AudioConfig, *, operations: Any, dtype: Any, device: Any) -> None:
        super().__init__()
        self.config, kwargs = config, {"dtype": dtype, "device": device}
        first, later = (config.groups * config.channels * entries for entries in config.entries)
        self.first = operations.Linear(first, config.hidden, **kwargs)
        self.later = operations.Linear(later, config.hidden, **kwargs)
        self.hidden = operations.Linear(config.hidden, config.hidden, **kwargs)
        self.out = operations.Linear(config.hidden, config.tokens * config.width, **kwargs)
        self.norm = LayerNorm(config.width, PROJECTION_EPS, operations=operations, **kwargs)

    def forward(self, windows: Tensor) -> Tensor:
        """Windows [B, F, window, groups, channels] of 4(T-1)+1 video frames -> tokens [B, T, tokens, width]."""
        first, later = (w.flatten(2) for w in latent_windows(windows, self.config.frames))
        x = F.relu(torch.cat((self.first(first), self.later(later)), dim=1))
        return self.norm(self.out(F.relu(self.hidden(x))).unflatten(-1, (-1, self.config.width)))

    def hear(self, windows: Tensor, classes: Tensor | None, head_dim: int) -> AudioTokens:
        """Windows as above, of B videos or, with classes [S, K], of the speakers of one video. Raises LongCatError."""
        check_heard(self.config, windows, classes)
        tokens = self(windows)
        if classes is None:
            return AudioTokens(tokens)
        at = speaker_positions(self.config, len(tokens), classes.shape[1])
        positions = torch.tensor(at, device=tokens.device).repeat_interleave(tokens.shape[2])
        joined = tokens.transpose(0, 1).flatten(1, 2)[None]
        return AudioTokens(joined, line_table(head_dim, positions), classes.to(tokens.device))


def check_heard(config: AudioConfig, windows: Tensor, classes: Tensor | None) -> None:
    """Raise LongCatError for windows and classes, as `AudioEmbed.hear` has them, of another network."""
    shape, wanted = tuple(windows.shape), (config.window, config.groups, config.channels)
    if len(shape) != 5 or shape[2:] != wanted or shape[1] % config.frames != 1:
        raise LongCatError(
            f"audio windows have shape {list(shape)}; this network hears [speakers, {config.frames}n+1 frames, "
            f"{', '.join(map(str, wanted))}], so use the audio encoder that belongs to it"
        )
    if classes is None:
        return
    if shape[0] < PEOPLE or classes.shape[1] < PEOPLE + 1:
        raise LongCatError(
            f"{shape[0]} voices and {classes.shape[1]} masks; give at least {PEOPLE} voices and {PEOPLE + 1} masks"
        )
    if not classes.any(0).all():
        raise LongCatError(
            f"mask {1 + classes.any(0).tolist().index(False)} covers no token; give one that covers its person"
        )


def _elsewhere(config: AudioConfig, classes: int) -> float:
    """The position of what belongs to nobody who speaks."""
    return config.class_range / 2 if classes <= FEW_MASKS else FAR


def speaker_positions(config: AudioConfig, speakers: int, classes: int) -> Sequence[float]:
    """RoPE positions of the speakers' audio tokens."""
    half = config.class_interval / 2
    return [half, config.class_range - half, *[_elsewhere(config, classes)] * (speakers - PEOPLE)]


def class_positions(config: AudioConfig, maps: Tensor, bounds: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE positions [N] fp32 of video tokens, from their class maps [N, K] fp32.

    bounds: the least and the most [K] of all noisy tokens of the video. The first class lies in the first interval of
    the range, the second in its last: each token as far in as it attends to its class, between these bounds.
    """
    low, high = bounds
    share = config.class_interval * (maps - low) / (high - low + TINY)
    own = maps.argmax(1)
    last = share[:, 1] + (config.class_range - config.class_interval)
    elsewhere = torch.full_like(last, _elsewhere(config, maps.shape[1]))
    return torch.where(own == 0, share[:, 0], torch.where(own == 1, last, elsewhere))
