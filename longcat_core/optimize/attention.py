"""Attention kernels under one signature, chosen by name or `auto`; each says why it cannot run.

A kernel takes q [B, Nq, H, D], k and v [B, Nk, H, D] and returns [B, Nq, H, D]: no mask, not causal, softmax scale
D^-0.5. Optional packages are imported when a backend is first needed, never when this module is imported.

Inside a compiled graph kernels are custom operators; see `operators`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..errors import BackendUnavailable
from .operators import Attend, AttendFrames, AttendVarlen, Varlen, attend_foreign, opaque, opaque_varlen
from .requirement import HALF, Inputs, Requirement, load, trial

if TYPE_CHECKING:
    from .kernels.elementwise import Quantized

AttendQuantized = Callable[[Tensor, Tensor, Tensor], "Quantized"]


@dataclass(frozen=True)
class Backend:
    """One attention kernel.

    varlen: the same for packed sequences. exact is False for kernels that quantize their inputs; `auto` never takes
    those. quantized: gives the same with an 8-bit output [B, Nq, C], for a linear layer that takes it so.
    """

    name: str
    summary: str
    needs: Requirement
    attend: Attend
    varlen: AttendVarlen | None = None
    exact: bool = True
    quantized: Callable[[], AttendQuantized] | None = None

    def why_not(self, inputs: Inputs) -> str:
        """Why the kernel cannot serve such inputs, or ""; on CUDA the kernel is tried once."""
        reason = self.needs.why_not(inputs)
        if reason or self.needs.capability is None or torch.compiler.is_compiling():
            return reason
        return tried(self.name, inputs.device, inputs.dtype, inputs.head_dim)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _sdpa_by(kernel: SDPBackend) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(kernel):
            return _sdpa(q, k, v)

    return attend


def _packaged(needs: Requirement, **options: Any) -> Attend:
    """The function of an optional package that a requirement names."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = getattr(load(needs.module)[0], needs.attribute)(q, k, v, **options)
        # FlashAttention 3 and 4 return the output alone or (output, lse), depending on their version.
        return out[0] if isinstance(out, tuple) else out

    return attend


