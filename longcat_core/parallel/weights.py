"""The weights of rank 0's network on their way to the mirrors of the other ranks."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..model.config import ModelConfig
from ..optimize.adapters import Adapted, adapt, rank_of, release
from ..optimize.optimized import OptimizedTransformer
from ..optimize.quantization import Fp8Linear
from ..optimize.shared_memory import Place, can_share, shared
from ..optimize.stamps import stamp, writes
from ..optimize.streaming import BlockStream, Offloaded


class Layer(NamedTuple):
    """How a layer differs from a plain one. dtype: of an 8-bit layer's output, or None; rank, lora: of its adapter."""

    dtype: torch.dtype | None
    rank: int
    lora: torch.dtype | None


@dataclass(frozen=True)
class Weights:
    """Layers that have changed, and parameters by name. written: names of parameters in memory that the ranks have in
    common, to which rank 0 has written."""

    layers: dict[str, Layer]
    parameters: dict[str, Tensor]
    written: tuple[str, ...] = ()


class Common(NamedTuple):
    """A streamed block whose weights lie in memory that the ranks of one machine can map: where, and each parameter's
    name in the block, dtype, shape, and place in the memory in bytes."""

    place: Place
    parameters: tuple[tuple[str, torch.dtype, torch.Size, tuple[int, int]], ...]


def in_common(stream: BlockStream, blocks: Iterable[int]) -> dict[int, Common]:
    """Move these streamed blocks into such memory, unless they are there already; {} on systems without it."""
    found = {}
    for i in blocks if can_share() else ():
        block = stream.offloaded(i)
        if block not in _PLACES:
            buffer, place = shared(block.nbytes)
            block.move(buffer)
            _PLACES[block] = place
        parameters = zip(block.named, block.parameters, block.places, strict=True)
        found[i] = Common(_PLACES[block], tuple((name, p.dtype, p.shape, at) for (name, _), p, at in parameters))
    return found


_PLACES: weakref.WeakKeyDictionary[Offloaded, Place] = weakref.WeakKeyDictionary()


def agreed(works: bool, group: dist.ProcessGroup | None = None) -> bool:
    """Whether something works on all ranks, or on those of a group; all of them call it."""
    all_do = torch.tensor([works], dtype=torch.int32)
    dist.all_reduce(all_do, dist.ReduceOp.MIN, group)
    return bool(all_do)


class Source(Protocol):
    """The weights of rank 0's network, as the others need them."""

    @property
    def config(self) -> ModelConfig:
        """The network's shape."""

    @property
    def dtype(self) -> torch.dtype:
        """Of activations."""

    def layers(self) -> dict[str, Layer]:
        """Layers that are not plain, by name."""

    def versions(self) -> dict[str, Hashable]:
        """What changes whenever a parameter does, by its name."""

    def stamp(self) -> object:
        """What changes whenever one of these does, for every pass; after a change both are asked for."""

    def weights(self, names: Sequence[str]) -> dict[str, Tensor]:
        """These parameters, without gradients, wherever they lie."""


class OwnWeights:
    """Of a network that holds its weights itself."""

    def __init__(self, network: OptimizedTransformer) -> None:
        self.network = network
        # Held, because a new tensor in the place of a freed one would have its id.
        self._now: dict[str, nn.Parameter] = {}

    @property
    def config(self) -> ModelConfig:
        return self.network.config

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    def layers(self) -> dict[str, Layer]:
        found = {}
        for name, module in self.network.named_modules():
            if isinstance(module, (Fp8Linear, Adapted)):
                lora = module.lora_down.dtype if isinstance(module, Adapted) else None
                found[name] = Layer(module.dtype if isinstance(module, Fp8Linear) else None, rank_of(module), lora)
        return found

    def versions(self) -> dict[str, Hashable]:
        self._now = dict(self.network.named_parameters())
        return {name: (id(p), writes(p)) for name, p in self._now.items()}

    def stamp(self) -> object:
        return stamp([self.network])[0]

    def weights(self, names: Sequence[str]) -> dict[str, Tensor]:
        return {name: self._now[name].detach() for name in names}


def by_blocks(names: Sequence[str]) -> Iterator[list[str]]:
    """Names of parameters block by block, those outside blocks first."""
    pieces: dict[str, list[str]] = {"": []}
    for name in names:
        parts = name.split(".")
        pieces.setdefault(parts[1] if parts[0] == "blocks" else "", []).append(name)
    yield from (piece for piece in pieces.values() if piece)


def form_layer(network: OptimizedTransformer, name: str, layer: Layer) -> None:
    """Make the layer of this name what `layer` says, without weights where it changes."""
    module: Any = network.get_submodule(name)
    release(module)
    if layer.dtype is not None and not isinstance(module, Fp8Linear):
        weight = torch.empty(module.weight.shape, dtype=torch.float8_e4m3fn, device="meta")
        scale = torch.empty(len(weight), 1, device="meta")
        bias = None if module.bias is None else torch.empty(len(weight), dtype=module.bias.dtype, device="meta")
        module = Fp8Linear(weight, scale, bias, layer.dtype)
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, module)
    if layer.rank:
        adapt(module, layer.rank, layer.lora, torch.device("meta"))
