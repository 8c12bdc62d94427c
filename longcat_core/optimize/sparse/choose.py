"""The kernels of sparse attention, chosen by name or `auto`; each says why it cannot run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from typing import Protocol

import torch
from torch import Tensor

from ...errors import BackendUnavailable
from ..kernels import sparse as kernels
from ..requirement import Inputs, Requirement, trial
from .plain import attend_sparse_plain
from .settings import BLOCK, Sparse


class AttendSparse(Protocol):
    """Sparse attention as `plain.attend_sparse_plain` defines it, up to rounding."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor, /, *, sink: int, query_block: int, tail: bool
    ) -> Tensor: ...


@dataclass(frozen=True)
class SparseBackend:
    """One kernel of sparse attention.

    exact is False for kernels that quantize their inputs; `auto` never takes those. uniform: whether the kernel takes
    as many queries as keys and one density for all heads only.
    """

    name: str
    summary: str
    needs: Requirement
    attend: AttendSparse
    exact: bool = True
    uniform: bool = False

    def why_not(self, inputs: Inputs, query_block: int, tail: bool) -> str:
        """Why the kernel cannot serve such inputs, or ""; on CUDA the kernel is tried once."""
        reason = self.needs.why_not(inputs) or kernels.refuses(self.name, query_block)
        if reason or self.needs.capability is None:
            return reason
        return tried(self.name, inputs.device, inputs.dtype, inputs.head_dim, query_block, tail)


_ANYWHERE = Requirement(None, dtypes=None, head_dims=None)
BACKENDS: tuple[SparseBackend, ...] = (
    *(
        SparseBackend(
            name,
            summary,
            kernels.NEEDS[name],
            partial(kernels.attend_sparse, kernel=name),
            exact=name not in kernels.LOSSY,
            uniform=name == "sol",
        )
        for name, summary in kernels.SUMMARIES.items()
    ),
    SparseBackend("plain", "PyTorch (the definition; slow)", _ANYWHERE, attend_sparse_plain),
)

_ABSENT = "this version does not have it"
# Key blocks of a trial, and the relative error that is accepted: of 16-bit kernels, and of 8-bit ones.
_TRIAL_BLOCKS, _TOLERANCES = 9, (0.02, 0.25)


def neighborly(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Queries [B, N, heads, head_dim] that are alike within a block and look most at the blocks around their own, and
    keys of the same shape.

    For such tokens Sol-Attn (arXiv 2607.24027) computes what the definition does. For others it does not, because it
    always takes a block's neighbors and counts the rest by the block's mean query.
    """
    block = torch.arange(q.shape[1], device=q.device) // BLOCK
    # Half a turn for all blocks, so that scores fall with the distance.
    angle = block * (torch.pi / (block[-1] + 1))
    length = 2 * q.shape[-1] ** 0.25
    place = length * torch.stack([angle.cos(), angle.sin()], dim=-1)[None, :, None]
    q, k = torch.zeros_like(q), 0.1 * k
    q[..., :2] += place
    k[..., :2] += place
    return q, k


@cache
def tried(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, query_block: int, tail: bool) -> str:
    """Why the kernel of `name` does not work on `device`, tried on a few blocks, or ""."""
    backend = next(backend for backend in BACKENDS if backend.name == name)
    generator = torch.Generator(device).manual_seed(0)
    tokens = _TRIAL_BLOCKS * BLOCK
    # The last query block is short, and the last keys do not fill a block.
    ends = (0, 0, 0) if backend.uniform else (-40, 24, 24)
    q, k, v = (torch.randn((1, tokens + end, 2, head_dim), generator=generator, device=device) for end in ends)
    if backend.uniform:
        q, k = neighborly(q, k)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    keep = torch.tensor([3, 3] if backend.uniform else [2, 3], dtype=torch.int32)

    def run() -> tuple[Tensor, Tensor]:
        out = backend.attend(q, k, v, keep, sink=1, query_block=query_block, tail=tail).float()
        return out, attend_sparse_plain(q, k, v, keep, sink=1, query_block=query_block, tail=tail).float()

    return trial(run, _TOLERANCES[not backend.exact])


def report(inputs: Inputs | None = None) -> list[tuple[str, bool, str]]:
    """(name, whether it can run on this machine, its summary or why it cannot) for every kernel.

    inputs: those that it must take as well, with query blocks of 64; trying kernels takes seconds where they are
    compiled first.
    """
    rows = []
    for backend in BACKENDS:
        reason = backend.needs.missing() or ("" if inputs is None else backend.why_not(inputs, BLOCK, True))
        rows.append((backend.name, not reason, reason or backend.summary))
    return rows


def check_sparse(name: str) -> None:
    """Raise BackendUnavailable unless the kernel `name` can run on this machine, or it is `auto`."""
    backend = next((backend for backend in BACKENDS if backend.name == name), None)
    reason = _ABSENT if backend is None else backend.needs.missing()
    if reason and name != "auto":
        raise BackendUnavailable(f"sparse kernel {name!r} is unavailable ({reason}); choose 'auto' or 'plain'")


def only_plain(inputs: Inputs) -> str:
    """Why `auto` would be plain PyTorch for such inputs, which is slower than full attention, or ""; tries nothing."""
    reasons = [b.needs.why_not(inputs) for b in BACKENDS if b.exact and b.needs.capability is not None]
    return "" if "" in reasons else f"no kernel of it runs here: {reasons[-1]}"


def choose_sparse(name: str, inputs: Inputs, query_block: int, tail: bool) -> SparseBackend:
    """The kernel `name` for such inputs; `auto`: the fastest exact one that can run.

    On GPUs whose kernels were not measured, `auto` is a kernel that times them at its first call. Raises
    BackendUnavailable if a kernel chosen by name cannot run: a silent substitute would falsify a measurement.
    """
    auto = name == "auto"
    order: tuple[str, ...] = ()
    if auto and inputs.device.type == "cuda":
        order = kernels.MEASURED.get((torch.cuda.get_device_capability(inputs.device), query_block), ())
    reason, found = _ABSENT, []
    for backend in sorted(BACKENDS, key=lambda b: order.index(b.name) if b.name in order else len(order)):
        if name == backend.name or (auto and backend.exact):
            reason = backend.why_not(inputs, query_block, tail)
            if not reason and (backend.name in order or not auto):
                return backend
            found += [] if reason else [backend]
    if not found:
        raise BackendUnavailable(f"sparse kernel {name!r} cannot run here: {reason}; choose 'auto' or 'plain'")
    first, ours = found[0], tuple(backend.name for backend in found if backend.name in kernels.SUMMARIES)
    if len(ours) < 2:
        return first
    return SparseBackend("auto", "the fastest", first.needs, partial(kernels.attend_fastest, kernels=ours))


def in_use(settings: Sparse, inputs: Inputs) -> str:
    """The settings and the kernel that computes them for such inputs, in words; why none does, if none can."""
    words = settings.in_words().removesuffix(f", {settings.kernel}")
    try:
        name = choose_sparse(settings.kernel, inputs, settings.queries, settings.tail).name
    except BackendUnavailable as error:
        return f"{words} ({error})"
    return f"{words}, kernel {name if name != 'auto' else 'auto (timed at the first step)'}"


def attend_sparse(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, *, sink: int, query_block: int, tail: bool, kernel: str = "auto"
) -> Tensor:
    """`plain.attend_sparse_plain` by a kernel; see there. kernel: one of `settings.SPARSE_KERNELS`."""
    backend = choose_sparse(kernel, Inputs.of(q), query_block, tail)
    return backend.attend(q, k, v, keep, sink=sink, query_block=query_block, tail=tail)
