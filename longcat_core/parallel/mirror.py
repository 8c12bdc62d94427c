"""Ranks that run a network's passes together: rank 0 leads, the others hold mirrors of its network and serve.

Rank 0 is the process that has the task: it reads files, encodes prompts, samples and writes. Before each pass it sends
what the pass needs, and what has changed since the last one: weights, switches, texts. So all tasks run on several GPUs
without knowing it, and only rank 0 reads a checkpoint.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..model.config import ModelConfig
from ..model.kv_cache import KVCache, Reference
from ..model.text import TextTokens
from ..optimize.adapters import NAMES
from ..optimize.attention import is_known
from ..optimize.block_sparse import BlockSparse
from ..optimize.execution import Execution
from ..optimize.optimized import OptimizedTransformer
from ..optimize.quantization import Fp8Linear
from ..optimize.shared_memory import mapped
from ..optimize.sparse.settings import Sparse
from ..optimize.switches import Optimizations
from .division import Division, Text
from .group import Group
from .known import Known, wrong_bytes
from .layout import Measure
from .led_vae import Decode, Encode, ServedVAE
from .shards import Shard, gathering
from .weights import Common, Layer, OwnWeights, Source, Weights, agreed, by_blocks, form_layer, in_common

ALONE = "this MODEL's blocks or attention are patched, and the patches run on one GPU; the others wait"


class Settings(NamedTuple):
    """What decides how an execution runs."""

    optimizations: Optimizations
    block_sparse: BlockSparse | None
    sparse: Sparse | None


@dataclass(frozen=True)
class Build:
    """A network like rank 0's, without weights.

    streamed: blocks whose weights wait in CPU memory. sharded: those whose weights are divided among the ranks.
    """

    config: ModelConfig
    dtype: torch.dtype
    streamed: tuple[int, ...]
    sharded: tuple[int, ...]


class Map(NamedTuple):
    """Take the weights of these streamed blocks from memory that this rank maps; all ranks say whether they can."""

    blocks: dict[int, Common]


@dataclass(frozen=True)
class Evaluate:
    """A pass; see `Execution.evaluate`. Texts and caches have numbers; those in `dropped` are not used any more.

    settings: None for those of the pass before. new_text: the text itself, the first time. fill: of the cache that
    receives keys and values: frames, height and width in latents, batch, and its device. given: other arguments.
    """

    x: Tensor
    timestep: Tensor
    settings: Settings | None
    text: int | None
    new_text: TextTokens | None
    cache: int | None
    fill: tuple[int, int, int, int, str] | None
    given: dict[str, Any]
    dropped: tuple[int, ...]


# --- rank 0 ----------------------------------------------------------------------------------------------------------


# Whose network the workers of a group hold.
_HELD: weakref.WeakKeyDictionary[Group, weakref.ref[Leader]] = weakref.WeakKeyDictionary()


class Leader:
    """Rank 0's side of a network: an `optimize.sharing.Ranks` for its executions."""

    def __init__(
        self,
        group: Group,
        source: Source,
        streamed: tuple[int, ...] = (),
        sharded: tuple[int, ...] = (),
        common: Mapping[int, Common] = MappingProxyType({}),
    ) -> None:
        """Build the network on the other ranks and send its weights.

        streamed: blocks of which the other ranks keep weights in CPU memory. sharded: those of which every rank has a
        share; those of this rank's network must be in its stream's `shards` before the first pass. common: streamed
        blocks whose weights the other ranks may map.
        """
        self.common = dict(common)
        self.group, self.source, self.streamed, self.sharded = group, source, streamed, sharded
        self._texts: dict[int, Text] = {}
        self._caches: dict[int, int] = {}
        self._dropped: list[int] = []
        self._count = 0
        with group.working():
            self._build()

    def _build(self) -> None:
        """Let the others hold this network, in place of another one."""
        self._texts, self._caches, self._dropped = {}, {}, []
        self._layers: dict[str, Layer] = {}
        self._sent: dict[str, Hashable] = {}
        self._stamp: object = None
        self._settings: Settings | None = None
        self._mapped: set[str] = set()
        self.group.send(Build(self.source.config, self.source.dtype, self.streamed, self.sharded))
        self.division = Division.of(self.group)
        if self.sharded:
            gathering(self.group)
        _HELD[self.group] = weakref.ref(self)
        self._update()

    def evaluate(
        self,
        execution: Execution,
        x: Tensor,
        timestep: Tensor,
        text: TextTokens | None,
        *,
        kernels: Any = None,
        around_block: Any = None,
        compilers: Any = None,
        fill: KVCache | None = None,
        kv_cache: KVCache | None = None,
        reused: bool = True,
        num_cond_latents: int = 0,
        progress: float | None = None,
        reference: Reference | None = None,
    ) -> tuple[Tensor, bool]:
        """`Execution.evaluate` on all ranks.

        around_block: a hook whose attribute `changes` is False changes no tokens, and runs in this rank alone.
        """
        own: dict[str, Any] = {"kernels": kernels, "compilers": compilers, "reused": reused}
        own["around_block"] = around_block
        given: dict[str, Any] = {"num_cond_latents": num_cond_latents, "progress": progress, "reference": reference}
        held = _HELD.get(self.group, lambda: None)() is self
        # The others have lost a cache that was filled before they held another network.
        lost = kv_cache is not None and not (held and id(kv_cache) in self._caches)
        patched = around_block is not None and getattr(around_block, "changes", True)
        patched |= kernels is not None and not is_known(kernels.attend)
        if patched:
            execution.say(ALONE)
        if patched or lost:
            own |= {"fill": fill, "kv_cache": kv_cache}
            with nullcontext() if execution.stream is None else execution.stream.alone():
                return execution.evaluate(x, timestep, text, **own, **given)
        with self.group.working():
            if held:
                self._update()
            else:
                self._build()
            known, new = (None, False) if text is None else self._text(text)
            settings = Settings(execution.optimizations, execution.block_sparse, execution.sparse)
            size = None
            if fill is not None:
                size = (*x.shape[2:], len(x), "cpu" if fill.k.device.type == "cpu" else self.group.device.type)
            self.group.send(
                Evaluate(
                    x.to(execution.compute_dtype),
                    timestep,
                    None if settings == self._settings else settings,
                    None if known is None else known.number,
                    text if new else None,
                    self._cache(fill if kv_cache is None else kv_cache),
                    size,
                    given,
                    self._forgotten(),
                )
            )
            self._settings = settings
            return self.division.evaluate(execution, x, timestep, known, kv_cache, fill=fill, **own, **given)

    def _update(self) -> None:
        """Send layers and weights that have changed."""
        stamp = self.source.stamp()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        layers, versions = self.source.layers(), self.source.versions()
        changed = {name: layer for name, layer in layers.items() if self._layers.get(name) != layer}
        changed |= {name: Layer(None, 0, None) for name in self._layers.keys() - layers.keys()}
        new = [name for name, version in versions.items() if self._sent.get(name) != version]
        if changed:
            self.group.send(Weights(changed, {}))
        if self.common and not self._sent:
            self.group.send(Map(self.common))
            if agreed(True):
                for i, block in self.common.items():
                    self._mapped |= {f"blocks.{i}.{name}" for name, *_ in block.parameters}
        written = tuple(name for name in new if name in self._mapped)
        if written and self._sent:
            self.group.send(Weights({}, {}, written))
        self._layers, self._sent = layers, versions
        new = [name for name in new if name not in self._mapped]
        # Piece by piece, so that a rank that streams or shards blocks never has them all on its device.
        for names in by_blocks(new):
            self.group.send(Weights({}, self.source.weights(names)))

    def _text(self, text: TextTokens) -> tuple[Text, bool]:
        """What is known of a text, and whether it is new.

        The text itself is held only during a pass: otherwise nobody would see that it is not used any more.
        """
        known = self._texts.get(id(text))
        new = known is None
        if known is None:
            self._count += 1
            known = self._texts[id(text)] = Text(self._count, None)
            weakref.finalize(text, self._drop_text, id(text))
        return replace(known, whole=text), new

    def _drop_text(self, key: int) -> None:
        known = self._texts.pop(key, None)
        self._dropped += [] if known is None else [known.number]

    def _cache(self, cache: KVCache | None) -> int | None:
        if cache is None:
            return None
        if id(cache) not in self._caches:
            self._count += 1
            self._caches[id(cache)] = self._count
            weakref.finalize(cache, self._drop_cache, id(cache))
        return self._caches[id(cache)]

    def _drop_cache(self, key: int) -> None:
        number = self._caches.pop(key, None)
        self._dropped += [] if number is None else [number]

    def _forgotten(self) -> tuple[int, ...]:
        dropped = tuple(self._dropped)
        del self._dropped[: len(dropped)]
        return dropped


