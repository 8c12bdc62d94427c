"""3-D rotary position embedding over interleaved channel pairs (RoFormer, arXiv 2104.09864)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

BASE = 10000.0


def rope_angles(head_dim: int, frames: int, height: int, width: int, start_frame: int = 0) -> Tensor:
    """Every token's angles, [frames*height*width, head_dim/2] fp32, on the CPU.

    The head dim is split into 2*(D//6) channels for rows, the same for columns, and the rest, first, for frames.
    Positions are whole numbers from 0, frames from `start_frame` (noise frames behind cached conditioning frames).
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
    return torch.cat(angles, dim=-1).flatten(0, 2)


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # a table made while sampling serves training too
def rope_table(
    head_dim: int, frames: int, height: int, width: int, start_frame: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of `rope_angles`. Cached per grid, since every step and block asks for the same table."""
    # Angles are computed on the CPU so that every device gets the same table to the last bit.
    angles = rope_angles(head_dim, frames, height, width, start_frame)
    return angles.cos().to(device), angles.sin().to(device)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def referenced_table(
    head_dim: int, frames: int, height: int, width: int, reference: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Tables of a first frame at position `reference`, which may be negative, and of the others at 0, 1, ..."""
    ahead = rope_table(head_dim, 1, height, width, reference, device)
    rest = rope_table(head_dim, frames - 1, height, width, 0, device)
    cos, sin = (torch.cat(pair) for pair in zip(ahead, rest, strict=True))
    return cos, sin


def line_table(head_dim: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine [N, head_dim/2] fp32 of real positions [N] on one axis."""
    inverse_frequency = 1.0 / BASE ** (torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    angles = torch.outer(positions.float(), inverse_frequency)
    return angles.cos(), angles.sin()


# fp32 copies of less than this are not worth avoiding; larger ones are cut into parts.
_WHOLE_BYTES, _PARTS = 1 << 28, 4


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, N, heads, head_dim] by tables [N, head_dim/2]; in fp32, back in x's dtype.

    Each output is a sum of two products, x * cos and the pair's other half * (+-sin), which compiles to one loop over x
    in place; stacking two halves would be a copy. Outside of graphs and without gradients a large x is rotated part by
    part, since its copies in fp32 would be the largest tensors of a forward pass.
    """
    sign = torch.arange(-1, 2, 2, device=x.device)
    cos, sin = cos[:, None, :, None], sin[:, None, :, None] * sign
    grad = torch.is_grad_enabled() and x.requires_grad
    if torch.compiler.is_compiling() or grad or 4 * x.numel() <= _WHOLE_BYTES:
        return _rotated(x, cos, sin).to(x.dtype)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    parts = (tensor.chunk(_PARTS, dim) for tensor, dim in ((out, 1), (x, 1), (cos, 0), (sin, 0)))
    for into, *operands in zip(*parts, strict=True):
        into.copy_(_rotated(*operands))
    return out


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    pairs = x.float().unflatten(-1, (-1, 2))
    return (pairs * cos + pairs.flip(-1) * sin).flatten(-2)
