"""Kernels as custom operators inside compiled graphs: the compiler calls them without looking into them.

Then neither a package's launch code nor PyTorch's choice of a kernel can break a graph.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from .copies import contiguous

F = TypeVar("F", bound=Callable[..., Any])
# q [B, Nq, H, D], k and v [B, Nk, H, D] -> [B, Nq, H, D].
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
# Of frames to their own keys: q [B, T*S, H, D], k and v [B or 1, T, M, H, D] -> as q.
AttendFrames = Callable[[Tensor, Tensor, Tensor], Tensor]


class Varlen(NamedTuple):
    """Lengths of packed sequences, as flash-attention kernels take them.

    cu_seqlens_*: int32 [B+1] running totals on the tensors' device; max_seqlen_*: length of the longest sequence.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


# q [sum Nq, H, D], k and v [sum Nk, H, D] -> output [sum Nq, H, D] and log-sum-exp [H, sum Nq] fp32.
AttendVarlen = Callable[[Tensor, Tensor, Tensor, Varlen], tuple[Tensor, Tensor]]


def namespace_of(module: str) -> str:
    """The namespace of a module's operators. PyTorch takes ASCII only, and ComfyUI loads the pack under its path,
    beside which longcat_core may be imported too."""
    ascii_only = "".join(letter if letter.isascii() else f"_{ord(letter):x}_" for letter in module)
    return "longcat" if module.startswith("longcat_core.") else "longcat_" + re.sub(r"\W", "_", ascii_only)


NAMESPACE = namespace_of(__name__)

# Where PyTorch has it, this keeps an operator out of CUDA graphs, which would replay what it did when they were made.
_UNCAPTURED = [tag for tag in (getattr(torch.Tag, "cudagraph_unsafe", None),) if tag is not None]


def operator(name: str, fake: Callable[..., Any], changes: bool = False) -> Callable[[F], F]:
    """Make a function of a tensor a custom operator inside compiled graphs and for the meta device, with its signature
    as schema.

    fake: returns outputs of the same form. changes: whether equal calls may do different work, so that none must be
    recorded and replayed. The operator itself is the result's attribute `operator`.
    """
    tags = _UNCAPTURED if changes else []

    def made(function: F) -> F:
        found = torch.library.custom_op(f"{NAMESPACE}::{name}", function, mutates_args=(), tags=tags)
        found.register_fake(fake)

        @wraps(function)
        def call(x: Tensor, *args: Any, **options: Any) -> Any:
            # An operator's first call imports PyTorch's compiler, which takes seconds, even outside of graphs.
            return (found if torch.compiler.is_compiling() or x.is_meta else function)(x, *args, **options)

        call.operator = found  # type: ignore[attr-defined]
        return cast(F, call)

    return made


_KERNELS: dict[str, Callable[..., Any]] = {}
_foreign = threading.local()


@operator("attend", lambda q, *_: q.new_empty(q.shape))
def _attend(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    return _KERNELS[backend](q, k, v).contiguous()


@operator("attend_varlen", lambda q, *_: (q.new_empty(q.shape), q.new_empty(q.shape[1::-1], dtype=torch.float32)))
def _attend_varlen(
    q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, longest_q: int, longest_k: int, backend: str
) -> tuple[Tensor, Tensor]:
    out, lse = _KERNELS[backend](q, k, v, Varlen(ends_q, ends_k, longest_q, longest_k))
    return out.contiguous(), lse.contiguous()


def _within_graph(*tensors: Tensor) -> bool:
    # The operators have no backward pass: with gradients the compiler must look into the kernel.
    if not torch.compiler.is_compiling():
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


def opaque(name: str, kernel: Attend) -> Attend:
    """`kernel`, which in compiled graphs becomes a custom operator; `name` must be unique."""
    _KERNELS[name] = kernel

    @wraps(kernel)
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attend(q, k, v, name) if _within_graph(q, k, v) else kernel(q, k, v)

    return attend


def opaque_varlen(name: str, kernel: AttendVarlen) -> AttendVarlen:
    """The same for a kernel over packed sequences."""
    _KERNELS[f"{name} varlen"] = kernel

    @wraps(kernel)
    def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Varlen) -> tuple[Tensor, Tensor]:
        if _within_graph(q, k, v):
            return _attend_varlen(q, k, v, *lengths, f"{name} varlen")
        return kernel(q, k, v, lengths)

    return attend


@operator("attend_foreign", lambda q, *_: q.new_empty(q.shape), changes=True)
def _attend_foreign(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return contiguous(_foreign.attend(q, k, v))


def attend_foreign(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Stands in a compiled graph for a kernel that does not belong to a backend and may be another object at every
    step or layer."""
    return _attend_foreign(q, k, v) if _within_graph(q, k, v) else _foreign.attend(q, k, v)


@operator("attend_foreign_frames", lambda q, *_: q.new_empty(q.shape), changes=True)
def _attend_foreign_frames(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _foreign.frames(q, k, v).contiguous()


def attend_foreign_frames(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same for attention of frames to keys of their own."""
    return _attend_foreign_frames(q, k, v) if _within_graph(q, k, v) else _foreign.frames(q, k, v)


@contextmanager
def foreign_kernel(attend: Attend, frames: AttendFrames | None = None) -> Iterator[None]:
    """`attend_foreign` is `attend`, and `attend_foreign_frames` `frames`, inside the `with` block, in this thread."""
    before = getattr(_foreign, "attend", None), getattr(_foreign, "frames", None)
    _foreign.attend, _foreign.frames = attend, frames
    try:
        yield
    finally:
        _foreign.attend, _foreign.frames = before
