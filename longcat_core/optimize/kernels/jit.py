"""Triton where it is installed; without it kernels are defined all the same, and never launched."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

if find_spec("triton") is not None:
    import triton
    import triton.language as tl
else:
    triton = tl = None


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`triton.jit`, as a decorator with or without options; without Triton the function stays a plain one."""
    if triton is not None:
        return triton.jit(function, **options)
    return function if function is not None else lambda plain: plain
