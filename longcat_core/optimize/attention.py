"""Attention kernels under one signature, chosen by name or `auto`; each says why it cannot be used.

A kernel takes q [B, Nq, H, D], k and v [B, Nk, H, D] and returns [B, Nq, H, D]: no mask, no causality, softmax scale
D^-0.5. Optional packages are looked for when a backend is first asked for, never when this module is imported.

Inside a compiled graph kernels are operators of their own; see `operators`.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..errors import BackendUnavailable
from .kernels import cudnn_fp8 as fp8_attention
from .kernels.elementwise import Quantised
from .kernels.elementwise import missing as missing_triton
from .operators import Attend, AttendVarlen, Varlen, attend_foreign, opaque, opaque_varlen

HALF = (torch.bfloat16, torch.float16)


class Inputs(NamedTuple):
    """What a kernel must cope with: where and in what dtype q, k, v are, and whether gradients flow through them."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    grad: bool


@dataclass(frozen=True)
class Backend:
    """One attention kernel.

    `missing` answers "" where the kernel can run in this installation, otherwise the reason. `exact` is False for
    kernels that quantise their inputs: `auto` never takes those. `dtypes` None means any. `quantised`: the same with an
    output of 8 bits, [B, Nq, C], for a product that takes it so.
    """

    name: str
    summary: str
    missing: Callable[[], str]
    attend: Attend
    varlen: AttendVarlen | None = None
    exact: bool = True
    cuda_only: bool = True
    dtypes: tuple[torch.dtype, ...] | None = HALF
    max_head_dim: int = 256
    needs_no_grad: bool = False
    quantised: Callable[[Tensor, Tensor, Tensor], Quantised] | None = None

    def refuses(self, inputs: Inputs) -> str:
        """Why this kernel cannot take such inputs, or ""."""
        if self.cuda_only and inputs.device.type != "cuda":
            return f"it runs on CUDA, the tensors are on {inputs.device.type}"
        if self.dtypes is not None and inputs.dtype not in self.dtypes:
            return f"it takes {' or '.join(str(d).removeprefix('torch.') for d in self.dtypes)}, not {inputs.dtype}"
        if inputs.head_dim > self.max_head_dim or inputs.head_dim % 8:
            return f"it takes head dims up to {self.max_head_dim} in steps of 8, not {inputs.head_dim}"
        if self.needs_no_grad and inputs.grad:
            return "it has no backward pass"
        return ""


# Names of packages that are not their modules'.
_PACKAGES = {"cudnn": "nvidia-cudnn-frontend"}


@cache
def _load(module: str) -> tuple[Any, str]:
    """An optional module, or None and the reason; a broken installation must not take the program down."""
    try:
        return importlib.import_module(module), ""
    except ModuleNotFoundError:
        package = module.split(".")[0]
        return None, f"package {_PACKAGES.get(package, package)} is not installed"
    except Exception as error:  # an ABI mismatch raises anything from OSError to AttributeError
        return None, f"{module} does not load: {type(error).__name__}: {error}".splitlines()[0]


@dataclass(frozen=True)
class _Needs:
    """`missing` of a backend that needs an optional package and a GPU.

    alone: on GPUs of this capability and no other. triton: there are kernels of our own around it.
    """

    module: str
    attribute: str
    capability: tuple[int, int] = (8, 0)
    alone: bool = False
    triton: bool = False

    def __call__(self) -> str:
        loaded, reason = _load(self.module)
        if loaded is None:
            return reason
        if not hasattr(loaded, self.attribute):
            return f"{self.module} has no {self.attribute}: its version does not fit"
        return _needs_cuda(self.capability, self.alone) or (missing_triton() if self.triton else "")

    def absent(self) -> bool:
        """Whether it is sure to be missing, told without importing the package."""
        return bool(_needs_cuda(self.capability, self.alone)) or find_spec(self.module.split(".")[0]) is None


