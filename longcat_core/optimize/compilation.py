"""Regional compile: one graph of a function over tensors serves all its calls, with few recompilations.

One graph of a transformer block serves all blocks, steps and prompts; nothing here depends on the network.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
from collections.abc import Callable, Hashable, Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

NOTICE = "compiling {}; this takes about a minute the first time"

# Batches with and without guidance, conditioning frames with and without a cache, sizes, precisions: more graphs than
# PyTorch's default of 8.
GRAPHS = 64


def compiles(sentence: str) -> bool:
    """Whether an announced sentence says that a call is about to compile."""
    return sentence.startswith(NOTICE.partition(" ")[0])


def why_not(device: torch.device) -> str:
    """Why torch.compile cannot work for tensors on `device`, or ""."""
    if device.type == "cuda":
        return "" if importlib.util.find_spec("triton") else "the triton package is not installed"
    if device.type != "cpu":
        return f"it is not supported on {device.type}"
    return "" if any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl")) else "there is no C++ compiler"


class Regional:
    """`function` under torch.compile, with at most two graphs for each kind of input.

    The first size of a kind gets a graph of its own, which is the fastest; all later sizes share one with symbolic
    sizes. PyTorch would guess from what changes, one dimension after another; here the caller names the dimensions.
    PyTorch keeps the graphs for the process, and its compile cache on disk keeps their code.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        what: str,
        backend: Any = "inductor",
        *,
        slow: bool = True,
        compiler: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
        copied: bool = False,
        symbolic: bool = False,
    ) -> None:
        """what: the function in words, for notices; slow: whether compiling it is worth a notice. compiler: compiles
        the function in place of torch.compile with `backend`. copied: whether results are copied, because the next call
        overwrites them. symbolic: whether the first size shares the graph of all others, as with `dynamic=True`.
        """
        self.function, self.what, self.backend, self.slow = function, what, backend, slow
        self.compiler, self.copied, self.symbolic = compiler, copied, symbolic
        self.forget()

    def forget(self) -> None:
        """Forget sizes and failures; torch._dynamo.reset() drops the graphs."""
        self._first: dict[Hashable, Hashable] = {}
        self._announced: set[Hashable] = set()
        self._failed: set[Hashable] = set()
        self._compiled = cache(self._compile)

    def _compile(self, fullgraph: bool) -> Callable[..., Any]:
        if self.compiler is not None:
            return self.compiler(self.function)
        return torch.compile(self.function, backend=self.backend, fullgraph=fullgraph, dynamic=False)

    def __call__(
        self,
        *args: Any,
        kind: Hashable,
        size: Hashable,
        varying: Iterable[tuple[Tensor, tuple[int, ...]]] = (),
        sized: Iterable[tuple[Tensor, tuple[int, ...]]] = (),
        announce: Callable[[str], None],
    ) -> Any:
        """function(*args).

        kind: everything but sizes that a graph depends on; size: that of these inputs. sized: tensors with the
        dimensions that depend on `size`; varying: those that differ between calls of one size, which are symbolic from
        the start. announce: receives a sentence before a call that compiles. If compiling fails, it receives the
        reason, and calls of this kind run uncompiled from then on.
        """
        grad = torch.is_grad_enabled()
        kind = (kind, grad)
        if kind in self._failed:
            return self.function(*args)
        symbolic = self._first.setdefault(kind, size) != size or self.symbolic
        marks = [*varying, *(sized if symbolic else ())]
        for tensor, dims in marks:
            torch._dynamo.maybe_mark_dynamic(tensor, list(dims))
        if self.slow and (kind, symbolic) not in self._announced:
            self._announced.add((kind, symbolic))
            announce(NOTICE.format(self.what))
        try:
            with _settings(bool(marks)):
                # With gradients the compiler looks into kernels, where it may have to break the graph.
                out = self._compiled(not grad)(*args)
                return out.clone() if self.copied else out
        except torch._dynamo.exc.TorchDynamoException as error:
            self._failed.add(kind)
            reason = " ".join(str(error).split())[:200]
            announce(f"{self.what} does not compile here ({reason}); it runs uncompiled")
            return self.function(*args)


@contextlib.contextmanager
def _settings(symbolic: bool) -> Iterator[None]:
    """The compiler's settings that every call needs, whoever chose its backend."""
    from torch._inductor import config as inductor

    dynamo: dict[str, Any] = {"assume_static_by_default": True}
    # PyTorch 2.11 fails in this analysis on symbolic sizes, which do not profit from it.
    off = symbolic and hasattr(inductor.triton, "coalesce_tiling_analysis")
    tiling = {"triton.coalesce_tiling_analysis": False} if off else {}
    with graph_limit(), torch._dynamo.config.patch(**dynamo, automatic_dynamic_shapes=False), inductor.patch(tiling):
        yield


def graph_limit() -> contextlib.AbstractContextManager[None]:
    """Allow GRAPHS graphs of a function inside the `with` block."""
    config = torch._dynamo.config
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    limit: contextlib.AbstractContextManager[None] = config.patch(**{name: max(GRAPHS, getattr(config, name))})
    return limit
