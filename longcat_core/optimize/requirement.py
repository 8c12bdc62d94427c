"""Whether a kernel can run on this machine and with these inputs, and if not, why.

Every kernel states a `Requirement`. Answers are sentences, "" where the kernel can run. `trial` runs a kernel to learn
what no version number says: packages are built for some GPUs and compile their kernels at first use.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec, module_from_spec
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
# Modules that need only parts of another package, and which module of it has to be imported first. Importing all of
# quack imports PyTorch's compiler, which takes longer than all of FlashAttention-4.
_PARTS = {"flash_attn.cute": ("quack", "quack.dsl")}
# Names of packages that differ from their modules' names.
_PACKAGES = {"cudnn": "nvidia-cudnn-frontend", "cutlass": "nvidia-cutlass-dsl"}


class Inputs(NamedTuple):
    """What a kernel is given: device and dtype of its tensors, their head_dim, and whether gradients flow through."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    grad: bool

    @classmethod
    def of(cls, x: Tensor, head_dim: int | None = None) -> Inputs:
        """Inputs like x [.., C] with heads of `head_dim` channels (None: C)."""
        return cls(x.device, x.dtype, head_dim or x.shape[-1], torch.is_grad_enabled() and x.requires_grad)


@dataclass(frozen=True)
class Requirement:
    """What a kernel needs.

    capability: the least compute capability, or with `exactly` the only one; None: it runs without CUDA. module: of an
    optional package, which must have `attribute` (a dotted name). triton: Triton is needed. dtypes, head_dims: those
    that the kernel takes; None: any. backward: whether it has a backward pass.
    """

    capability: tuple[int, int] | None = (8, 0)
    module: str = ""
    attribute: str = ""
    exactly: bool = False
    triton: bool = False
    dtypes: tuple[torch.dtype, ...] | None = HALF
    head_dims: Collection[int] | None = range(8, 257, 8)
    backward: bool = True

    def missing(self) -> str:
        """Why the kernel cannot run on this machine, or ""; imports the package."""
        return _missing(self)

    def absent(self) -> bool:
        """Whether the kernel certainly cannot run on this machine; the package is not imported."""
        return bool(self._without_package()) or bool(self.module and not find_spec(self.module.split(".")[0]))

    def refuses(self, inputs: Inputs) -> str:
        """Why the kernel does not take such inputs, or ""."""
        if self.capability is not None and inputs.device.type != "cuda":
            return f"it runs on CUDA, the tensors are on {inputs.device.type}"
        if self.dtypes is not None and inputs.dtype not in self.dtypes:
            return f"it takes {' or '.join(map(_name, self.dtypes))}, not {_name(inputs.dtype)}"
        if self.head_dims is not None and inputs.head_dim not in self.head_dims:
            dims = self.head_dims
            taken = f"up to {dims[-1]} in steps of {dims.step}" if isinstance(dims, range) else f"{dims}".strip("()")
            return f"it takes head dims {taken}, not {inputs.head_dim}"
        return "it has no backward pass" if inputs.grad and not self.backward else ""

    def why_not(self, inputs: Inputs) -> str:
        """Why the kernel cannot run on this machine with such inputs, or ""."""
        return self.refuses(inputs) or self.missing()

    def _without_package(self) -> str:
        reason = needs_cuda(self.capability, self.exactly) if self.capability else ""
        return reason or ("the triton package is not installed" if self.triton and not find_spec("triton") else "")


@cache
def _missing(requirement: Requirement) -> str:
    if not requirement.module:
        return requirement._without_package()
    module, reason = load(requirement.module)
    if reason:
        return reason
    try:
        attrgetter(requirement.attribute)(module)
    except AttributeError:
        return f"{requirement.module} has no {requirement.attribute}: its version does not fit"
    return requirement._without_package()


@cache
def load(module: str) -> tuple[Any, str]:
    """An optional module and "", or None and why it does not load; a broken installation must not stop the program."""
    try:
        return _imported(module), ""
    except ModuleNotFoundError as error:
        package = module.split(".")[0]
        missing = (error.name or module).split(".")[0]
        if missing == package and find_spec(package) is not None:
            return None, f"{_PACKAGES.get(package, package)} has no {module}: its version does not fit"
        return None, f"package {_PACKAGES.get(missing, missing)} is not installed"
    except Exception as error:  # an ABI mismatch raises anything from OSError to AttributeError
        return None, f"{module} does not load: {type(error).__name__}: {error}".splitlines()[0]


def _imported(module: str) -> Any:
    """The module; a package that it needs parts of starts when somebody asks for more of that."""
    package, start = _PARTS.get(module, ("", ""))
    spec = find_spec(package) if package and package not in sys.modules else None
    if spec is None or spec.loader is None:
        return importlib.import_module(module)
    sys.modules[package] = bare = module_from_spec(spec)
    try:
        importlib.import_module(start)
        found = importlib.import_module(module)
    except Exception:  # another version, which needs more
        for name in [each for each in sys.modules if each == package or each.startswith(f"{package}.")]:
            del sys.modules[name]
        return importlib.import_module(module)
    loader = spec.loader

    def rest(name: str) -> Any:
        del vars(bare)["__getattr__"]
        loader.exec_module(bare)
        return getattr(bare, name)

    vars(bare)["__getattr__"] = rest
    return found


def needs_cuda(capability: tuple[int, int], exactly: bool = False) -> str:
    """Why this machine's GPU does not have the compute capability, or ""."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    have = torch.cuda.get_device_capability()
    if have == capability or (have > capability and not exactly):
        return ""
    verb = "works only on" if exactly else "needs"
    return f"{verb} compute capability {capability[0]}.{capability[1]}, this GPU has {have[0]}.{have[1]}"


def trial(run: Callable[[], tuple[Tensor, Tensor]], tolerance: float) -> str:
    """Why a kernel does not work, or "". run: returns its output and the right one, both fp32 on one device.

    tolerance: relative error of the output that is accepted.
    """
    try:
        with torch.no_grad():
            out, expected = run()
            distance = ((out - expected).norm() / expected.norm()).item()
    except torch.OutOfMemoryError:
        # This says nothing about the kernel.
        raise
    except Exception as error:  # compilers, loaders and launches raise anything
        return f"it fails on this GPU: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
    # Written so that NaN is wrong too.
    return "" if distance <= tolerance else f"its output is wrong on this GPU (error {distance:.2g})"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
