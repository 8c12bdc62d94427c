"""Ranks that run a network's passes together: rank 0 leads, the others hold mirrors of its network and serve.

Rank 0 is the process that has the task: it reads files, encodes prompts, samples and writes. Before each pass it sends
what the pass needs, and what has changed since the last one: weights, switches, texts. So all tasks run on several GPUs
without knowing it, and only rank 0 reads a checkpoint.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..model.config import ModelConfig
from ..model.kv_cache import KVCache, Reference
from ..model.text import TextTokens
from ..optimize.adapters import NAMES, Adapted, adapt, rank_of, release
from ..optimize.attention import is_known
from ..optimize.block_sparse import BlockSparse
from ..optimize.execution import Execution
from ..optimize.optimized import OptimizedTransformer
from ..optimize.quantization import Fp8Linear
from ..optimize.sparse.settings import Sparse
from ..optimize.switches import Optimizations
from .bandwidth import Bandwidth
from .division import Division, Text
from .group import Group
from .led_vae import Decode, Encode, ServedVAE

ALONE = "this MODEL's blocks or attention are patched, and the patches run on one GPU; the others wait"


class Layer(NamedTuple):
    """What a layer is, beside plain. dtype: of an 8-bit layer's output, or None; rank, lora: of its adapter."""

    dtype: torch.dtype | None
    rank: int
    lora: torch.dtype | None


class Measure(NamedTuple):
    """Measure how fast the ranks exchange data."""


class Settings(NamedTuple):
    """What decides how an execution runs."""

    optimizations: Optimizations
    block_sparse: BlockSparse | None
    sparse: Sparse | None


@dataclass(frozen=True)
class Build:
    """A network like rank 0's, without weights. streamed: blocks whose weights wait in CPU memory."""

    config: ModelConfig
    dtype: torch.dtype
    streamed: tuple[int, ...]


@dataclass(frozen=True)
class Weights:
    """Layers that have changed, and parameters by name."""

    layers: dict[str, Layer]
    parameters: dict[str, Tensor]


@dataclass(frozen=True)
class Evaluate:
    """A pass; see `Execution.evaluate`. Texts and caches have numbers; those in `dropped` are not used any more.

    new_text: the text itself, the first time. fill: of the cache that receives keys and values: frames, height and
    width in latents, batch, and its device.
    """

    x: Tensor
    timestep: Tensor
    settings: Settings
    text: int | None
    new_text: TextTokens | None
    cache: int | None
    fill: tuple[int, int, int, int, str] | None
    num_cond_latents: int
    progress: float | None
    reference: Reference | None
    dropped: tuple[int, ...]


# --- rank 0 ----------------------------------------------------------------------------------------------------------


class Leader:
    """Rank 0's side of a network: an `optimize.sharing.Ranks` for its executions."""

    def __init__(self, group: Group, network: OptimizedTransformer | Any, streamed: tuple[int, ...] = ()) -> None:
        """Build the network on the other ranks and send its weights.

        streamed: blocks of which the other ranks keep weights in CPU memory.
        """
        self.group, self.network = group, network
        self._texts: dict[int, Text] = {}
        self._caches: dict[int, int] = {}
        self._dropped: list[int] = []
        self._count = 0
        self._layers: dict[str, Layer] = {}
        self._sent: dict[str, tuple[Tensor, int]] = {}
        with group.working():
            group.send(Build(network.config, network.dtype, streamed))
            self.division = Division.of(group)
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
        """`Execution.evaluate` on all ranks."""
        own: dict[str, Any] = {"kernels": kernels, "compilers": compilers, "reused": reused}
        given: dict[str, Any] = {
            "num_cond_latents": num_cond_latents,
            "progress": progress,
            "reference": reference,
        }
        if around_block is not None or (kernels is not None and not is_known(kernels.attend)):
            execution.say(ALONE)
            own |= {"around_block": around_block, "fill": fill, "kv_cache": kv_cache}
            return execution.evaluate(x, timestep, text, **own, **given)
        with self.group.working():
            self._update()
            known, new = (None, False) if text is None else self._text(text)
            size = None
            if fill is not None:
                size = (*x.shape[2:], len(x), "cpu" if fill.k.device.type == "cpu" else self.group.device.type)
            self.group.send(
                Evaluate(
                    x.to(execution.compute_dtype),
                    timestep,
                    Settings(execution.optimizations, execution.block_sparse, execution.sparse),
                    None if known is None else known.number,
                    text if new else None,
                    self._cache(fill if kv_cache is None else kv_cache),
                    size,
                    dropped=self._forgotten(),
                    **given,
                )
            )
            return self.division.evaluate(execution, x, timestep, known, kv_cache, fill=fill, **own, **given)

    def _update(self) -> None:
        """Send layers and weights that have changed."""
        layers = layers_of(self.network)
        changed = {name: layer for name, layer in layers.items() if self._layers.get(name) != layer}
        changed |= {name: Layer(None, 0, None) for name in self._layers.keys() - layers.keys()}
        self._layers, now = layers, dict(self.network.named_parameters())
        versions = {name: 0 if p.is_inference() else p._version for name, p in now.items()}
        new = {name: p for name, p in now.items() if not self._is_sent(name, p, versions[name])}
        if not changed and not new:
            return
        self._sent = {name: (p, versions[name]) for name, p in now.items()}
        # Piece by piece, so that a rank that streams blocks never has them all on its device.
        for number, names in enumerate(_by_blocks(new)):
            self.group.send(Weights(changed if number == 0 else {}, {name: new[name].detach() for name in names}))
        if not new:
            self.group.send(Weights(changed, {}))

    def _is_sent(self, name: str, parameter: Tensor, version: int) -> bool:
        sent = self._sent.get(name)
        return sent is not None and sent[0] is parameter and sent[1] == version

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
        self._dropped.append(self._texts.pop(key).number)

    def _cache(self, cache: KVCache | None) -> int | None:
        if cache is None:
            return None
        if id(cache) not in self._caches:
            self._count += 1
            self._caches[id(cache)] = self._count
            weakref.finalize(cache, self._drop_cache, id(cache))
        return self._caches[id(cache)]

    def _drop_cache(self, key: int) -> None:
        self._dropped.append(self._caches.pop(key))

    def _forgotten(self) -> tuple[int, ...]:
        dropped = tuple(self._dropped)
        del self._dropped[: len(dropped)]
        return dropped


