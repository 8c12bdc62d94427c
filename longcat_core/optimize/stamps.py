"""What tells, cheaply enough for every pass, whether the weights of layers have changed."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

from torch import Tensor, nn


def stamp(layers: Iterable[nn.Module]) -> tuple[list[Hashable], list[Tensor]]:
    """What changes whenever a parameter in these layers is written to, replaced, added or removed, and the parameters,
    which must be held with it: a new tensor in the place of a freed one would have its id."""
    modules: list[nn.Module | None] = list(layers)
    found: list[Tensor | None] = []
    # Not `parameters()`, which takes several times as long.
    for module in modules:
        if module is not None:
            found += module._parameters.values()
            modules += module._modules.values()
    parameters = [parameter for parameter in found if parameter is not None]
    try:
        versions = [parameter._version for parameter in parameters]
    except RuntimeError:
        versions = [*map(writes, parameters)]
    return [*map(type, modules), *map(id, parameters), *versions], parameters


def writes(parameter: Tensor) -> int:
    """How often a parameter was written to; 0 for one made in inference mode, which is replaced instead."""
    try:
        return parameter._version
    except RuntimeError:
        # `is_inference` does not tell: it is False once such a parameter got other data outside of inference mode.
        return 0
