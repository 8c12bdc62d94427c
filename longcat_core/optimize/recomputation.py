"""Gradient checkpointing: each block is computed again in the backward pass instead of keeping its activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recomputed(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """call(block, x, *args), whose activations are computed again for the backward pass. Exact."""

    def checkpointed(block: Any, x: Tensor, *args: Any) -> Tensor:
        return checkpoint(call, block, x, *args, use_reentrant=False)

    return checkpointed