def layers_of(network: nn.Module) -> dict[str, Layer]:
    """The layers of a network that are not plain, by name."""
    found = {}
    for name, module in network.named_modules():
        if isinstance(module, (Fp8Linear, Adapted)):
            lora = module.lora_down.dtype if isinstance(module, Adapted) else None
            found[name] = Layer(module.dtype if isinstance(module, Fp8Linear) else None, rank_of(module), lora)
    return found


def _by_blocks(names: Any) -> Iterator[list[str]]:
    """Names of parameters block by block, those outside blocks first."""
    pieces: dict[str, list[str]] = {"": []}
    for name in names:
        parts = name.split(".")
        pieces.setdefault(parts[1] if parts[0] == "blocks" else "", []).append(name)
    yield from (piece for piece in pieces.values() if piece)


# --- the other ranks -------------------------------------------------------------------------------------------------


class Follower:
    """A mirror of rank 0's network, and what rank 0 has sent."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.texts: dict[int, Text] = {}
        self.caches: dict[int, KVCache] = {}
        self.network: OptimizedTransformer | None = None
        self.waiting: tuple[int, ...] = ()

    def build(self, message: Build) -> None:
        self.texts, self.caches, self.network = {}, {}, None
        self.network = OptimizedTransformer(message.config, dtype=message.dtype, device="meta")
        self.network.announce = lambda sentence: None
        self.waiting = message.streamed
        self.division = Division.of(self.group)

    def weights(self, message: Weights) -> None:
        network, device = self._network(), self.group.device
        for name, layer in message.layers.items():
            _form(network, name, layer)
        for name, parameter in message.parameters.items():
            owner, _, leaf = name.rpartition(".")
            module = network.get_submodule(owner)
            held = module._parameters.get(leaf)
            if held is not None and not held.is_meta and held.shape == parameter.shape:
                # In place, so that streamed weights stay where they are and kept keys notice.
                held.copy_(parameter)
                continue
            parts = name.split(".")
            if parts[0] == "blocks" and int(parts[1]) in self.waiting and leaf not in NAMES:
                parameter = parameter.to("cpu")
            module._parameters[leaf] = nn.Parameter(parameter, requires_grad=False)
            if isinstance(module, Fp8Linear):
                module.run_on(device)
        if self.waiting and not any(p.is_meta for p in network.parameters()):
            network.stream_blocks(device, self.waiting)
            self.waiting = ()

    def evaluate(self, message: Evaluate) -> None:
        network = self._network()
        execution = network.execution
        for number in message.dropped:
            self.texts.pop(number, None)
            self.caches.pop(number, None)
        settings = message.settings
        if execution.optimizations != settings.optimizations:
            execution.set_optimizations(settings.optimizations)
        execution.block_sparse, execution.sparse = settings.block_sparse, settings.sparse
        text = None
        if message.text is not None:
            if message.new_text is not None:
                self.texts[message.text] = Text(message.text, message.new_text)
            text = self.texts[message.text]
        fill = cache = None
        if message.cache is not None and message.fill is not None:
            frames, height, width, batch, device = message.fill
            place = self.group.device if device != "cpu" else torch.device("cpu")
            fill = execution.new_kv_cache(frames, height, width, batch, place, message.reference)
            self.caches[message.cache] = fill
        elif message.cache is not None:
            cache = self.caches[message.cache]
        self.division.evaluate(
            execution,
            message.x,
            message.timestep,
            text,
            cache,
            fill=fill,
            num_cond_latents=message.num_cond_latents,
            progress=message.progress,
            reference=message.reference,
        )
        if fill is not None:
            fill.rotate(message.x.device)

    def _network(self) -> OptimizedTransformer:
        assert self.network is not None, "rank 0 builds the network first"
        return self.network


def _form(network: OptimizedTransformer, name: str, layer: Layer) -> None:
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


@torch.no_grad()
def serve(group: Group) -> None:
    """Take part in what rank 0 does, until it ends the group. Raises what a pass raises."""
    follower, vae = Follower(group), ServedVAE()
    handlers: dict[type, Callable[[Any], object]] = {
        Measure: lambda message: group.bandwidth(),
        Build: follower.build,
        Weights: follower.weights,
        Evaluate: follower.evaluate,
        Decode: vae.decode,
        Encode: vae.encode,
    }
    while (message := group.receive()) is not None:
        handlers[type(message)](message)
        del message


def bandwidth(group: Group) -> Bandwidth:
    """How fast the ranks exchange data; rank 0 calls it."""
    with group.working():
        group.send(Measure())
        return group.bandwidth()


def share(group: Group, model: OptimizedTransformer) -> Leader:
    """Run a network's passes on all ranks of a group from now on; rank 0 calls it."""
    stream = model.stream
    leader = Leader(group, model, () if stream is None else stream.streamed)
    model.execution.ranks = leader
    return leader
