"""Triton where it is installed; without it kernels are defined all the same, and never launched."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from typing import Any

import torch

if find_spec("triton") is not None:
    import triton
    import triton.language as tl
else:
    triton = tl = None

# Threads that compile side by side: Triton mostly waits for other programs and for libraries that need no Python.
THREADS = min(8, os.cpu_count() or 1)
# What compiles the kernels that the current thread launches, which do not run then; None: they run.
_compiler: ContextVar[Callable[..., None] | None] = ContextVar("compiler", default=None)

if triton is not None:

    class Kernel(triton.JITFunction):
        """A function of Triton's, whose launches `compiling` turns into compilations."""

        def run(self, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            compiler = _compiler.get()
            if compiler is None or warmup:
                return super().run(*args, grid=grid, warmup=warmup, **options)
            compiler(self, *args, **options)
            return None


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`triton.jit`, as a decorator with or without options; without Triton the function stays a plain one."""
    if triton is None:
        return function if function is not None else lambda plain: plain
    if function is None:
        return lambda plain: jit(plain, **options)
    made = triton.jit(function, **options)
    if type(made) is triton.JITFunction:
        made.__class__ = Kernel
    return made


def ready(kernel: Any, *arguments: Any, **options: Any) -> None:
    """Compile a kernel for arguments, dtypes in place of tensors, or load it from Triton's cache; it does not run.

    Also what launches it, which `warmup` leaves to the first launch: Triton up to 3.6 calls a C compiler for it.
    """
    compiled = kernel.warmup(*arguments, grid=(1,), **options)
    if compiled is not None:
        _ = compiled.run


@contextmanager
def compiling(device: torch.device) -> Iterator[Callable[[], Any]]:
    """Compile kernels side by side: in a `with given():` inside this block, those that this thread launches for tensors
    on `device` are compiled by other threads and do not run, so that what they return is undefined. All are ready when
    this block ends. Whoever launches one for good meets what compiling it raises."""
    seen: set[Hashable] = set()
    with ThreadPoolExecutor(THREADS, "longcat-compile") as pool:

        @contextmanager
        def instead() -> Iterator[None]:
            token = _compiler.set(lambda *given, **options: _submit(pool, seen, device, *given, **options))
            try:
                yield
            finally:
                _compiler.reset(token)

        yield instead


def _submit(
    pool: Executor, seen: set[Hashable], device: torch.device, kernel: Any, *given: Any, **options: Any
) -> None:
    arguments = tuple(x.dtype if isinstance(x, torch.Tensor) else x for x in given)
    key = kernel, arguments, tuple(sorted(options.items()))
    if key in seen:
        return
    seen.add(key)

    def work() -> None:
        with torch.cuda.device(device):
            ready(kernel, *arguments, **options)

    pool.submit(work)
