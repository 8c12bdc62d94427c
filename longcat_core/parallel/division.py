"""How the ranks of a group divide a pass: samples of a batch first, then the tokens of each."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from ..model.audio_tokens import AudioTokens
from ..model.kv_cache import KVCache
from ..model.text import TextTokens
from ..optimize.execution import Execution
from .bandwidth import Bandwidth, measured
from .group import Group
from .sequence import SequenceSharing, all_gather
from .weights import agreed
from .windows import Windows, can_map, machines

# Windows are preferred if they reach this much of the speed of messages, for which heads are copied before and after.
FAVOR = 0.9


class Division:
    """The ranks as groups that take different samples of a batch, such as the halves of guidance, and share each."""

    def __init__(self, group: Group) -> None:
        """Called on all ranks at once."""
        size = group.size
        # By the number of parts: this rank's groups, the one that divides samples and the one that shares tokens.
        self.groups: dict[int, tuple[dist.ProcessGroup, dist.ProcessGroup]] = {}
        for parts in (n for n in range(1, size + 1) if size % n == 0):
            mesh = init_device_mesh(group.device.type, (parts, size // parts), mesh_dim_names=("samples", "tokens"))
            self.groups[parts] = mesh.get_group("samples"), mesh.get_group("tokens")
        # Of the ranks that share tokens, by their number, where these write into each other's memory.
        self.windows: dict[int, Windows] = {}
        hosts = machines(group.device, self.groups[size][1])
        for _, tokens in self.groups.values():
            ranks = dist.get_process_group_ranks(tokens)
            if len(ranks) == 1:
                continue
            alike = len({hosts[rank] for rank in ranks}) == 1
            windows = Windows(tokens, group.device)
            # All try together, or nobody does.
            possible = agreed(alike and can_map(group.device, [group.devices[rank] for rank in ranks]))
            if possible and agreed(windows.works()):
                self.windows[len(ranks)] = windows
        self._device, self._links = group.device, dict[int, Bandwidth]()
        # Processes on a CPU have windows to try them out.
        if group.device.type == "cuda":
            self.choose()

    def links(self) -> Mapping[int, Bandwidth]:
        """How fast ranks exchange data that share a sample's tokens, by their number; called on all ranks at once.

        The groups of one number exchange at the same time, as they do in a pass. The first call measures, within
        milliseconds once connections stand.
        """
        if not self._links:
            tokens = {dist.get_world_size(group): group for _, group in self.groups.values()}
            for size in sorted(tokens.keys() - {1}):
                self._links[size] = measured(self._device, size, tokens[size], self.windows.get(size))
        return self._links

    def choose(self) -> None:
        """Give up windows where messages are faster, as over PCIe; called on all ranks at once, before any pass."""
        for size, link in self.links().items():
            if size in self.windows and link.written < FAVOR * link.all_to_all:
                del self.windows[size]
                self._links[size] = link._replace(written=0.0)

    @classmethod
    def of(cls, group: Group) -> Division:
        """The group's own, made by the first call."""
        if group not in _DIVISIONS:
            _DIVISIONS[group] = cls(group)
        return _DIVISIONS[group]

    def parts(self, samples: int) -> int:
        """Into how many groups the ranks divide for a batch of samples that do not belong together."""
        return max(parts for parts in self.groups if samples % parts == 0)

    def evaluate(
        self,
        execution: Execution,
        x: Tensor,
        timestep: Tensor,
        text: Text | None,
        cache: KVCache | None,
        **options: Any,
    ) -> tuple[Tensor, bool]:
        """`Execution.evaluate` on all ranks at once, with the same arguments; each has the whole output."""
        # A cache of several videos serves all of these at once.
        together = 1 if cache is None else len(cache.k[0])
        parts = 1 if options.get("fill") is not None else self.parts(len(x) // together)
        samples, tokens = self.groups[parts]
        own = len(x) // parts
        rows = slice(own * dist.get_rank(samples), own * (dist.get_rank(samples) + 1))
        timestep = timestep if len(timestep) == 1 else timestep[rows]
        exchange = execution.optimizations.exchange
        shared = dist.get_world_size(tokens)
        sharing = SequenceSharing(tokens, exchange, self.windows.get(shared)) if shared > 1 else None
        heard = None if text is None else text.of(rows, len(x))
        out, sparse = execution.evaluate(x[rows], timestep, heard, kv_cache=cache, sharing=sharing, **options)
        if parts > 1:
            whole = out.new_empty(len(x), *out.shape[1:])
            all_gather(whole, out.contiguous(), samples)
            out = whole
        return out, sparse

    def release(self) -> None:
        """Free the memory that passes hold between them; called on all ranks at once."""
        for windows in self.windows.values():
            windows.release()


_DIVISIONS: weakref.WeakKeyDictionary[Group, Division] = weakref.WeakKeyDictionary()


@dataclass
class Text:
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
