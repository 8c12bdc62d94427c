"""How the ranks of a group divide a pass: samples of a batch first, then the tokens of each."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, replace
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..model.audio_tokens import AudioTokens
from ..model.kv_cache import KVCache
from ..model.text import TextTokens
from ..optimize.execution import Execution
from .group import Group
from .sequence import SequenceSharing, all_gather
from .weights import agreed
from .windows import Windows, can_map, machines


class Division:
    """The ranks as groups that take different samples of a batch, such as the halves of guidance, and share each."""

    def __init__(self, group: Group) -> None:
        """Called on all ranks at once."""
        size = group.size
        self.meshes: dict[int, DeviceMesh] = {}
        for parts in (n for n in range(1, size + 1) if size % n == 0):
            names = ("samples", "tokens")
            self.meshes[parts] = init_device_mesh(group.device.type, (parts, size // parts), mesh_dim_names=names)
        # Of the ranks that share tokens, by their number, where these can write into each other's memory.
        self.windows: dict[int, Windows] = {}
        hosts = machines(group.device, self.meshes[size].get_group("tokens"))
        for mesh in self.meshes.values():
            tokens = mesh.get_group("tokens")
            ranks = dist.get_process_group_ranks(tokens)
            if len(ranks) == 1:
                continue
            alike = len({hosts[rank] for rank in ranks}) == 1
            windows = Windows(tokens, group.device)
            # All try together, or nobody does.
            possible = agreed(alike and can_map(group.device, [group.devices[rank] for rank in ranks]))
            if possible and agreed(windows.works()):
                self.windows[len(ranks)] = windows

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
        text: Text | None,
        cache: KVCache | None,
        **options: Any,
    ) -> tuple[Tensor, bool]:
        """`Execution.evaluate` on all ranks at once, with the same arguments; each has the whole output."""
        # A cache of several videos serves all of these at once.
        together = 1 if cache is None else len(cache.k[0])
        parts = 1 if options.get("fill") is not None else self.parts(len(x) // together)
        mesh = self.meshes[parts]
        samples, tokens = mesh.get_group("samples"), mesh.get_group("tokens")
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