# --- the other ranks -------------------------------------------------------------------------------------------------


class Follower:
    """A mirror of rank 0's network, and what rank 0 has sent."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.texts: dict[int, Text] = {}
        self.caches: dict[int, KVCache] = {}
        self.network: OptimizedTransformer | None = None
        self.waiting: tuple[int, ...] = ()
        # Blocks that are, or will be, divided among the ranks.
        self.shards: dict[int, Shard | None] = {}

    def build(self, message: Build) -> None:
        self.texts, self.caches, self.network, self.shards = {}, {}, None, {}
        # A network refers to itself, and Python may take long to notice that nobody else does.
        gc.collect()
        self.network = OptimizedTransformer(message.config, dtype=message.dtype, device="meta")
        self.network.announce = lambda sentence: None
        self.waiting, self.shards = message.streamed, dict.fromkeys(message.sharded)
        self.buffers: dict[int, Tensor] = {}
        self.division = Division.of(self.group)
        if message.sharded:
            gathering(self.group)

    def map(self, message: Map) -> None:
        try:
            buffers = {i: mapped(block.place) for i, block in message.blocks.items()}
        except OSError:
            # Of another machine, or of a process that may not be looked into.
            buffers = {}
        if not agreed(bool(buffers)):
            return
        network, self.buffers = self._network(), buffers
        for i, block in message.blocks.items():
            for name, dtype, shape, (start, size) in block.parameters:
                owner, _, leaf = name.rpartition(".")
                view = buffers[i][start : start + size].view(dtype).view(shape)
                module = network.blocks[i].get_submodule(owner)
                module._parameters[leaf] = nn.Parameter(view, requires_grad=False)
                if isinstance(module, Fp8Linear):
                    module.run_on(self.group.device)
        self._place(network)

    def weights(self, message: Weights) -> None:
        network, device = self._network(), self.group.device
        for name in message.written:
            # As writing in place would have done, so that copies on the device are outdated.
            torch.autograd.graph.increment_version(network.get_parameter(name))
        for name, layer in message.layers.items():
            form_layer(network, name, layer)
        for name, parameter in message.parameters.items():
            owner, _, leaf = name.rpartition(".")
            module = network.get_submodule(owner)
            held = module._parameters.get(leaf)
            parts = name.split(".")
            block = int(parts[1]) if parts[0] == "blocks" else None
            if held is not None and not held.is_meta and held.shape == parameter.shape:
                shard = None if block is None else self.shards.get(block)
                if shard is None or not shard.write(held, parameter):
                    # In place, so that streamed weights stay where they are and kept keys notice.
                    held.copy_(parameter)
                continue
            if block in self.waiting and leaf not in NAMES:
                parameter = parameter.to("cpu")
            module._parameters[leaf] = nn.Parameter(parameter, requires_grad=False)
            if isinstance(module, Fp8Linear):
                module.run_on(device)
        self._place(network)

    def _place(self, network: OptimizedTransformer) -> None:
        """Put blocks that are complete where they wait."""
        for i, shard in self.shards.items():
            if shard is None and not any(p.is_meta for p in network.blocks[i].parameters()):
                self.shards[i] = Shard(network.blocks[i], gathering(self.group), self.group.device, keep=False)
        shards = {i: shard for i, shard in self.shards.items() if shard is not None}
        if (self.waiting or shards) and network.stream is None and not any(p.is_meta for p in network.parameters()):
            network.stream_blocks(self.group.device, self.waiting, shards, self.buffers)

    def evaluate(self, message: Evaluate) -> None:
        network = self._network()
        execution = network.execution
        for number in message.dropped:
            self.texts.pop(number, None)
            self.caches.pop(number, None)
        if message.settings is not None:
            execution.set_optimizations(message.settings.optimizations)
            execution.block_sparse, execution.sparse = message.settings[1:]
        text = None
        if message.text is not None:
            if message.new_text is not None:
                self.texts[message.text] = Text(message.text, message.new_text)
            text = self.texts[message.text]
        fill = cache = None
        if message.cache is not None and message.fill is not None:
            frames, height, width, batch, device = message.fill
            place = self.group.device if device != "cpu" else torch.device("cpu")
            fill = execution.new_kv_cache(frames, height, width, batch, place, message.given["reference"])
            self.caches[message.cache] = fill
        elif message.cache is not None:
            cache = self.caches[message.cache]
        self.division.evaluate(execution, message.x, message.timestep, text, cache, fill=fill, **message.given)
        if fill is not None:
            fill.rotate(message.x.device)

    def _network(self) -> OptimizedTransformer:
        assert self.network is not None, "rank 0 builds the network first"
        return self.network


@torch.no_grad()
def serve(group: Group) -> None:
    """Take part in what rank 0 does, until it ends the group. Raises what a pass raises."""
    follower, vae = Follower(group), ServedVAE(group)
    handlers: dict[type, Callable[[Any], object]] = {
        Measure: lambda message: Division.of(group).links(),
        Known: lambda message: wrong_bytes(group),
        Build: follower.build,
        Map: follower.map,
        Weights: follower.weights,
        Evaluate: follower.evaluate,
        Decode: vae.decode,
        Encode: vae.encode,
    }
    while (message := group.receive()) is not None:
        handlers[type(message)](message)
        del message


def share(group: Group, model: OptimizedTransformer, sharded: Iterable[int] = ()) -> Leader:
    """Run a network's passes on all ranks of a group from now on; rank 0 calls it.

    sharded: blocks of whose weights every rank holds a share on its device. This rank also keeps them in CPU memory.
    Streamed blocks move to memory that the ranks of one machine have in common.
    """
    divided = tuple(sorted(sharded))
    if divided or model.stream is not None:
        model.stream_blocks(model.device, divided, {})
    waiting = () if model.stream is None else model.stream.streamed
    streamed = tuple(i for i in waiting if i not in divided)
    common = {} if model.stream is None else in_common(model.stream, streamed)
    leader = Leader(group, OwnWeights(model), streamed, divided, common)
    if divided:
        # They stay in CPU memory, where LoRAs are exchanged and from where passes of this rank alone stream them.
        shards = {i: Shard(model.blocks[i], gathering(group), group.device, keep=True) for i in divided}
        model.stream_blocks(model.device, (), shards)
    model.execution.ranks = leader
    return leader
