"""The seam for several devices: how one pass of a network is shared between ranks, and who runs a pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from ..model.transformer import FrameLayout
from .attention import Kernels
from .sparse.passes import SparsePass


class Sharing(Protocol):
    """One pass of a network of which this rank has a share of the tokens outside attention, and of the heads in it."""

    def layout(self, inner: FrameLayout, grid: tuple[int, int, int]) -> FrameLayout:
        """The share of what `inner` arranges; what it restores is whole on every rank."""

    def kernels(
        self, chosen: Kernels, inner: FrameLayout, grid: tuple[int, int, int], sparse: SparsePass | None
    ) -> Kernels:
        """The kernels of the pass, to which blocks give shares of the tokens that `inner` arranges.

        sparse: the pass whose attention `chosen` has, or None.
        """


class Ranks(Protocol):
    """Runs the passes of an `Execution` on several ranks."""

    @property
    def evaluate(self) -> Callable[..., tuple[Tensor, bool]]:
        """`Execution.evaluate`, with the execution as first argument."""
