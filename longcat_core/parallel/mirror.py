"""Ranks that run a network's passes together: rank 0 leads, the others hold mirrors of its network and serve.

Rank 0 is the process that has the task: it reads files, encodes prompts, samples and writes. Before each pass it sends
what the pass needs, and whatever has changed since the last one: weights, switches, texts. So all tasks run on several
GPUs without knowing it, and only rank 0 reads a checkpoint.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..model.audio_tokens import AudioTokens
from ..model.config import ModelConfig
from ..model.kv_cache import KVCache, Reference
from ..model.text import TextTokens
from ..optimize.adapters import NAMES, Adapted, adapt, rank_of, release
from ..optimize.attention import is_known
from ..optimize.block_sparse import BlockSparse
from ..optimize.execution import Execution, OptimizedTransformer
from ..optimize.quantization import Fp8Linear
from ..optimize.sparse.settings import Sparse
from ..optimize.switches import Optimizations
from .group import Group
from .sequence import SequenceSharing, all_gather

ALONE = "this MODEL's blocks or attention are patched, and the patches run on one GPU; the others wait"


class Layer(NamedTuple):
    """What a layer is, beside plain. dtype: of an 8-bit layer's output, or None; rank, lora: of its adapter."""

    dtype: torch.dtype | None
    rank: int
    lora: torch.dtype | None


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


class Division:
    """The ranks as groups that take different samples of a batch, such as the halves of guidance, and share each."""

    def __init__(self, group: Group) -> None:
        """Called on all ranks at once."""
        size = group.size
        self.meshes: dict[int, DeviceMesh] = {}
        for parts in (n for n in range(1, size + 1) if size % n == 0):
            names = ("samples", "tokens")
            self.meshes[parts] = init_device_mesh(group.device.type, (parts, size // parts), mesh_dim_names=names)

    @classmethod
    def of(cls, group: Group) -> Division:
        """The group's own, made by the first call."""
        if group not in _DIVISIONS:
            _DIVISIONS[group] = cls(group)
        return _DIVISIONS[group]

    def parts(self, samples: int) -> int:
        """Into how many groups the ranks divide for a batch of samples that do not belong together."""
        return max(parts for parts in self.meshes if samples % parts == 0)

    def evaluate(
        self,
        execution: Execution,
        x: Tensor,
        timestep: Tensor,
        text: _Text | None,
        cache: KVCache | None,
        **options: Any,
    ) -> tuple[Tensor, bool]:
        """`Execution.evaluate` on all ranks at once, with the same arguments; the output is whole on all of them."""
        # A cache of several videos serves whole batches of them.
        together = 1 if cache is None else len(cache.k[0])
        parts = 1 if options.get("fill") is not None else self.parts(len(x) // together)
        mesh = self.meshes[parts]
        samples, tokens = mesh.get_group("samples"), mesh.get_group("tokens")
        own = len(x) // parts
        rows = slice(own * dist.get_rank(samples), own * (dist.get_rank(samples) + 1))
        timestep = timestep if len(timestep) == 1 else timestep[rows]
        sharing = SequenceSharing(tokens) if dist.get_world_size(tokens) > 1 else None
        heard = None if text is None else text.of(rows, len(x))
        out, sparse = execution.evaluate(x[rows], timestep, heard, kv_cache=cache, sharing=sharing, **options)
        if parts > 1:
            whole = out.new_empty(len(x), *out.shape[1:])
            all_gather(whole, out.contiguous(), samples)
            out = whole
        return out, sparse


_DIVISIONS: weakref.WeakKeyDictionary[Group, Division] = weakref.WeakKeyDictionary()


@dataclass
class _Text:
    """A text, and what of it the ranks' groups need, which keep their own keys and values."""

    number: int
    whole: TextTokens | None
    cut: dict[tuple[int, int], TextTokens] = field(default_factory=dict)

    def of(self, rows: slice, batch: int) -> TextTokens:
        """The texts of these samples of a batch."""
        whole = self.whole
        assert whole is not None, "a text that is used lives"
        if len(whole.tokens) == 1 or (rows.start, rows.stop) == (0, batch):
            return whole
        key = rows.start, rows.stop
        if key not in self.cut:
            self.cut[key] = _rows(whole, rows)
        return self.cut[key]


def _rows(text: TextTokens, rows: slice) -> TextTokens:
    def own(x: Any) -> Any:
        return None if x is None else x[rows]

    audio = text.audio
    if audio is not None and len(audio.tokens) > 1:
        audio = AudioTokens(audio.tokens[rows], audio.rope, audio.classes)
    return replace(
        text,
        tokens=text.tokens[rows],
        bias=own(text.bias),
        lengths=own(text.lengths),
        pad_counts=own(text.pad_counts),
        audio=audio,
        cached=None,
    )


# --- rank 0 ----------------------------------------------------------------------------------------------------------


class Leader:
    """Rank 0's side of a network: an `optimize.sharing.Ranks` for its executions."""

    def __init__(self, group: Group, network: OptimizedTransformer | Any, streamed: tuple[int, ...] = ()) -> None:
        """Build the network on the other ranks and send its weights.

        streamed: blocks of which the other ranks keep weights in CPU memory.
        """
        self.group, self.network = group, network
        self._texts: dict[int, _Text] = {}
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

    def _text(self, text: TextTokens) -> tuple[_Text, bool]:
        """What is known of a text, and whether it is new.

        The text itself is held only during a pass: otherwise nobody would see that it is not used any more.
        """
        known = self._texts.get(id(text))
        new = known is None
        if known is None:
            self._count += 1
            known = self._texts[id(text)] = _Text(self._count, None)
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
        self.texts: dict[int, _Text] = {}
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
                self.texts[message.text] = _Text(message.text, message.new_text)
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
    follower = Follower(group)
    handlers: dict[type, Callable[[Any], None]] = {
        Build: follower.build,
        Weights: follower.weights,
        Evaluate: follower.evaluate,
    }
    while (message := group.receive()) is not None:
        handlers[type(message)](message)
        del message


def share(group: Group, model: OptimizedTransformer) -> Leader:
    """Run a network's passes on all ranks of a group from now on; rank 0 calls it."""
    stream = model.stream
    leader = Leader(group, model, () if stream is None else stream.streamed)
    model.execution.ranks = leader
    return leader