def _needs_cuda(capability: tuple[int, int], alone: bool = False) -> str:
    if not torch.cuda.is_available():
        return "no CUDA device"
    have = torch.cuda.get_device_capability()
    if have == capability or (have > capability and not alone):
        return ""
    verb = "is known to work on" if alone else "needs"
    return f"{verb} compute capability {capability[0]}.{capability[1]}, this GPU has {have[0]}.{have[1]}"


def _sdpa(kernel: SDPBackend) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(kernel):
            return _any_sdpa(q, k, v)

    return attend


def _any_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _torch_varlen(q: Tensor, k: Tensor, v: Tensor, lengths: Varlen) -> tuple[Tensor, Tensor]:
    varlen, _ = _load("torch.nn.attention.varlen")
    out, lse = varlen.varlen_attn(q, k, v, *lengths, return_aux=varlen.AuxRequest(lse=True))
    # PyTorch documents [tokens, heads]; its flash kernels give [heads, tokens].
    return out, lse if lse.shape == (q.shape[1], q.shape[0]) else lse.transpose(0, 1)


def _flash2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _load("flash_attn")[0].flash_attn_func(q, k, v)


def _flash2_varlen(q: Tensor, k: Tensor, v: Tensor, lengths: Varlen) -> tuple[Tensor, Tensor]:
    out, lse, _ = _load("flash_attn")[0].flash_attn_varlen_func(q, k, v, *lengths, return_attn_probs=True)
    return out, lse


def _first(result: Any) -> Tensor:
    # FlashAttention 3 and 4 return the output alone or (output, lse), depending on their version.
    return result[0] if isinstance(result, tuple) else result


def _flash3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _first(_load("flash_attn_interface")[0].flash_attn_func(q, k, v))


def _flash4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _first(_load("flash_attn.cute")[0].flash_attn_func(q, k, v))


