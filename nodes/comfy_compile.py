"""torch.compile as other nodes set it on a MODEL: applied to one block, whose graph serves all of them.

Such a node puts a compiled module in the place of the network, or of each block. Compiled as a whole, the network is a
graph of all its blocks written out, which takes minutes; compiled one by one, each block is a graph of its own. So the
modules are put back while the network runs, and a block is compiled with the settings found in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from ..longcat_core.model.block import run_block
from ..longcat_core.optimize.compilation import Regional
from ..longcat_core.optimize.compiled_blocks import WHAT, Compilers

# What torch.compile was given, in a compiled module; calling it with a function compiles that.
Settings = Callable[[Callable[..., Any]], Callable[..., Any]]
# Sets of settings whose sizes are remembered; PyTorch keeps the graphs.
REMEMBERED = 16
# In order of use. Nodes make equal settings again at each execution, which share graphs.
_blocks: list[tuple[Settings, Regional]] = []


def original(module: Any) -> torch.nn.Module:
    """The module that torch.compile was called with, or the module itself."""
    while "_orig_mod" in getattr(module, "_modules", ()):
        module = module._orig_mod
    return module


def settings_of(module: Any) -> Settings | None:
    """The settings of a compiled module; None for any other."""
    found = getattr(module, "dynamo_ctx", None) if original(module) is not module else None
    return found if callable(found) else None


class Own(NamedTuple):
    """A MODEL's network and its blocks. Those of a deep copy, while compiled modules lead to the first MODEL's."""

    network: Any
    blocks: tuple[torch.nn.Module, ...]


@contextmanager
def without_compiled_modules(model: torch.nn.Module, own: Own) -> Iterator[Compilers | None]:
    """Inside the `with` block, its own modules stand in the place of compiled ones in `model`.

    Gives what compiles a block as the compiled modules would have, or None if there were none.
    """
    whole = model.diffusion_model
    network = whole if original(whole) is whole else own.network
    kept = {i: block for i, block in enumerate(network.blocks) if original(block) is not block}
    found = {own.blocks[i]: settings for i, block in kept.items() if (settings := settings_of(block))}
    chosen = {block: compiled_block(settings) for block, settings in found.items()}
    settings = settings_of(whole)
    every = None if settings is None else compiled_block(settings)
    try:
        model.diffusion_model = network
        for i in kept:
            network.blocks[i] = own.blocks[i]
        yield None if every is None and not chosen else lambda block: chosen.get(block, every)
    finally:
        model.diffusion_model = whole
        for i, block in kept.items():
            network.blocks[i] = block


def compiled_block(settings: Settings) -> Regional:
    """A block compiled with these settings; the same object for equal settings."""
    found = next((pair for pair in _blocks if _equal(pair[0], settings)), None)
    if found is None:
        # PyTorch 2.13 compiles again for sizes that are marked symbolic later, and 2.11 does not.
        symbolic, copied = getattr(settings, "_dynamic", None) is True, _records(_chain(settings)[-1])
        regional = Regional(run_block, WHAT, compiler=settings, copied=copied, symbolic=symbolic)
        found = settings, regional
    else:
        _blocks.remove(found)
    _blocks.append(found)
    del _blocks[:-REMEMBERED]
    return found[1]


def _chain(settings: Any) -> list[Any]:
    """The compiler's callbacks from the outermost to the backend, under the names that versions of PyTorch use."""
    chain = [settings.callback] if hasattr(settings, "callback") else [settings]
    while True:
        link = chain[-1]
        inner = getattr(link, "_torchdynamo_orig_backend", getattr(link, "_torchdynamo_orig_callable", None))
        if inner is None:
            return chain
        chain.append(inner)


def _equal(one: Settings, other: Settings) -> bool:
    links = _chain(one), _chain(other)
    # The types tell whether a graph may break.
    types = [[type(link) for link in chain] for chain in links]
    named = [
        [getattr(settings, name, None) for name in ("_dynamic", "fullgraph", "error_on_graph_break")]
        for settings in (one, other)
    ]
    return types[0] == types[1] and named[0] == named[1] and links[0][-1] == links[1][-1]


def _records(backend: Any) -> bool:
    """Whether a backend records CUDA graphs, whose output the next call overwrites."""
    config = getattr(backend, "config", None)
    recorded = isinstance(config, dict) and config.get("triton.cudagraphs", False)
    return bool(recorded) or getattr(backend, "compiler_name", "") == "cudagraphs"
