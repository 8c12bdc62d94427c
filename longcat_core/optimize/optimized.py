"""`OptimizedTransformer`: a network with one `Execution`, for use without ComfyUI."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from ..model.config import ModelConfig
from ..model.transformer import LongCatTransformer
from .block_sparse import BlockSparse
from .compilation import Regional
from .execution import Execution
from .fused import sliceable
from .sparse.settings import Sparse
from .streaming import BlockStream
from .switches import Optimizations

P = ParamSpec("P")
R = TypeVar("R")


def _value(name: str) -> Any:
    """A property of `OptimizedTransformer` that reads and sets one of its execution."""
    return property(
        lambda self: getattr(self.execution, name),
        lambda self, value: setattr(self.execution, name, value),
        doc=f"See `Execution.{name}`.",
    )


def _method(function: Callable[Concatenate[Execution, P], R]) -> Callable[Concatenate[Any, P], R]:
    """A method of `OptimizedTransformer` that calls one of its execution."""

    @wraps(function)
    def call(self: OptimizedTransformer, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.execution, function.__name__)(*args, **kwargs)

    return call


class OptimizedTransformer(LongCatTransformer):
    """A network together with its own `Execution`; called with latents, timesteps and text like the execution."""

    def __init__(
        self,
        config: ModelConfig,
        optimizations: Optimizations | None = None,
        *,
        operations: Any = nn,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(config, operations=operations, dtype=dtype, device=device)
        execution = Execution(self, optimizations, sliceable=getattr(operations, "sliceable", sliceable))
        # Not through nn.Module, which would register the execution's network as a part of itself.
        self.__dict__["execution"] = execution

    execution: Execution
    optimizations: Optimizations = _value("optimizations")
    requested: Optimizations = _value("requested")
    block_sparse: BlockSparse | None = _value("block_sparse")
    sparse: Sparse | None = _value("sparse")
    stream: BlockStream | None = _value("stream")
    announce: Callable[[str], None] = _value("announce")
    compiled_block: Regional = _value("compiled_block")
    compute_dtype: torch.dtype = _value("compute_dtype")
    eight_bit: bool = _value("eight_bit")

    set_optimizations = _method(Execution.set_optimizations)
    stream_blocks = _method(Execution.stream_blocks)
    embed_text = _method(Execution.embed_text)
    embed_audio = _method(Execution.embed_audio)
    choose_kernels = _method(Execution.choose_kernels)
    own_text_kernel = _method(Execution.own_text_kernel)
    check_sparse = _method(Execution.check_sparse)
    sparse_in_words = _method(Execution.sparse_in_words)
    new_kv_cache = _method(Execution.new_kv_cache)
    fill_kv_cache = _method(Execution.fill_kv_cache)

    @property
    def network(self) -> LongCatTransformer:
        """The network itself, for reading and writing weights."""
        return self

    @property
    def device(self) -> torch.device:
        """Where latents go in: the device of the weights that are not streamed."""
        return self.patch_embed.weight.device

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """See `Execution.__call__`."""
        return self.execution(*args, **kwargs)