def _sage(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _load("sageattention")[0].sageattn(q, k, v, tensor_layout="NHD", is_causal=False)


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _load("xformers.ops")[0].memory_efficient_attention(q, k, v)


_TORCH_VARLEN = opaque_varlen("torch", _torch_varlen)

# Fastest first: `auto` takes the first exact one that is there and accepts the inputs.
BACKENDS: tuple[Backend, ...] = (
    Backend(
        "flash4",
        "FlashAttention-4 (flash-attn-4, CuTe DSL; Hopper and Blackwell)",
        _Needs("flash_attn.cute", "flash_attn_func", (9, 0)),
        opaque("flash4", _flash4),
        max_head_dim=128,
        needs_no_grad=True,
    ),
    Backend(
        "flash3",
        "FlashAttention-3 (flash_attn_interface; Hopper)",
        _Needs("flash_attn_interface", "flash_attn_func", (9, 0)),
        opaque("flash3", _flash3),
    ),
    Backend(
        "cudnn",
        "cuDNN through torch SDPA",
        lambda: _needs_cuda((8, 0)),
        opaque("cudnn", _sdpa(SDPBackend.CUDNN_ATTENTION)),
        varlen=_TORCH_VARLEN,
        max_head_dim=128,
    ),
    Backend(
        "flash2",
        "FlashAttention-2 (flash-attn)",
        _Needs("flash_attn", "flash_attn_func"),
        opaque("flash2", _flash2),
        varlen=opaque_varlen("flash2", _flash2_varlen),
    ),
    Backend(
        "sdpa-flash",
        "FlashAttention-2 through torch SDPA",
        lambda: _needs_cuda((8, 0)),
        opaque("sdpa-flash", _sdpa(SDPBackend.FLASH_ATTENTION)),
        varlen=_TORCH_VARLEN,
    ),
    Backend(
        "xformers",
        "xformers memory-efficient attention",
        _Needs("xformers.ops", "memory_efficient_attention", (7, 0)),
        opaque("xformers", _xformers),
        dtypes=(*HALF, torch.float32),
    ),
    Backend(
        "sdpa",
        "torch SDPA, its own choice of kernel",
        lambda: "",
        _any_sdpa,
        cuda_only=False,
        dtypes=None,
        max_head_dim=1 << 16,
    ),
    Backend(
        "sdpa-math",
        "torch SDPA by plain matrix products (slow; for comparison)",
        lambda: "",
        opaque("sdpa-math", _sdpa(SDPBackend.MATH)),
        cuda_only=False,
        dtypes=None,
        max_head_dim=1 << 16,
    ),
    Backend(
        "cudnn-fp8",
        "cuDNN in fp8 (nvidia-cudnn-frontend; Hopper; lossy; only by name)",
        _Needs("cudnn", "pygraph", (9, 0), alone=True, triton=True),
        opaque("cudnn-fp8", fp8_attention.attend),
        exact=False,
        max_head_dim=128,
        needs_no_grad=True,
        quantised=fp8_attention.attend_quantised,
    ),
    Backend(
        "sage",
        "SageAttention (8-bit, lossy; only by name)",
        _Needs("sageattention", "sageattn"),
        opaque("sage", _sage),
        exact=False,
        max_head_dim=128,
        needs_no_grad=True,
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
    """`auto` and the backends to offer here, without importing an optional package: its presence is enough.

    Importing one may take seconds; whether it loads, `check` tells.
    """
    absent = {b.name for b in BACKENDS if (b.missing.absent() if isinstance(b.missing, _Needs) else b.missing())}
    return tuple(name for name in names() if name not in absent)


def import_ahead(device: torch.device | str = "cuda", name: str = "auto") -> threading.Thread | None:
    """Begin to import the package that attention on `device` will ask for; the thread that does it, or None.

    For whoever is about to wait for a disk: the packages take seconds to import, of the first step otherwise.
    """
    if torch.device(device).type != "cuda":
        return None
    for backend in BACKENDS:
        if backend.name != name and not (name == "auto" and backend.exact):
            continue
        if isinstance(backend.missing, _Needs):
            if not backend.missing.absent():
                thread = threading.Thread(target=_load, args=(backend.missing.module,), name="longcat import")
                thread.start()
                return thread
        elif not backend.missing():
            # One of PyTorch's own comes first.
            return None
    return None


def report(trial: Inputs | None = None) -> list[tuple[str, bool, str]]:
    """(name, usable in this installation, what it is or why it is not usable) for every backend.

    trial: inputs that it must work on, too, which takes seconds where kernels are compiled for them.
    """
    rows = []
    for backend in BACKENDS:
        reason = backend.missing() or ("" if trial is None else why_not(backend, trial))
        rows.append((backend.name, not reason, reason or backend.summary))
    return rows


def check(name: str) -> None:
    """Raise BackendUnavailable, with a list of what is there, unless `name` is `auto` or usable here."""
    if name == "auto":
        return
    usable = ", ".join(["auto", *(row[0] for row in report() if row[1])])
    if name not in _BY_NAME:
        raise BackendUnavailable(f"unknown attention backend {name!r}; this machine has: {usable}")
    reason = _BY_NAME[name].missing()
    if reason:
        raise BackendUnavailable(f"attention backend {name!r} is unavailable ({reason}); this machine has: {usable}")


class Kernels(NamedTuple):
    """The kernels of one forward pass: chosen outside the blocks, so that compiled blocks hold no look-ups.

    attend: self-attention. varlen: text of different lengths in one batch; None: through SDPA with a bias. text: text
    with all its padding written out, which is `exact` without a bias; None: padding stays folded, under a bias.
    quantised: self-attention with an output of 8 bits, where the backend has it.
    """

    attend: Attend
    varlen: AttendVarlen | None
    text: Attend | None = None
    quantised: Callable[[Tensor, Tensor, Tensor], Quantised] | None = None


# Tokens of a trial, and how far its output may be from the definition, relative: of 16 bits, and of 8 bits.
_TRIAL_TOKENS, _TOLERANCES = 256, (0.02, 0.25)


def trial(run: Callable[[], tuple[Tensor, Tensor]], tolerance: float) -> str:
    """Why a kernel does not work, or "". run: returns its output and the right one, fp32, in one place."""
    try:
        with torch.no_grad():
            out, wanted = run()
            error = ((out - wanted).norm() / wanted.norm()).item()
    except torch.OutOfMemoryError:
        # Not the kernel's fault, nor for long.
        raise
    except Exception as error:  # of compilers, loaders, launches: anything
        return f"it fails on this GPU: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
    # So written, NaN is wrong too.
    return "" if error <= tolerance else f"its output is wrong on this GPU (error {error:.2g})"


@cache
def fails(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Why the kernel of `name` does not work on `device`, tried on a few tokens, or "".

    Packages are built for some GPUs, compile their kernels at first use, or need another one's version: that shows
    when they run and not before.
    """
    # A generator of its own: the device's is the user's.
    generator = torch.Generator(device).manual_seed(0)
    shape = 3, 1, _TRIAL_TOKENS, 2, head_dim
    q, k, v = torch.randn(shape, generator=generator, device=device).to(dtype)
    backend = _BY_NAME[name]

    def run() -> tuple[Tensor, Tensor]:
        out = backend.attend(q, k, v).float()
        return out.cpu(), _any_sdpa(q.float().cpu(), k.float().cpu(), v.float().cpu())

    return trial(run, _TOLERANCES[not backend.exact])


def why_not(backend: Backend, inputs: Inputs) -> str:
    """Why the kernel cannot serve these inputs, told without or, on CUDA, by a trial, or ""."""
    reason = backend.refuses(inputs)
    if reason or not backend.cuda_only or torch.compiler.is_compiling():
        return reason
    return fails(backend.name, inputs.device, inputs.dtype, inputs.head_dim)


def resolve(name: str, inputs: Inputs) -> Backend:
    """The backend `name` for such inputs.

    `auto` skips kernels that refuse the inputs or fail. Asked for by name, such a kernel raises BackendUnavailable: a
    silent substitute would falsify a measurement.
    """
    if name == "auto":
        return next(b for b in BACKENDS if b.exact and not b.missing() and not why_not(b, inputs))
    check(name)
    backend = _BY_NAME[name]
    reason = why_not(backend, inputs)
    if reason:
        raise BackendUnavailable(f"attention backend {name!r} cannot run here: {reason}; choose 'auto' or 'sdpa'")
    return backend


def resolve_kernels(name: str, inputs: Inputs) -> Kernels:
    """Kernels for self-attention, for text of varying length and for text with its padding written out.

    A varlen kernel must also return the log-sum-exp, which has no gradient: training gets None. So does `text` there,
    and in fp32, where a bias costs little and is exact; in half precision the ln(count) of folded padding is rounded
    by up to 1.6 %, and kernels that take a bias are slow.
    """
    backend = resolve(name, inputs)
    if inputs.grad:
        return Kernels(backend.attend, None)
    varlen = None
    for other in BACKENDS if name == "auto" else (_BY_NAME[name],):
        if other.varlen and other.exact and not other.missing() and not why_not(other, inputs):
            if other.varlen is _TORCH_VARLEN and _load("torch.nn.attention.varlen")[0] is None:
                continue
            varlen = other.varlen
            break
    text = None
    if inputs.dtype in HALF:
        # Over so few keys cuDNN is the fastest where it was measured.
        cudnn = _BY_NAME["cudnn"]
        usable = not cudnn.missing() and not why_not(cudnn, inputs)
        exact = backend if backend.exact else resolve("auto", inputs)
        text = (cudnn if name == "auto" and usable else exact).attend
    return Kernels(backend.attend, varlen, text, backend.quantised)
