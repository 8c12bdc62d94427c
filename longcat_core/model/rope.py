"""3-D rotary position embedding over interleaved channel pairs (RoFormer, arXiv 2104.09864)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

BASE = 10000.0


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # a table made while sampling serves training too
def rope_table(
    head_dim: int, frames: int, height: int, width: int, start_frame: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every token's angles, each [frames*height*width, head_dim/2] fp32.

    The head dim is shared out as 2*(D//6) channels for rows, the same for columns, and the rest, first, for
    frames. Positions are whole numbers from 0, frames from `start_frame` (noise frames behind cached
    conditioning frames). Cached per grid, since every step and block asks for the same table.
    """
    spatial = 2 * (head_dim // 6)
    axes = (
        (head_dim - 2 * spatial, torch.arange(start_frame, start_frame + frames)),
        (spatial, torch.arange(height)),
        (spatial, torch.arange(width)),
    )
    angles = []
    for axis, (dim, positions) in enumerate(axes):
        inverse_frequency = 1.0 / BASE ** (torch.arange(0, dim, 2).float() / dim)
        shape = [1, 1, 1, dim // 2]
        shape[axis] = len(positions)
        angle = torch.outer(positions.float(), inverse_frequency).view(shape)
        angles.append(angle.expand(frames, height, width, dim // 2))
    table = torch.cat(angles, dim=-1).flatten(0, 2)
    # Angles are computed on the CPU so that every device gets the same table to the last bit.
    return table.cos().to(device), table.sin().to(device)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, N, heads, head_dim] by tables [N, head_dim/2]; in fp32, back in x's dtype."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)
