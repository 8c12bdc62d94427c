"""What travels between ranks that share a pass: tensors as they are, or in 8 bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..optimize.copies import contiguous
from ..optimize.kernels.row_scales import Packed, pack, unpack
from ..optimize.switches import Exchange


class Codec(Protocol):
    def encode(self, x: Tensor) -> Tensor:
        """x [B, ranks, N, heads, head_dim] as it travels, [B, ranks, ..] contiguous."""

    def decode(self, sent: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """[B, ranks, *shape] again; shape: N, heads, head_dim."""


class Exact:
    def encode(self, x: Tensor) -> Tensor:
        return contiguous(x)

    def decode(self, sent: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return sent


class RowScales:
    """As int8 with a scale for each token and head. Lossy."""

    def encode(self, x: Tensor) -> Tensor:
        return pack(x).words

    def decode(self, sent: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return unpack(Packed(sent, *shape), dtype)


CODECS: Mapping[Exchange, Codec] = {"exact": Exact(), "messages": Exact(), "int8": RowScales()}