def _cudnn_fp8(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # Imported here: ComfyUI asks for the names of backends when it starts, and defining Triton kernels takes time.
    from .kernels import cudnn_fp8

    return cudnn_fp8.attend(q, k, v)


def _cudnn_fp8_quantized() -> AttendQuantized:
    from .kernels import cudnn_fp8

    return cudnn_fp8.attend_quantized


def _torch_varlen(q: Tensor, k: Tensor, v: Tensor, lengths: Varlen) -> tuple[Tensor, Tensor]:
    varlen, _ = load("torch.nn.attention.varlen")
    out, lse = varlen.varlen_attn(q, k, v, *lengths, return_aux=varlen.AuxRequest(lse=True))
    # PyTorch documents [tokens, heads]; its flash kernels give [heads, tokens].
    return out, lse if lse.shape == (q.shape[1], q.shape[0]) else lse.transpose(0, 1)


def _flash2_varlen(q: Tensor, k: Tensor, v: Tensor, lengths: Varlen) -> tuple[Tensor, Tensor]:
    out, lse, _ = load("flash_attn")[0].flash_attn_varlen_func(q, k, v, *lengths, return_attn_probs=True)
    return out, lse


_TORCH_VARLEN = opaque_varlen("torch", _torch_varlen)
_TO_128 = range(8, 129, 8)
_ANYWHERE = Requirement(None, dtypes=None, head_dims=None)
_FLASH4 = Requirement((9, 0), "flash_attn.cute", "flash_attn_func", head_dims=_TO_128, backward=False)
_FLASH3 = Requirement((9, 0), "flash_attn_interface", "flash_attn_func")
_FLASH2 = Requirement((8, 0), "flash_attn", "flash_attn_func")
_XFORMERS = Requirement((7, 0), "xformers.ops", "memory_efficient_attention", dtypes=(*HALF, torch.float32))
_CUDNN_FP8 = Requirement((9, 0), "cudnn", "pygraph", exactly=True, triton=True, head_dims=_TO_128, backward=False)
_SAGE = Requirement((8, 0), "sageattention", "sageattn", head_dims=_TO_128, backward=False)


def _backend(name: str, summary: str, needs: Requirement, attend: Attend, **rest: Any) -> Backend:
    return Backend(name, summary, needs, opaque(name, attend), **rest)


# Fastest first: `auto` takes the first exact one that can run.
BACKENDS: tuple[Backend, ...] = (
    _backend("flash4", "FlashAttention-4 (flash-attn-4, CuTe DSL; Hopper and Blackwell)", _FLASH4, _packaged(_FLASH4)),
    _backend("flash3", "FlashAttention-3 (flash_attn_interface; Hopper)", _FLASH3, _packaged(_FLASH3)),
    _backend(
        "cudnn",
        "cuDNN through torch SDPA",
        Requirement(head_dims=_TO_128),
        _sdpa_by(SDPBackend.CUDNN_ATTENTION),
        varlen=_TORCH_VARLEN,
    ),
    _backend(
        "flash2",
        "FlashAttention-2 (flash-attn)",
        _FLASH2,
        _packaged(_FLASH2),
        varlen=opaque_varlen("flash2", _flash2_varlen),
    ),
    _backend(
        "sdpa-flash",
        "FlashAttention-2 through torch SDPA",
        Requirement(),
        _sdpa_by(SDPBackend.FLASH_ATTENTION),
        varlen=_TORCH_VARLEN,
    ),
    _backend("xformers", "xformers memory-efficient attention", _XFORMERS, _packaged(_XFORMERS)),
    # PyTorch's own operator, which graphs hold as it is.
    Backend("sdpa", "torch SDPA, its own choice of kernel", _ANYWHERE, _sdpa),
    _backend(
        "sdpa-math",
        "torch SDPA by plain matrix products (slow; for comparison)",
        _ANYWHERE,
        _sdpa_by(SDPBackend.MATH),
    ),
    _backend(
        "cudnn-fp8",
        "cuDNN in fp8 (nvidia-cudnn-frontend; Hopper; lossy; only by name)",
        _CUDNN_FP8,
        _cudnn_fp8,
        exact=False,
        quantized=_cudnn_fp8_quantized,
    ),
    _backend(
        "sage",
        "SageAttention (8-bit, lossy; only by name)",
        _SAGE,
        _packaged(_SAGE, tensor_layout="NHD", is_causal=False),
        exact=False,
    ),
)

_BY_NAME = {backend.name: backend for backend in BACKENDS}
_ATTEND = {backend.attend for backend in BACKENDS} | {attend_foreign}


def is_known(attend: Attend) -> bool:
    """Whether this is the kernel of a backend, and so can stand in a compiled graph."""
    return attend in _ATTEND


def is_exact(name: str) -> bool:
    """Whether the backend `name` or `auto` computes what the definition says, up to rounding."""
    return name not in _BY_NAME or _BY_NAME[name].exact


def names() -> tuple[str, ...]:
    """All backend names, `auto` first."""
    return ("auto", *_BY_NAME)


def listed() -> tuple[str, ...]:
    """`auto` and the backends to offer here. Packages are looked for but not imported, which may take seconds."""
    return ("auto", *(name for name, backend in _BY_NAME.items() if not backend.needs.absent()))


def import_ahead(device: torch.device | str = "cuda", name: str = "auto") -> threading.Thread | None:
    """Import the package that attention on `device` will need in a background thread, which is returned, or None.

    Reading a checkpoint then hides the seconds that the import takes.
    """
    if torch.device(device).type != "cuda":
        return None
    wanted = (b for b in BACKENDS if b.name == name or (name == "auto" and b.exact))
    backend = next((b for b in wanted if not b.needs.absent()), None)
    if backend is None or not backend.needs.module:
        return None
    thread = threading.Thread(target=load, args=(backend.needs.module,), name="longcat import")
    thread.start()
    return thread


def report(inputs: Inputs | None = None) -> list[tuple[str, bool, str]]:
    """(name, whether it can run on this machine, its summary or why it cannot) for every backend.

    inputs: those that it must take as well; trying kernels takes seconds where they are compiled first.
    """
    rows = []
    for backend in BACKENDS:
        reason = backend.needs.missing() or ("" if inputs is None else backend.why_not(inputs))
        rows.append((backend.name, not reason, reason or backend.summary))
    return rows


def check(name: str) -> None:
    """Raise BackendUnavailable, with a list of the others, unless `name` is `auto` or can run on this machine."""
    if name == "auto":
        return
    reason = _BY_NAME[name].needs.missing() if name in _BY_NAME else ""
    if reason or name not in _BY_NAME:
        found = ", ".join(["auto", *(other for other, runs, _ in report() if runs)])
        what = (
            f"attention backend {name!r} is unavailable ({reason})" if reason else f"unknown attention backend {name!r}"
        )
        raise BackendUnavailable(f"{what}; this machine has: {found}")


class Kernels(NamedTuple):
    """The attention kernels of one forward pass, chosen outside the blocks so that graphs hold no look-ups.

    attend: self-attention. varlen: texts of different lengths in one batch; None: SDPA with a bias. text: text with all
    its padding written out, which is `exact` without a bias; None: padding stays folded, under a bias. quantized:
    self-attention with an 8-bit output, where the backend has it. frames: of frames to keys of their own, where tokens
    may be in another order than that of frames; None: they are not. whole: brings rows [B, N, ..] of frames, of
    which this rank has shares, together; None: it has them all.
    """

    attend: Attend
    varlen: AttendVarlen | None
    text: Attend | None = None
    quantized: AttendQuantized | None = None
    frames: AttendFrames | None = None
    whole: Callable[[Tensor], Tensor] | None = None


# Tokens of a trial, and the relative error that is accepted: of 16-bit kernels, and of 8-bit ones.
_TRIAL_TOKENS, _TOLERANCES = 256, (0.02, 0.25)


@cache
def tried(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Why the kernel of `name` does not work on `device`, tried on a few tokens, or ""."""
    # A generator of its own: the device's belongs to the user.
    generator = torch.Generator(device).manual_seed(0)
    shape = 3, 1, _TRIAL_TOKENS, 2, head_dim
    q, k, v = torch.randn(shape, generator=generator, device=device).to(dtype)
    backend = _BY_NAME[name]

    def run() -> tuple[Tensor, Tensor]:
        out = backend.attend(q, k, v).float()
        return out.cpu(), _sdpa(q.float().cpu(), k.float().cpu(), v.float().cpu())

    return trial(run, _TOLERANCES[not backend.exact])


def why_not(name: str, inputs: Inputs) -> str:
    """Why the backend `name` cannot run for such inputs, or ""."""
    return _BY_NAME[name].why_not(inputs)


def resolve(name: str, inputs: Inputs) -> Backend:
    """The backend `name` for such inputs; `auto`: the first exact one that can run.

    Raises BackendUnavailable if a backend chosen by name cannot run: a silent substitute would falsify a measurement.
    """
    if name == "auto":
        return next(backend for backend in BACKENDS if backend.exact and not backend.why_not(inputs))
    check(name)
    backend = _BY_NAME[name]
    if reason := backend.why_not(inputs):
        raise BackendUnavailable(f"attention backend {name!r} cannot run here: {reason}; choose 'auto' or 'sdpa'")
    return backend


def resolve_kernels(name: str, inputs: Inputs) -> Kernels:
    """Kernels for self-attention, for texts of different lengths and for text with its padding written out.

    A varlen kernel must also return the log-sum-exp, which has no gradient: training gets None. `text` is None in
    training and in fp32, where a bias costs little and is exact; in half precision the ln(count) of folded padding is
    rounded by up to 1.6 %, and kernels that take a bias are slow.
    """
    backend = resolve(name, inputs)
    if inputs.grad:
        return Kernels(backend.attend, None)
    varlen = None
    for other in BACKENDS if name == "auto" else (backend,):
        if other.varlen and other.exact and not other.why_not(inputs):
            # Importing it imports PyTorch's compiler, which takes seconds; older versions of PyTorch lack it.
            if other.varlen is _TORCH_VARLEN and find_spec("torch.nn.attention.varlen") is None:
                continue
            varlen = other.varlen
            break
    text = None
    if inputs.dtype in HALF:
        # cuDNN measured fastest over the few keys of a text.
        cudnn = _BY_NAME["cudnn"]
        exact = backend if backend.exact else resolve("auto", inputs)
        text = (cudnn if name == "auto" and not cudnn.why_not(inputs) else exact).attend
    return Kernels(backend.attend, varlen, text, backend.quantized and backend.quantized())
